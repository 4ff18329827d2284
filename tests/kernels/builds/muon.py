"""Muon's elementwise halves: their types, at a size that 16 does not divide."""

import torch

from builds import Build
from tritonspeed.kernels.muon import launch_muon_direction_, launch_muon_step_


def call(grad: torch.dtype, matrix: torch.dtype, out: torch.dtype | None) -> None:
    n = 50257
    launch_muon_direction_(
        torch.empty(n), torch.empty(n, dtype=grad), torch.empty(n, dtype=matrix), torch.empty(()), 0.95, True
    )
    param_out = None if out is None else torch.empty(n, dtype=out)
    launch_muon_step_(torch.empty(n), torch.empty(n, dtype=matrix), param_out, 1e-3, 1e-2)


BUILDS = {
    "bf16": Build(lambda: call(torch.bfloat16, torch.bfloat16, torch.bfloat16)),
    "fp32, no copy": Build(lambda: call(torch.float32, torch.float32, None)),
}
