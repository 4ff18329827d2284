"""Newton-Schulz: small and large tiles in each type. Buffers are padded, so odd shapes take the same code."""

import torch

from builds import Build
from tritonspeed.kernels.newton_schulz import COEFFICIENTS, launch_newton_schulz


def call(m: int, n: int, dtype: torch.dtype) -> None:
    launch_newton_schulz(torch.zeros(1, m, n, dtype=dtype), 1, *COEFFICIENTS, 1e-7)


BUILDS = {  # the norm's second kernel adds up a few fp64 numbers, 8 bytes a lane
    "bf16, small, odd": Build(lambda: call(77, 101, torch.bfloat16), widest_load=8, uses_tensor_cores=True),
    "bf16, large": Build(lambda: call(520, 600, torch.bfloat16), widest_load=8, uses_tensor_cores=True),
    "fp16, large": Build(lambda: call(520, 600, torch.float16), widest_load=8, uses_tensor_cores=True),
    "fp32": Build(lambda: call(77, 101, torch.float32), widest_load=8),  # IEEE products: in no card's matrix units
}
