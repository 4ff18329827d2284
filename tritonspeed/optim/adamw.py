"""AdamW as a ``torch.optim.Optimizer``: one fused pass per tensor, masters and moments in fp32 throughout.

The state of parameter p (N elements, any shape):

    step                     () fp32 on the CPU, as in torch.optim
    exp_avg, exp_avg_sq      shape of p, fp32
    master                   shape of p, fp32; only where p is bf16 or fp16, whose p is then the rounded copy of it

``step`` serves any parameters. ``step_flat_`` serves the engine, which keeps flat fp32 masters of its own, has
gradients in another type, and wants scale, clip, update and the low-precision copy in the same pass.
Source   Loshchilov & Hutter 2019, arXiv:1711.05101; the maths stands in ``kernels/adamw.py``
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from tritonspeed.kernels import adamw_

LOW_PRECISION = (torch.bfloat16, torch.float16)


class AdamW(Optimizer):
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
        self._places: dict[int, tuple[int, int]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; each of its values overrides the constructor's.

        Raises:
            ValueError: a coefficient out of range, or a parameter of another type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if group[name] < 0:
                raise ValueError(f"AdamW: {name} is {group[name]}, must not be negative")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas are {group['betas']}, each must be in [0, 1)")
        for param in group["params"]:
            if param.dtype not in (torch.float32, *LOW_PRECISION):
                raise ValueError(
                    f"AdamW: a parameter of shape {tuple(param.shape)} is {param.dtype}, must be float32, bfloat16 or"
                    " float16: convert the model, or leave this parameter to torch.optim"
                )
        self._places = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param_(param, param.grad)
        return loss

    @torch.no_grad()
    def step_flat_(
        self,
        param: Tensor,
        grad: Tensor,
        grad_scale: Tensor | None = None,
        param_out: Tensor | None = None,
        first_element: int = 0,
        place: int | None = None,
    ) -> None:
        """Update one flat fp32 master in place, with its group's current hyperparameters.

        Args:
            param: (n,) fp32, contiguous, in ``param_groups``.
            grad: (n,) fp32, bf16 or fp16.
            grad_scale: one fp32 element multiplied into the gradient: 1 / loss scale × clip coefficient.
            param_out: (n,) bf16 or fp16, receives the rounded weights.
            first_element: index of param[0] in the unsharded buffer, a multiple of 4; stochastic rounding follows it.
            place: number of that buffer, which stochastic rounding follows too; None is param's place in the groups.

        Raises:
            ValueError: types or sizes that do not fit, or a param that this optimizer does not hold.
        """
        state = self._state_of(param)
        self._update_(param, param, grad, state, grad_scale, param_out, first_element, place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; masters and moments stay fp32."""
        super().load_state_dict(state_dict)
        # torch casts every state to its parameter's type: 16 bits of it would be lost
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step":
                    self.state[param][name] = value.to(device=param.device, dtype=torch.float32)

    def _step_param_(self, param: Tensor, grad: Tensor) -> None:
        if grad.is_sparse:
            raise ValueError(
                f"AdamW: the gradient of a parameter of shape {tuple(param.shape)} is sparse: set sparse=False in its"
                " embedding, or give the parameter to torch.optim.SparseAdam"
            )
        state = self._state_of(param)
        flat_grad = grad.contiguous().view(-1)
        flat = param.detach().reshape(-1)  # a copy where the parameter is not contiguous (channels_last)
        if "master" in state:
            self._update_(param, state["master"].view(-1), flat_grad, state, None, flat, 0)
        else:
            self._update_(param, flat, flat_grad, state, None, None, 0)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            if param.dtype in LOW_PRECISION:
                state["master"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state

    def _place_of(self, param: Tensor) -> tuple[int, int]:
        """The parameter's group, and its place among all parameters."""
        if id(param) not in self._places:
            pairs = ((g, id(p)) for g, group in enumerate(self.param_groups) for p in group["params"])
            self._places = {key: (g, place) for place, (g, key) in enumerate(pairs)}
        if id(param) not in self._places:
            raise ValueError(
                f"AdamW: a tensor of shape {tuple(param.shape)} is in none of the {len(self.param_groups)}"
                " param_groups: pass the very tensor that was given to the optimizer"
            )
        return self._places[id(param)]

    def _update_(
        self,
        param: Tensor,
        master: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        grad_scale: Tensor | None,
        param_out: Tensor | None,
        first_element: int,
        place: int | None = None,
    ) -> None:
        g, in_groups = self._place_of(param)
        group = self.param_groups[g]
        state["step"] += 1
        # a tensor without data has no number to give, and its update is not computed: any will do
        step = 1 if isinstance(state["step"], FakeTensor) else int(state["step"].item())
        place = in_groups if place is None else place
        random = group["stochastic_rounding"] and param_out is not None and param_out.dtype == torch.bfloat16
        adamw_(
            master,
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            grad,
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled"],
            bias_correction=group["bias_correction"],
            grad_scale=grad_scale,
            param_out=param_out,
            stochastic_rounding_seed=_mixed(group["rounding_seed"], place, step) if random else None,
            first_element=first_element,
        )


def _mixed(seed: int, place: int, step: int) -> int:
    """One 63-bit seed per parameter and step: neighbouring ones share no bits (the finaliser of MurmurHash3)."""
    x = (seed + place * 0x9E3779B97F4A7C15 + (step << 32)) & 0xFFFFFFFFFFFFFFFF
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = ((x ^ (x >> 33)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 33)) >> 1
