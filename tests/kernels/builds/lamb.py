"""LAMB: its argument types. Every chunk has tensors of odd sizes: there is no other path for them."""

import torch

from builds import Build
from tritonspeed.kernels.intervals import Intervals
from tritonspeed.kernels.lamb import launch_lamb_moments_, launch_lamb_step_

INTERVALS = Intervals.of([(0, 50257), (50304, 60001)], torch.device("cpu"))


def call(grad: torch.dtype, out: torch.dtype | None, eps_inside: bool = False) -> None:
    n = 60032
    master, exp_avg, exp_avg_sq = (torch.empty(n) for _ in range(3))
    table, first, bounds = INTERVALS.table, INTERVALS.first, INTERVALS.bounds
    norms = launch_lamb_moments_(
        exp_avg, exp_avg_sq, master, torch.empty(n, dtype=grad), torch.empty(()), table, first, bounds,
        0.9, 0.999, 1e-8, 0.01, eps_inside,
    )  # fmt: skip
    param_out = None if out is None else torch.empty(n, dtype=out)
    launch_lamb_step_(
        master, exp_avg, exp_avg_sq, param_out, norms, table, bounds, 1e-8, 0.01, 1e-3, 0.01, 10.0, eps_inside
    )


BUILDS = {
    # the sums of a tensor's few segments are 8 bytes a lane and need no more
    "bf16": Build(lambda: call(torch.bfloat16, torch.bfloat16), widest_load=8),
    "fp32, no copy": Build(lambda: call(torch.float32, None, eps_inside=True), widest_load=8),
}
