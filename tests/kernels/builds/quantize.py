"""Quantise and dequantise: each format with groups in a tile, whole rows, and the sums of communication."""

import torch

from builds import Build
from tritonspeed.kernels.codes import FORMATS
from tritonspeed.kernels.dequantize import launch_dequantize_sum, launch_requantize_sum
from tritonspeed.kernels.quantize import launch_quantize

BF16 = torch.bfloat16


def forth(format: str, group_size: int, symmetric: bool = True, dtype: torch.dtype = BF16, n: int = 4096) -> None:
    launch_quantize(torch.empty(33, n, dtype=dtype), format, group_size, symmetric)


def back(format: str, group_size: int, ranks: int = 1, again: bool = False, n: int = 4096) -> None:
    groups = n // group_size
    codes = torch.empty(ranks, 33, groups * FORMATS[format].num_codes(group_size), dtype=torch.uint8)
    scales, offsets = torch.empty(ranks, 33, groups), torch.empty(0)
    if again:
        launch_requantize_sum(codes, scales, offsets, format, group_size)
    else:
        launch_dequantize_sum(codes, scales, offsets, format, group_size, BF16)


BUILDS = {
    "int8, groups of 128": Build(lambda: forth("int8", 128)),
    "int8, groups of 2048, fp32": Build(lambda: forth("int8", 2048, dtype=torch.float32)),
    "int4, groups of 64": Build(lambda: forth("int4", 64)),
    "int4 with offset, groups of 128": Build(lambda: forth("int4", 128, symmetric=False)),
    "fp8, groups of 128": Build(lambda: forth("fp8", 128)),
    "int8, rows of 14336": Build(lambda: forth("int8", 14336, n=14336)),
    # a row that 16 does not divide starts anywhere: it is read element by element
    "int8, rows of 50257": Build(lambda: forth("int8", 50257, n=50257), widest_load=0),
    "int8 back, groups of 128": Build(lambda: back("int8", 128)),
    "int4 back, groups of 64": Build(lambda: back("int4", 64)),
    "fp8 back, rows of 14336": Build(lambda: back("fp8", 14336, n=14336)),
    "int8 sum of 8 ranks": Build(lambda: back("int8", 2048, ranks=8)),
    "int4 sum of 8 ranks, again": Build(lambda: back("int4", 2048, ranks=8, again=True)),
}
