"""Kernels for any PyTorch program: one file per operation, with its maths, reference, kernel and wrapper.

GPU tensors take the Triton kernel, CPU tensors PyTorch. Importing this needs neither a GPU nor Triton. All names are
bound here and now: a function shares its file's name, and a name bound later would be the file.
"""

from tritonspeed.kernels.adamw import adamw_
from tritonspeed.kernels.cross_entropy import cross_entropy
from tritonspeed.kernels.dequantize import dequantize, dequantize_sum, requantize_sum
from tritonspeed.kernels.global_norm import global_norm, sum_of_squares
from tritonspeed.kernels.linear_cross_entropy import linear_cross_entropy
from tritonspeed.kernels.quantize import quantize
from tritonspeed.kernels.softmax import softmax

__all__ = [
    "adamw_",
    "cross_entropy",
    "dequantize",
    "dequantize_sum",
    "global_norm",
    "linear_cross_entropy",
    "quantize",
    "requantize_sum",
    "softmax",
    "sum_of_squares",
]
