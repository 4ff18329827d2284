"""W8A16: one row, few rows with K split, many rows; one scale a row and groups; a ragged K."""

import torch

from builds import Build
from tritonspeed.kernels.matmul_w8a16 import launch_matmul_w8a16

BF16, FP16 = torch.bfloat16, torch.float16


def call(m: int, n: int, k: int, groups: int = 1, dtype: torch.dtype = BF16) -> None:
    x, codes, scales = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=torch.int8), torch.empty(groups, n)
    launch_matmul_w8a16(x, codes, scales, torch.empty(n, dtype=dtype))


BUILDS = {
    "bf16, 1 row": Build(lambda: call(1, 4096, 4096)),
    "fp16, 1 row, odd": Build(lambda: call(1, 1001, 11040, 115, FP16)),
    "bf16, 16 rows": Build(lambda: call(16, 4096, 4096), uses_tensor_cores=True),
    # sm_90 copies codes 8 bytes at a time where they go to wgmma's registers, and a block of 32 has no 16 of x a thread
    "fp16, 16 rows, groups of 32": Build(lambda: call(16, 1001, 4096, 128, FP16), 8, uses_tensor_cores=True),
    "bf16, 30 rows": Build(lambda: call(30, 4096, 4096, 32), uses_tensor_cores=True),
    "fp16, 50 rows, odd": Build(lambda: call(50, 1001, 11040, 1, FP16), uses_tensor_cores=True),
    "bf16, 300 rows": Build(lambda: call(300, 1001, 4096, 32), uses_tensor_cores=True),
    "bf16, 1000 rows": Build(lambda: call(1000, 65, 256)),  # dequantised, the product is cuBLAS's
}
