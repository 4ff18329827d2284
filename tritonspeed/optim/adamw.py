"""AdamW as a ``torch.optim.Optimizer``: one fused pass per tensor, masters and moments in fp32 throughout.

Its states are ``exp_avg`` and ``exp_avg_sq``; the rest is in ``elementwise.py``.
Source   Loshchilov & Hutter 2019, arXiv:1711.05101; the maths stands in ``kernels/adamw.py``
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tritonspeed.kernels import adamw_
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass


class AdamW(ElementwiseOptimizer):
    """Fused AdamW, or Adam with L2; a drop-in for ``torch.optim.AdamW``, LR schedulers and state dicts included.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``, with its defaults.
        decoupled: False adds weight_decay · p to the gradient: Adam with L2.
        bias_correction: False takes the moments as they are.
        stochastic_rounding: round bf16 copies at random and unbiased instead of to nearest.
        rounding_seed: 0 ≤ seed < 2⁶³. The same on every rank, or replicas of a parameter drift apart.

    Raises:
        ValueError: a coefficient out of range, or a parameter of another type.

    Example:
        >>> optimizer = AdamW(model.parameters(), lr=3e-4)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    STATES = ("exp_avg", "exp_avg_sq")
    NOT_NEGATIVE = ("lr", "eps", "weight_decay")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled: bool = True,
        bias_correction: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "bias_correction": bias_correction,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        adamw_(
            at.master,
            at.flat("exp_avg"),
            at.flat("exp_avg_sq"),
            at.grad,
            step=at.step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled"],
            bias_correction=group["bias_correction"],
            grad_scale=at.grad_scale,
            param_out=at.param_out,
            stochastic_rounding_seed=at.seed,
            first_element=at.first_element,
        )
