"""Lion: its argument types, with a size that 16 does not divide."""

import torch

from builds import Build
from tritonspeed.kernels.flat_update import FlatTensors
from tritonspeed.kernels.lion import LionStep, launch_lion_


def call(n: int, grad: torch.dtype, out: torch.dtype | None, seed: int | None = None) -> None:
    param_out = None if out is None else torch.empty(n, dtype=out)
    tensors = FlatTensors(
        torch.empty(n), (torch.empty(n),), torch.empty(n, dtype=grad), torch.ones(()), param_out, torch.zeros(())
    )
    launch_lion_(tensors, LionStep(1e-4, 0.9, 0.99, 0.1, seed, 0))


BUILDS = {
    "bf16": Build(lambda: call(4096, torch.bfloat16, torch.bfloat16)),
    "bf16, odd, stochastic": Build(lambda: call(50257, torch.bfloat16, torch.bfloat16, seed=2**40)),
    "fp16, odd": Build(lambda: call(50257, torch.float16, torch.float16)),
    "fp32, no copy, odd": Build(lambda: call(50257, torch.float32, None)),
}
