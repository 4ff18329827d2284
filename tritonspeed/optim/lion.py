"""Lion as a ``torch.optim.Optimizer``: one fused pass per tensor, masters and momentum in fp32 throughout.

Its state is ``exp_avg``; the rest is in ``elementwise.py``.
Source   Chen et al. 2023, arXiv:2302.06675; the maths stands in ``kernels/lion.py``
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tritonspeed.kernels import lion_
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass


class Lion(ElementwiseOptimizer):
    """Fused Lion: the sign of a mixed momentum, with decoupled weight decay. Half of AdamW's state.

    Every element moves by lr, so that lr is a third to a tenth of AdamW's, and weight_decay as many times larger.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, weight_decay: the paper's defaults. By name in a config, lr is DeepSpeed's 1e-3.
        stochastic_rounding: round bf16 copies at random and unbiased instead of to nearest.
        rounding_seed: 0 ≤ seed < 2⁶³. The same on every rank, or replicas of a parameter drift apart.

    Raises:
        ValueError: a coefficient out of range, or a parameter of another type.
    """

    STATES = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        lion_(
            at.master,
            at.flat("exp_avg"),
            at.grad,
            lr=float(group["lr"]),
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            grad_scale=at.grad_scale,
            param_out=at.param_out,
            stochastic_rounding_seed=at.seed,
            first_element=at.first_element,
        )
