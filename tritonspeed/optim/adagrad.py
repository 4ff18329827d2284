"""Adagrad as a ``torch.optim.Optimizer``: one fused pass per tensor, masters and sums in fp32 throughout.

Its state is ``sum``, under torch's name; the rest is in ``elementwise.py``.
Source   Duchi, Hazan & Singer 2011, JMLR 12; the maths stands in ``kernels/adagrad.py``
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels import adagrad_
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass


class Adagrad(ElementwiseOptimizer):
    """Fused Adagrad; a drop-in for ``torch.optim.Adagrad``, but that its state is made in the first step.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in ``torch.optim.Adagrad``, with its defaults.
        stochastic_rounding: round bf16 copies at random and unbiased instead of to nearest.
        rounding_seed: 0 ≤ seed < 2⁶³. The same on every rank, or replicas of a parameter drift apart.

    Raises:
        ValueError: a coefficient out of range, or a parameter of another type.
    """

    STATES = ("sum",)
    NOT_NEGATIVE = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def _new_state(self, group: dict[str, Any], param: Tensor, first_element: int) -> dict[str, Tensor]:
        value = float(group["initial_accumulator_value"])
        return {"sum": torch.full(param.shape, value, dtype=torch.float32, device=param.device)}

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        adagrad_(
            at.master,
            at.flat("sum"),
            at.grad,
            step=at.step,
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=at.grad_scale,
            param_out=at.param_out,
            stochastic_rounding_seed=at.seed,
            first_element=at.first_element,
        )
