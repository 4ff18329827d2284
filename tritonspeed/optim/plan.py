"""A step of AdamW over all of its tensors in one launch per set of types: what must be known, and whether it still is.

Collecting a thousand tensors is what such a step costs (the launch is one), so a plan keeps the tables and looks each
time only at what may have moved without a word: parameters (``p.data = ...``) and gradients, by their addresses.
States are dicts that notice an assignment, and a sixteenth of them is looked at each time. The step counts stand in one
tensor, of which ``state["step"]`` are views, so that one addition counts for all.

1,000 fp32 tensors, µs of an AMD EPYC core: 48 to read ``.grad`` (400 where autograd made it anew), 39 to ask whether it
is contiguous, 46 for the gradients' addresses and 46 for the parameters', 32 to tell autograd that they were written,
40 for all the rest. Where gradients are the optimizer's own, parameters and gradients are looked at in turns, too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from tritonspeed.kernels.adamw import AdamWStep
from tritonspeed.kernels.multi_tensor import STEP_WORD, MultiTensorAdamW, TensorColumns, addresses_of

ALIGN_ELEMS = 64  # own gradients start at such multiples: 128 bytes in 16 bits
NUM_TURNS = 16  # steps until everything that is looked at in turns has been
_grad_of = attrgetter("grad")
FLAGS = ("decoupled", "stochastic_rounding")
KEPT = ("exp_avg", "exp_avg_sq", "master")


class Watch:
    """Whether any of a plan's states was assigned to; then the plan's hold on all of them is let go."""

    def __init__(self) -> None:
        self.changed = False
        self.turns: list[_Turns] = []

    def change(self) -> None:
        """A state was assigned to."""
        self.changed = True
        self.turns.clear()


class _Turns:
    """Tensors that are looked at by turns: the first one always, each of the others every sixteenth time."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.parts = [tensors[:1] + tensors[turn::NUM_TURNS] for turn in range(NUM_TURNS)]
        self._addresses = [addresses_of(part) for part in self.parts]
        self.turn = 0

    def look(self) -> tuple[bool, bool]:
        """Whether the first one is where it was, and whether all of those are whose turn it is."""
        self.turn = (self.turn + 1) % NUM_TURNS
        now, then = addresses_of(self.parts[self.turn]), self._addresses[self.turn]
        return bool(now[0] == then[0]), np.array_equal(now, then)


class WatchedState(dict):  # type: ignore[type-arg]
    """One parameter's state; assigning to it tells the plan that its addresses may be old."""

    def __init__(self, state: dict[str, Any], watch: Watch) -> None:
        super().__init__(state)
        self.watch = watch

    def __setitem__(self, name: str, value: Any) -> None:
        self.watch.change()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.watch.change()
        super().__delitem__(name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict."""
        self.watch.change()
        super().update(*args, **kwargs)

    def pop(self, *args: Any) -> Any:
        """As of a dict."""
        self.watch.change()
        return super().pop(*args)

    def clear(self) -> None:
        """As of a dict."""
        self.watch.change()
        super().clear()


@dataclass(slots=True)
class _Row:
    """Tensors of one group that have taken the same number of steps."""

    group: dict[str, Any]
    step: int

    def coefficients(self) -> AdamWStep:
        group = self.group
        beta1, beta2 = group["betas"]
        return AdamWStep(
            self.step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], group["decoupled"],
            group["bias_correction"], seed=None, first_element=0,
        )  # fmt: skip


class _DeviceRows:
    """The rows of a table worked out on the device, from step counts and learning rates that are there.

    What is a plain number is read once; a learning rate that a graph's replays should follow is a tensor.
    """

    def __init__(self, rows: list[_Row], steps: Tensor, where: Tensor, kernel: MultiTensorAdamW) -> None:
        self.rows, self.steps, self.where, self.kernel = rows, steps, where, kernel
        fixed = [
            (*row.group["betas"], row.group["eps"], row.group["weight_decay"], float(row.group["bias_correction"]))
            for row in rows
        ]
        self.fixed = torch.tensor(fixed, dtype=torch.float64, device=steps.device).unbind(1)
        self.lrs = [torch.as_tensor(row.group["lr"], dtype=torch.float64, device=steps.device) for row in rows]
        for number, row in enumerate(rows):
            kernel.set_seed(number, row.group["rounding_seed"])
        kernel.upload_()

    def refresh_(self) -> None:
        """Write this step's rows."""
        beta1, beta2, eps, weight_decay, corrects = self.fixed
        step = self.steps[self.where].double()
        given = [row.group["lr"] for row in self.rows]
        lr = torch.stack([x.double() if isinstance(x, Tensor) else y for x, y in zip(given, self.lrs, strict=True)])
        c1, c2 = 1 - corrects * beta1**step, 1 - corrects * beta2**step
        columns = (
            beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, lr * weight_decay, lr / c1, 1 / c2.sqrt(),
        )  # fmt: skip
        numbers, coefficients = self.kernel.rows_on_device
        coefficients[:, : len(columns)] = torch.stack(columns, dim=1)
        numbers[:, STEP_WORD] = step.long()


class _Table:
    """The tensors of one set of types, and where they were when it was made."""

    def __init__(self, members: list[tuple[Tensor, dict[str, Any], dict[str, Any], int]], owns: bool) -> None:
        self.params = [param for param, _, _, _ in members]
        states = [state for _, _, state, _ in members]
        group = members[0][1]
        self.rows: list[_Row] = []
        numbers: dict[tuple[int, int], int] = {}
        row_of = []
        for _, own_group, state, _ in members:
            step = int(state["step"].item())
            number = numbers.setdefault((id(own_group), step), len(self.rows))
            if number == len(self.rows):
                self.rows.append(_Row(own_group, step))
            row_of.append(number)
        masters = [state.get("master", param) for param, _, state, _ in members]
        outs = self.params if "master" in states[0] else None
        columns = TensorColumns(
            masters, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], outs, row_of,
            [place for _, _, _, place in members],
        )  # fmt: skip
        random = group["stochastic_rounding"] and outs is not None and outs[0].dtype == torch.bfloat16
        self.kernel = MultiTensorAdamW(columns, self.params[0].dtype, group["decoupled"], random)
        self.addresses = addresses_of(self.params)
        self.grad_addresses = np.zeros(0, dtype=np.int64)
        self.grads: list[Tensor] = []
        self.flat_grad: Tensor | None = None
        self._own: tuple[_Turns, list[list[Tensor]]] | None = None
        self._first_of_row = [row_of.index(number) for number in range(len(self.rows))]
        self._device_rows: _DeviceRows | None = None
        if owns:
            self._own_grads()

    def use_device_rows(self, steps: Tensor) -> None:
        """Work out the scalars of a step on the device, from the tensors' step counts there."""
        where = torch.tensor(self._first_of_row, device=steps.device)
        self._device_rows = _DeviceRows(self.rows, steps, where, self.kernel)

    def _own_grads(self) -> None:
        """Move the gradients into one buffer."""
        ends = np.cumsum([-(-param.numel() // ALIGN_ELEMS) * ALIGN_ELEMS for param in self.params])
        self.flat_grad = torch.zeros(int(ends[-1]), dtype=self.params[0].dtype, device=self.params[0].device)
        for param, start in zip(self.params, (0, *ends[:-1]), strict=True):
            own = self.flat_grad[start : start + param.numel()].view(param.shape)
            assert param.grad is not None, "members of a table have gradients"
            param.grad = own.copy_(param.grad)
            self.grads.append(own)
        self.grad_addresses = addresses_of(self.grads)
        self.kernel.set_grads(self.grad_addresses)
        grads = [self.grads[:1] + self.grads[turn::NUM_TURNS] for turn in range(NUM_TURNS)]
        self._own = _Turns(self.params), grads
        self._kept = [param.detach() for param in self.params]  # their memory, until a move is noticed

    def check_own(self) -> None:
        """Look whether parameters and own gradients are where they were.

        Raises:
            ValueError: one is not.
        """
        assert self._own is not None, "only own gradients are looked at in turns"
        turns, grads = self._own
        _, are_there = turns.look()
        if not (are_there and all(map(is_, map(_grad_of, turns.parts[turns.turn]), grads[turns.turn]))):
            raise ValueError(
                "AdamW(owns_gradients=True): a parameter or its gradient is no longer where it was: clear gradients"
                " with optimizer.zero_grad() and not the model's, assign neither, or drop owns_gradients"
            )

    def find_grads(self) -> bool:
        """Look where the gradients are now; False if a parameter has moved or has none, which takes a new plan."""
        grads = list(map(_grad_of, self.params))
        try:
            is_plain = all(map(Tensor.is_contiguous, grads))
            if not is_plain:
                self.grads = grads = [grad.contiguous() for grad in grads]  # copies, kept until they are read
            addresses = addresses_of(grads)
        except (TypeError, RuntimeError):  # a gradient is None, or sparse
            return False
        if not np.array_equal(addresses, self.grad_addresses):
            self.kernel.set_grads(addresses)
            self.grad_addresses = addresses
        return np.array_equal(addresses_of(self.params), self.addresses)

    def update_(self) -> None:
        if self._device_rows is not None:
            self._device_rows.refresh_()
        else:
            for number, row in enumerate(self.rows):
                row.step += 1
                self.kernel.set_row(number, row.coefficients(), row.group["rounding_seed"])
            self.kernel.upload_()
        self.kernel.update_()
        if self.flat_grad is None:
            increment_version(self.params)  # written behind autograd's back
            self.grads = []


class StepPlan:
    """What one step of an optimizer updates, as tables, and what it leaves to be updated tensor by tensor.

    Args:
        groups: the optimizer's ``param_groups``.
        states: parameter → its state, which is replaced by a watched one.
        state_of: makes the state of a parameter that has none.
        owns_gradients: move the gradients into a buffer, where they stay.
        capturable: keep the step counts on the device, and work out there what follows from them.

    Attributes:
        others: parameters with a gradient that no table takes: not contiguous, with moments in 8 bits, or of a Tensor
            class of their own.
    """

    def __init__(
        self, groups: list[dict[str, Any]], states: dict[Tensor, Any], state_of: Any,
        owns_gradients: bool = False, capturable: bool = False,
    ) -> None:  # fmt: skip
        self.groups, self.states, self.watch = groups, states, Watch()
        self.owns_gradients, self.capturable = owns_gradients, capturable
        self._shape = _shape_of(groups, capturable)
        self.others: list[Tensor] = []
        self._idle: list[Tensor] = []
        members: dict[tuple[Any, ...], list[Any]] = {}
        kind = groups[0]["params"][0].device.type
        for place, (group, param) in enumerate(_members(groups)):
            if param.grad is None:
                self._idle.append(param)
            elif param.device.type != kind or not _fits_a_table(param, state_of(param)):
                self.others.append(param)
            else:
                state = states[param] = WatchedState(states[param], self.watch)
                key = (param.device, param.dtype, state["exp_avg"].dtype, *(group[flag] for flag in FLAGS))
                members.setdefault(key, []).append((param, group, state, place))
        self.tables = [_Table(table, owns_gradients) for table in members.values()]
        self._steps = [self._share_steps([state for _, _, state, _ in table]) for table in members.values()]
        self._versions = [steps._version for steps in self._steps]
        for table, steps in zip(self.tables, self._steps, strict=True):
            if capturable:
                table.use_device_rows(steps)
        self._num_states = len(states)
        self.watch.changed = False
        self.watch.turns = [
            _Turns([state[name] for name in KEPT for _, _, state, _ in table if name in state])
            for table in members.values()
        ]

    def _share_steps(self, states: list[WatchedState]) -> Tensor:
        counts = [state["step"].item() for state in states]
        device = states[0]["exp_avg"].device if self.capturable else "cpu"
        steps = torch.tensor(counts, dtype=torch.float32, device=device)
        for state, step in zip(states, steps.unbind(), strict=True):
            state["step"] = step
        return steps

    def still_holds(self) -> bool:
        """Whether the tables are those of this step; finds the gradients."""
        if self.watch.changed or not self._states_are_there():
            return False
        for table in self.tables if self.owns_gradients else ():
            table.check_own()
        return (
            self._versions == [steps._version for steps in self._steps]  # nobody set a step count
            and self._num_states == len(self.states)
            and self._shape == _shape_of(self.groups, self.capturable)
            and all(param.grad is None for param in self._idle)
            and all(param.grad is not None for param in self.others)
            and (self.owns_gradients or all(table.find_grads() for table in self.tables))
        )

    def _states_are_there(self) -> bool:
        for turns in self.watch.turns:
            first_is, all_are = turns.look()
            if not first_is:
                return False  # somebody has moved all of them since the last step
            if not all_are:
                raise ValueError(
                    "AdamW: .data of some states was assigned: assign state[param][name], or .data of all of them"
                )
        return True

    def zero_grads_(self) -> None:
        """Clear the optimizer's own gradients; drop those of ``others``."""
        for table in self.tables:
            assert table.flat_grad is not None, "only own gradients are cleared here"
            table.flat_grad.zero_()
        for param in self.others:
            param.grad = None

    def step_(self) -> None:
        """Update what is in the tables; ``still_holds`` came before."""
        for table, steps in zip(self.tables, self._steps, strict=True):
            steps.add_(1)
            table.update_()
        self._versions = [steps._version for steps in self._steps]


def _members(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    return chain.from_iterable(((group, param) for param in group["params"]) for group in groups)


def _shape_of(groups: list[dict[str, Any]], capturable: bool) -> list[tuple[Any, ...]]:
    """What a plan was made for; with ``capturable`` all numbers too, which it has put on the device."""
    kept = (*FLAGS, *(("betas", "eps", "weight_decay", "bias_correction", "rounding_seed") if capturable else ()))
    lrs = [group["lr"] if capturable and not isinstance(group["lr"], Tensor) else None for group in groups]
    return [
        (id(group), len(group["params"]), lr, *(group[name] for name in kept))
        for group, lr in zip(groups, lrs, strict=True)
    ]


def _fits_a_table(param: Tensor, state: dict[str, Any]) -> bool:
    grad, kept = param.grad, [state[name] for name in KEPT if name in state]
    return (
        type(param) in (Tensor, Parameter)
        and type(grad) is Tensor
        and not grad.is_sparse
        and param.numel() > 0
        and "exp_avg" in state  # not in 8 bits, whose blocks another kernel knows
        and all(t.is_contiguous() and t.device == param.device for t in (param, *kept))
        and all(t.dtype in (torch.float32, torch.bfloat16) and t.numel() == param.numel() for t in kept)
        and state["exp_avg"].dtype == state["exp_avg_sq"].dtype
    )
