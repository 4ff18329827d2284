"""W4A16: one row, few rows with K split, many rows; groups, one scale a row, a ragged K; the weight as floats."""

import torch

from builds import Build
from tritonspeed.kernels.matmul_w4a16 import launch_matmul_w4a16

BF16, FP16 = torch.bfloat16, torch.float16


def call(m: int, n: int, k: int, groups: int, dtype: torch.dtype = BF16, zeros: bool = False) -> None:
    x, codes, scales = torch.empty(m, k, dtype=dtype), torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(groups, n)
    zero = torch.empty(groups, n, dtype=torch.uint8) if zeros else None
    launch_matmul_w4a16(x, codes, scales.half(), zero, torch.empty(n, dtype=dtype))


BUILDS = {
    "bf16, 1 row": Build(lambda: call(1, 8192, 4096, 32, zeros=True)),
    "fp16, 1 row, odd": Build(lambda: call(1, 1001, 11008, 1, FP16)),
    "bf16, 16 rows": Build(lambda: call(16, 4096, 14336, 112, zeros=True), uses_tensor_cores=True),
    "fp16, 16 rows, groups of 32": Build(lambda: call(16, 4096, 4096, 128, FP16, zeros=True), uses_tensor_cores=True),
    "fp16, 50 rows, odd": Build(lambda: call(50, 1001, 11040, 1, FP16), uses_tensor_cores=True),
    "bf16, 300 rows": Build(lambda: call(300, 1001, 4096, 32, zeros=True), uses_tensor_cores=True),
    "fp16, 300 rows, odd": Build(lambda: call(300, 1001, 11040, 1, FP16), uses_tensor_cores=True),
    "bf16, 1000 rows": Build(lambda: call(1000, 65, 256, 2, zeros=True)),  # dequantised, the product is cuBLAS's
}
