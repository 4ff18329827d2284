"""What the elementwise optimizers share: masters, states, places, state dicts, and the two ways to step.

The state of parameter p (N elements, any shape):

    step                     () fp32 on the CPU, as in torch.optim
    <name>                   shape of p, fp32, for every name in ``STATES``; a subclass may keep them in fewer bytes
    master                   shape of p, fp32; only where p is bf16 or fp16, whose p is then the rounded copy of it

``step`` serves any parameters. ``step_flat_`` serves the engine, which keeps flat fp32 masters of its own, has
gradients in another type, and wants scale, clip, update and the low-precision copy in the same pass. A subclass says
in ``_run_`` which kernel updates one flat run of elements.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from tritonspeed.kernels.multi_tensor import mixed_seed

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Pass:
    """One update of one flat run of elements: what a kernel is given besides the hyperparameters.

    Attributes:
        master: (n,) fp32.
        grad: (n,) fp32, bf16 or fp16.
        state: the parameter's; its tensors have n elements in any shape.
        step: number of this step, from 1.
        grad_scale: one fp32 element multiplied into the gradient, or None.
        param_out: (n,) bf16 or fp16 that receives the rounded weights, or None.
        seed: of stochastic rounding of ``param_out``, another one for every step and place; None rounds to nearest.
        first_element: index of master[0] in the unsharded buffer.
        place: number of that buffer, or of the parameter.
    """

    master: Tensor
    grad: Tensor
    state: dict[str, Any]
    step: int
    grad_scale: Tensor | None
    param_out: Tensor | None
    seed: int | None
    first_element: int
    place: int = 0

    def flat(self, name: str) -> Tensor:
        """A state tensor as (n,)."""
        return self.state[name].view(-1)


class ElementwiseOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose update of one element needs that element and scalars alone.

    A subclass gives ``STATES``, ``_run_`` and its hyperparameters in ``defaults``; those it shares with the others are
    ``lr``, ``weight_decay``, ``stochastic_rounding`` and ``rounding_seed``.
    """

    STATES: ClassVar[tuple[str, ...]] = ()
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of torch's optimizer, or of an older version of this one
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._places = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; each of its values overrides the constructor's.

        Raises:
            ValueError: a coefficient out of range, or a parameter of another type.
        """
        super().add_param_group(param_group)
        group, name = self.param_groups[-1], type(self).__name__
        for key in self.NOT_NEGATIVE:
            if group[key] < 0:
                raise ValueError(f"{name}: {key} is {group[key]}, must not be negative")
        if not all(0 <= beta < 1 for beta in group.get("betas", ())):
            raise ValueError(f"{name}: betas are {group['betas']}, each must be in [0, 1)")
        for param in group["params"]:
            if param.dtype not in (torch.float32, *LOW_PRECISION):
                raise ValueError(
                    f"{name}: a parameter of shape {tuple(param.shape)} is {param.dtype}, must be float32, bfloat16 or"
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
        self._step_params_()
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
        group: dict[str, Any] | None = None,
    ) -> None:
        """Update one flat fp32 master in place.

        Args:
            param: (n,) fp32, contiguous, in ``param_groups``.
            grad: (n,) fp32, bf16 or fp16.
            grad_scale: one fp32 element multiplied into the gradient: 1 / loss scale × clip coefficient.
            param_out: (n,) bf16 or fp16, receives the rounded weights.
            first_element: index of param[0] in the unsharded buffer, a multiple of 4; stochastic rounding follows it.
            place: number of that buffer, which stochastic rounding follows too; None is param's place in the groups.
            group: the hyperparameters; None takes what its group has now.

        Raises:
            ValueError: types or sizes that do not fit, or a param that this optimizer does not hold.
        """
        state = self.state_of(param, first_element)
        self._update_(param, param, grad, state, grad_scale, param_out, first_element, place, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; every state keeps its own type, whatever the parameter's."""
        super().load_state_dict(state_dict)
        # torch casts every state to its parameter's type: 16 bits of it would be lost
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    self.state[param][name] = self._loaded(name, value.to(param.device), param).contiguous()

    def _loaded(self, name: str, value: Tensor, param: Tensor) -> Tensor:
        """A state tensor in the type that it is kept in here."""
        return value.to(torch.float32)

    def _run_(self, group: dict[str, Any], at: Pass) -> None:
        """Update one flat run of elements in place."""
        raise NotImplementedError(f"{type(self).__name__} has no _run_")

    def _new_state(self, group: dict[str, Any], param: Tensor, first_element: int) -> dict[str, Tensor]:
        """What a parameter has before its first step, besides the step count and the master."""
        return {name: torch.zeros(param.shape, dtype=torch.float32, device=param.device) for name in self.STATES}

    def _step_params_(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param_(param, param.grad)

    def _step_param_(self, param: Tensor, grad: Tensor) -> None:
        self._check_dense(param, grad)
        state = self.state_of(param)
        flat_grad = grad.contiguous().view(-1)
        flat = param.detach().reshape(-1)  # a copy where the parameter is not contiguous (channels_last)
        if "master" in state:
            self._update_(param, state["master"].view(-1), flat_grad, state, None, flat, 0)
        else:
            self._update_(param, flat, flat_grad, state, None, None, 0)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))

    def _check_dense(self, param: Tensor, grad: Tensor) -> None:
        if grad.is_sparse:
            raise ValueError(
                f"{type(self).__name__}: the gradient of a parameter of shape {tuple(param.shape)} is sparse: set"
                " sparse=False in its embedding, or give the parameter to torch.optim.SparseAdam"
            )

    def state_of(self, param: Tensor, first_element: int = 0) -> dict[str, Any]:
        """A parameter's state, made where there is none yet.

        Args:
            first_element: of the unsharded buffer, for a flat one.
        """
        state = self.state[param]
        if not state:
            group = self.param_groups[self._place_of(param)[0]]
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state.update(self._new_state(group, param, first_element))
            if param.dtype in LOW_PRECISION:
                state["master"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state

    def kinds(self, group: dict[str, Any], num_elems: int) -> set[str]:
        """Names of the tensors that a parameter of so many elements has, whatever they are kept in."""
        made = self._new_state(group, torch.empty(num_elems, device="meta"), 0)
        return {name.removesuffix("_code").removesuffix("_scale") for name in made}

    def _place_of(self, param: Tensor) -> tuple[int, int]:
        """The parameter's group, and its place among all parameters."""
        if id(param) not in self._places:
            pairs = ((g, id(p)) for g, group in enumerate(self.param_groups) for p in group["params"])
            self._places = {key: (g, place) for place, (g, key) in enumerate(pairs)}
        if id(param) not in self._places:
            raise ValueError(
                f"{type(self).__name__}: a tensor of shape {tuple(param.shape)} is in none of the"
                f" {len(self.param_groups)} param_groups: pass the very tensor that was given to the optimizer"
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
        group: dict[str, Any] | None = None,
    ) -> None:
        g, in_groups = self._place_of(param)
        group = self.param_groups[g] if group is None else group
        state["step"] += 1
        # a tensor without data has no number to give, and its update is not computed: any will do
        step = 1 if isinstance(state["step"], FakeTensor) else int(state["step"].item())
        place = in_groups if place is None else place
        random = group.get("stochastic_rounding") and param_out is not None and param_out.dtype == torch.bfloat16
        seed = mixed_seed(group["rounding_seed"], place, step) if random else None
        self._run_(group, Pass(master, grad, state, step, grad_scale, param_out, seed, first_element, place))
