"""Kernels for any PyTorch program: one file per operation, with its maths, reference, kernel and wrapper.

GPU tensors take the Triton kernel, CPU tensors PyTorch. Importing this needs neither a GPU nor Triton. All names are
bound here and now: a function shares its file's name, and a name bound later would be the file.
"""

from tritonspeed.kernels.adagrad import adagrad_
from tritonspeed.kernels.adamw import adamw_
from tritonspeed.kernels.adamw_8bit import adamw_8bit_
from tritonspeed.kernels.bias_gelu import bias_gelu
from tritonspeed.kernels.cross_entropy import cross_entropy
from tritonspeed.kernels.dequantize import dequantize, dequantize_sum, requantize_sum
from tritonspeed.kernels.dequantize_weight import dequantize_weight
from tritonspeed.kernels.global_norm import global_norm, sum_of_squares
from tritonspeed.kernels.glu import geglu, geglu_packed, glu, glu_packed, reglu, swiglu, swiglu_packed
from tritonspeed.kernels.lamb import lamb_moments_, lamb_step_
from tritonspeed.kernels.layer_norm import layer_norm
from tritonspeed.kernels.linear_cross_entropy import linear_cross_entropy
from tritonspeed.kernels.lion import lion_
from tritonspeed.kernels.matmul_w4a16 import matmul_w4a16
from tritonspeed.kernels.matmul_w8a8 import matmul_w8a8
from tritonspeed.kernels.matmul_w8a16 import matmul_w8a16
from tritonspeed.kernels.newton_schulz import newton_schulz
from tritonspeed.kernels.patch import PatchReport, patch, unpatch
from tritonspeed.kernels.quantize import quantize
from tritonspeed.kernels.rms_norm import rms_norm
from tritonspeed.kernels.rotary import rotary
from tritonspeed.kernels.softmax import softmax

__all__ = [
    "PatchReport",
    "adagrad_",
    "adamw_",
    "adamw_8bit_",
    "bias_gelu",
    "cross_entropy",
    "dequantize",
    "dequantize_sum",
    "dequantize_weight",
    "geglu",
    "geglu_packed",
    "global_norm",
    "glu",
    "glu_packed",
    "lamb_moments_",
    "lamb_step_",
    "layer_norm",
    "linear_cross_entropy",
    "lion_",
    "matmul_w4a16",
    "matmul_w8a8",
    "matmul_w8a16",
    "newton_schulz",
    "patch",
    "quantize",
    "reglu",
    "requantize_sum",
    "rms_norm",
    "rotary",
    "softmax",
    "sum_of_squares",
    "swiglu",
    "swiglu_packed",
    "unpatch",
]
