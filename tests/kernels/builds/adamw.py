"""AdamW: its argument types, with sizes that 16 divides and sizes that it does not."""

from dataclasses import replace

import torch

from builds import Build
from tritonspeed.kernels.adamw import AdamWStep, launch_adamw_

STEP = AdamWStep(3, 1e-3, 0.9, 0.999, 1e-8, 0.1, decoupled=True, bias_correction=True, seed=None, first_element=0)


def call(
    n: int, grad: torch.dtype, out: torch.dtype | None, at: AdamWStep = STEP, state: torch.dtype = torch.float32
) -> None:
    master = torch.empty(n)
    exp_avg, exp_avg_sq = (torch.empty(n, dtype=state) for _ in range(2))
    param_out = None if out is None else torch.empty(n, dtype=out)
    scalars = torch.empty(()), torch.empty(())
    launch_adamw_(master, exp_avg, exp_avg_sq, torch.empty(n, dtype=grad), scalars[0], param_out, scalars[1], at)


BUILDS = {
    "bf16": Build(lambda: call(4096, torch.bfloat16, torch.bfloat16)),
    "bf16, odd": Build(lambda: call(50257, torch.bfloat16, torch.bfloat16)),
    "bf16, stochastic": Build(lambda: call(50257, torch.bfloat16, torch.bfloat16, replace(STEP, seed=2**40))),
    "bf16, bf16 moments": Build(
        lambda: call(50257, torch.bfloat16, torch.bfloat16, replace(STEP, state_seed=2**40), torch.bfloat16)
    ),
    "fp16, Adam": Build(lambda: call(50257, torch.float16, torch.float16, replace(STEP, decoupled=False))),
    "fp32, no copy": Build(lambda: call(50257, torch.float32, None)),
}
