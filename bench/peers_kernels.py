"""Kernels of other packages for our cases, by (operation, direction): torch's fused ones, Liger, DeepSpeed, ..."""

from collections.abc import Callable
from typing import Any

import torch

from tritonspeed.tuning.case import Inputs

Prepare = Callable[[Inputs], Callable[[], Any]]


def _torch_fused_adamw(inputs: Inputs) -> Callable[[], Any]:
    """The same work: gradient widened, fused update, copy written."""
    step = torch.tensor(10.0, device=inputs["master"].device)

    def call() -> None:
        torch._fused_adamw_(
            [inputs["master"]], [inputs["grad"].float()], [inputs["exp_avg"]], [inputs["exp_avg_sq"]], [], [step],
            lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        if inputs["param_out"] is not None:
            inputs["param_out"].copy_(inputs["master"])

    return call


PEERS: dict[tuple[str, str], dict[str, Prepare]] = {
    ("adamw_", "forward"): {"torch fused": _torch_fused_adamw},
    ("sum_of_squares", "forward"): {
        "torch vector_norm": lambda inputs: lambda: torch.linalg.vector_norm(inputs["x"], dtype=torch.float32)
    },
}
