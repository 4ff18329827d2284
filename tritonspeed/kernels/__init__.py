"""Kernels as functions for any PyTorch program: one file per operation, with its maths, reference, kernel and wrapper.

GPU tensors take the Triton kernel, CPU tensors PyTorch. Importing this needs neither a GPU nor Triton.
"""

from tritonspeed.kernels.adamw import adamw_
from tritonspeed.kernels.global_norm import global_norm, sum_of_squares

__all__ = ["adamw_", "global_norm", "sum_of_squares"]
