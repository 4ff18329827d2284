"""AdamW as a ``torch.optim.Optimizer``: one fused pass per tensor, masters in fp32, moments in fp32 or in fewer bits.

Its states are ``exp_avg`` and ``exp_avg_sq``; the rest is in ``elementwise.py``.
Source   Loshchilov & Hutter 2019, arXiv:1711.05101; the maths stands in ``kernels/adamw.py``
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from tritonspeed.kernels import adamw_, adamw_8bit_
from tritonspeed.kernels._triton import takes_reference
from tritonspeed.kernels.dynamic_code import BLOCK_ELEMS, MIN_ELEMS, dequantize_state, num_blocks, quantize_state
from tritonspeed.kernels.multi_tensor import mixed_seed
from tritonspeed.optim.elementwise import ElementwiseOptimizer, Pass
from tritonspeed.optim.plan import StepPlan, WatchedState

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.float32}  # 8bit: of small tensors


class AdamW(ElementwiseOptimizer):
    """Fused AdamW, or Adam with L2; a drop-in for ``torch.optim.AdamW``, LR schedulers and state dicts included.

    Args:
        params: fp32, bf16 or fp16 parameters, or groups of them.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``, with its defaults.
        decoupled: False adds weight_decay · p to the gradient: Adam with L2.
        bias_correction: False takes the moments as they are.
        stochastic_rounding: round bf16 copies at random and unbiased instead of to nearest.
        rounding_seed: 0 ≤ seed < 2⁶³. The same on every rank, or replicas of a parameter drift apart.
        state: how the moments are kept. "bf16" halves them: rounded once a step, the second one at random and unbiased,
            by ``rounding_seed`` too. "8bit" quarters them, in blocks of 256 (``kernels/dynamic_code.py``); tensors
            below 4,096 elements stay fp32. Sharded, a tensor is what a rank's slice of a bucket has of one group.
        owns_gradients: on a GPU, keep all gradients in one buffer: ``zero_grad`` clears it instead of setting them to
            None, and a step need not look for them: a sixth of the host's time, by the figures in ``plan.py``.
        capturable: on a GPU, let a CUDA graph hold the step: counts and scalars are worked out on the device, and every
            replay reads ``lr`` where it is a tensor. Wants ``owns_gradients``, and one step before the capture.

    On a GPU ``step`` is one launch for all tensors of a type. It notices parameters, gradients and states that were
    assigned anew, but not ``.data`` of a state tensor.

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
        state: Literal["fp32", "bf16", "8bit"] = "fp32",
        owns_gradients: bool = False,
        capturable: bool = False,
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
            "state": state,
        }
        self._plan: StepPlan | None = None
        if capturable and not owns_gradients:
            raise ValueError("AdamW: capturable is True and owns_gradients False, must be True: gradients would move")
        self.owns_gradients, self.capturable = owns_gradients, capturable
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.owns_gradients = self.capturable = False  # torch pickles groups and states alone
        super().__setstate__(state)
        self._plan = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: set to None, or zeroed where they are the optimizer's own."""
        if self._plan is not None and self.owns_gradients:
            self._plan.zero_grads_()
        else:
            super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.AdamW``, with fp32 states."""
        packed = super().state_dict()
        plain = {key: dict(s) if isinstance(s, WatchedState) else s for key, s in packed["state"].items()}
        return {**packed, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; every state keeps its own type, whatever the parameter's."""
        super().load_state_dict(state_dict)
        self._plan = None

    def _step_params_(self) -> None:
        first = next((param for group in self.param_groups for param in group["params"]), None)
        if first is None or takes_reference(first) or torch.compiler.is_compiling():
            super()._step_params_()
            return
        if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing() and not self.capturable:
            raise ValueError("AdamW: a graph is being captured: pass capturable=True and owns_gradients=True")
        if self._plan is None or not self._plan.still_holds():
            self._plan = StepPlan(self.param_groups, self.state, self.state_of, self.owns_gradients, self.capturable)
            assert self._plan.still_holds(), "a plan that was just made is of this step"
        for param in self._plan.others:
            assert param.grad is not None, "the others of a plan have gradients"
            self._step_param_(param, param.grad)
        self._plan.step_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; each of its values overrides the constructor's.

        Raises:
            ValueError: a coefficient out of range, or a parameter of another type.
        """
        super().add_param_group(param_group)
        if self.param_groups[-1]["state"] not in STATE_DTYPES:
            given = self.param_groups.pop()["state"]
            raise ValueError(f"AdamW: state is {given!r}, must be one of {', '.join(STATE_DTYPES)}")

    def _new_state(self, group: dict[str, Any], param: Tensor, first_element: int) -> dict[str, Tensor]:
        if group["state"] == "8bit" and param.numel() >= MIN_ELEMS:
            made, blocks = {}, num_blocks(first_element, param.numel())
            for name in self.STATES:
                made[f"{name}_code"] = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
                made[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
            return made
        kind = STATE_DTYPES[group["state"]]
        return {name: torch.zeros(param.shape, dtype=kind, device=param.device) for name in self.STATES}

    def state_values(self, param: Tensor, name: str, first_element: int) -> Tensor | None:
        """A flat param's moment: the tensor itself, or the fp32 values that 8 bits stand for; None before a step."""
        state = self.state.get(param, {})
        if f"{name}_code" not in state:
            return state.get(name)
        codes, scales = state[f"{name}_code"], state[f"{name}_scale"]
        return dequantize_state(codes, scales, name == "exp_avg", first_element)

    def set_state_values_(self, param: Tensor, name: str, first_element: int, start: int, values: Tensor) -> None:
        """Set a flat param's moment from its element ``start`` on; in 8 bits, blocks it touches are rounded anew."""
        whole = self.state_values(param, name, first_element)
        assert whole is not None, "only a state that is there is set"
        whole[start : start + values.numel()].copy_(values)
        if f"{name}_code" in self.state[param]:
            shift = first_element % BLOCK_ELEMS
            first, last = (shift + start) // BLOCK_ELEMS, -(-(shift + start + values.numel()) // BLOCK_ELEMS)
            lo, hi = max(0, first * BLOCK_ELEMS - shift), min(whole.numel(), last * BLOCK_ELEMS - shift)
            codes, scales = quantize_state(whole[lo:hi], name == "exp_avg", first_element + lo)
            self.state[param][f"{name}_code"][lo:hi] = codes
            self.state[param][f"{name}_scale"][first:last] = scales

    def _loaded(self, name: str, value: Tensor, param: Tensor) -> Tensor:
        if value.dtype == torch.uint8:
            return value
        group = self.param_groups[self._place_of(param)[0]]
        return value.to(STATE_DTYPES[group["state"]] if name in self.STATES else torch.float32)

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        settings = {
            "step": at.step,
            "lr": float(group["lr"]),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled"],
            "bias_correction": group["bias_correction"],
            "grad_scale": at.grad_scale,
            "param_out": at.param_out,
            "stochastic_rounding_seed": at.seed,
            "first_element": at.first_element,
        }
        if "exp_avg_code" in at.state:
            m, m_scale, v, v_scale = (at.flat(f"{name}_{part}") for name in self.STATES for part in ("code", "scale"))
            adamw_8bit_(at.master, m, m_scale, v, v_scale, at.grad, **settings)
        else:
            m, v = (at.flat(name) for name in self.STATES)
            adamw_(at.master, m, v, at.grad, state_rounding_seed=_state_seed(group, at), **settings)


def _state_seed(group: dict[str, Any], at: Pass) -> int | None:
    if at.state["exp_avg_sq"].dtype == torch.float32:
        return None
    return mixed_seed(group["rounding_seed"], at.place, at.step)
