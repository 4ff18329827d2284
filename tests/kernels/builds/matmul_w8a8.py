"""W8A8: int8 and e4m3, the latter in all three ways of the cards; one row, few, many; a ragged K."""

import torch

from builds import Build
from tritonspeed.kernels.matmul_w8a8 import launch_matmul_w8a8

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def call(m: int, n: int, k: int, codes: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> None:
    x, w = torch.empty(m, k, dtype=codes), torch.empty(n, k, dtype=codes)
    launch_matmul_w8a8(x, torch.empty(m), w, torch.empty(1, n), torch.empty(n, dtype=dtype), dtype)


BUILDS = {
    "int8, 1 row": Build(lambda: call(1, 4096, 4096, INT8)),
    "int8, 16 rows": Build(lambda: call(16, 4096, 4096, INT8), uses_tensor_cores=True),
    "int8, 50 rows, odd": Build(lambda: call(50, 1001, 11040, INT8, torch.float16), uses_tensor_cores=True),
    "int8, 300 rows": Build(lambda: call(300, 4096, 4096, INT8), uses_tensor_cores=True),
    "fp8, 1 row, odd": Build(lambda: call(1, 1001, 11040, FP8)),
    "fp8, 16 rows": Build(lambda: call(16, 4096, 4096, FP8), uses_tensor_cores=True),
    "fp8, 50 rows, odd": Build(lambda: call(50, 1001, 11040, FP8, torch.float16), uses_tensor_cores=True),
    "fp8, 300 rows": Build(lambda: call(300, 4096, 4096, FP8), uses_tensor_cores=True),
}
