"""AdamW with 8-bit moments: types, odd sizes, and a chunk that starts inside a block."""

import torch

from builds import Build
from tritonspeed.kernels.adamw import AdamWStep
from tritonspeed.kernels.adamw_8bit import launch_adamw_8bit_
from tritonspeed.kernels.dynamic_code import num_blocks
from tritonspeed.kernels.flat_update import FlatTensors


def call(n: int, grad: torch.dtype, out: torch.dtype | None, seed: int | None = None, first: int = 0) -> None:
    codes, scales = torch.empty(n, dtype=torch.uint8), torch.empty(num_blocks(first, n))
    param_out = None if out is None else torch.empty(n, dtype=out)
    tensors = FlatTensors(
        torch.empty(n), (codes, scales, codes, scales), torch.empty(n, dtype=grad), torch.ones(()), param_out,
        torch.zeros(()),
    )  # fmt: skip
    at = AdamWStep(
        3, 1e-3, 0.9, 0.999, 1e-8, 0.1, decoupled=first == 0, bias_correction=True, seed=seed, first_element=first
    )
    launch_adamw_8bit_(tensors, at)


BUILDS = {
    "bf16": Build(lambda: call(8192, torch.bfloat16, torch.bfloat16)),
    "bf16, odd, stochastic": Build(lambda: call(50257, torch.bfloat16, torch.bfloat16, seed=2**40)),
    "fp16, odd, inside a block, Adam": Build(lambda: call(50257, torch.float16, torch.float16, first=64)),
    "fp32, no copy, odd": Build(lambda: call(50257, torch.float32, None)),
}
