"""LAMB as a ``torch.optim.Optimizer``: each tensor's step is as long as its norm says.

Its states are ``exp_avg`` and ``exp_avg_sq``; the rest is in ``elementwise.py``. The one thing that is not elementwise
are two norms per tensor. So a step has two halves: ``measure_flat_`` updates the moments of a flat chunk and returns
what its elements add to the squared norms; ``step_scaled_`` takes the norms of the whole tensors, and steps.
Source   You et al. 2020, arXiv:1904.00962; the maths stands in ``kernels/lamb.py``
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tritonspeed.kernels.intervals import Intervals
from tritonspeed.kernels.lamb import LambStep, lamb_moments_, lamb_step_
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass


class Lamb(ElementwiseOptimizer):
    """Fused LAMB; parameters, defaults and maths of DeepSpeed's ``FusedLamb``.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, eps: as in Adam.
        bias_correction: scale the step by √(1 − β₂ᵗ) / (1 − β₁ᵗ).
        eps_inside_sqrt: ε is added under the root of the second moment.
        weight_decay: λ · p is part of the direction that is measured.
        max_coeff, min_coeff: bounds on ‖p‖ / ‖direction‖.

    Raises:
        ValueError: a coefficient out of range, or a parameter of another type.

    Example:
        >>> optimizer = Lamb(model.parameters(), lr=2e-3, weight_decay=0.01)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    STATES = ("exp_avg", "exp_avg_sq")
    NOT_NEGATIVE = ("lr", "eps", "weight_decay", "min_coeff")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        self._maps: dict[int, Intervals] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "eps_inside_sqrt": eps_inside_sqrt,
                "weight_decay": weight_decay,
                "max_coeff": max_coeff,
                "min_coeff": min_coeff,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._maps = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; each of its values overrides the constructor's.

        Raises:
            ValueError: a coefficient out of range, or a parameter of another type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["max_coeff"] < group["min_coeff"]:
            raise ValueError(
                f"Lamb: max_coeff is {group['max_coeff']}, less than min_coeff {group['min_coeff']}: swap them"
            )

    @torch.no_grad()
    def measure_flat_(self, param: Tensor, grad: Tensor, grad_scale: Tensor | None, intervals: Intervals) -> Tensor:
        """The first half of a step of one flat fp32 master: its moments.

        Args:
            param: (n,) fp32, in ``param_groups``.
            grad: (n,) fp32, bf16 or fp16.
            grad_scale: one fp32 element multiplied into the gradient, or None.
            intervals: where its T tensors are.

        Returns:
            (T, 2) fp64: what its elements add to ‖p‖² and ‖u‖² of each tensor.
        """
        state = self.state_of(param)
        state["step"] += 1
        return lamb_moments_(
            param, state["exp_avg"], state["exp_avg_sq"], grad, intervals, self._numbers(param), grad_scale
        )

    @torch.no_grad()
    def step_scaled_(self, param: Tensor, norms: Tensor, intervals: Intervals, param_out: Tensor | None) -> None:
        """The second half: the weights, and their rounded copy, by the norms of the whole tensors, (T, 2) fp64."""
        state = self.state[param]
        lamb_step_(param, state["exp_avg"], state["exp_avg_sq"], norms, intervals, self._numbers(param), param_out)

    def _numbers(self, param: Tensor) -> LambStep:
        group, step = self.param_groups[self._place_of(param)[0]], self.state[param]["step"]
        return _numbers_of(group, 1 if isinstance(step, FakeTensor) else int(step.item()))

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        numel, numbers = at.master.numel(), _numbers_of(group, at.step)
        moments = at.flat("exp_avg"), at.flat("exp_avg_sq")
        whole = self._maps.get(numel)
        if whole is None or whole.table.device != at.master.device:
            whole = self._maps[numel] = Intervals.of([(0, numel)], at.master.device)
        norms = lamb_moments_(at.master, *moments, at.grad, whole, numbers, at.grad_scale)
        lamb_step_(at.master, *moments, norms, whole, numbers, at.param_out)


def _numbers_of(group: dict[str, Any], step: int) -> LambStep:
    beta1, beta2 = group["betas"]
    return LambStep(
        step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], group["bias_correction"],
        group["eps_inside_sqrt"], group["min_coeff"], group["max_coeff"],
    )  # fmt: skip
