"""DeepSpeed's stage 0: one file with everything, in which the optimizer's states have numbers and no names.

Which parameter a state is of follows from what else there is:

    masters beside 16-bit weights     the parameter whose weights are the rounded master
    torch's named parameters          said
    neither                           the shape, where all states of that shape are of one group of settings and there
                                      are as many parameters of it: both are in the model's order then

Where it does not follow, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.deepspeed.facts import ModelState, scalars_in, settings_of, tensors_in
from tritonspeed.checkpoint.deepspeed.layout import Place, items
from tritonspeed.checkpoint.deepspeed.values import Held, whole
from tritonspeed.checkpoint.errors import MismatchedCheckpoint
from tritonspeed.checkpoint.record import MASTER

Check = Callable[[Tensor], Tensor]
_REMEDY = "save with ZeRO stage 1 there, which says it, or take the weights alone"


@dataclass
class Unsharded:
    """Of the trained parameters, by name.

    Attributes:
        check: of the file's tensors.
        held: kind → where.
        numbers: the optimizer's.
        groups: its settings, with names.
    """

    check: Check
    held: dict[str, dict[str, Held]] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def read_unsharded(model: ModelState, said: Any, check: Check) -> Unsharded:
    """States and masters of stage 0.

    Args:
        said: what the model's file has under "optimizer".
        check: of the file's tensors.

    Raises:
        ValueError: it is no optimizer's state.
        MismatchedCheckpoint: it does not say which state is of which parameter.
    """
    base = said.get("optimizer_state_dict", said)
    state, groups = dict(items(base["state"])), base["param_groups"]
    found = Unsharded(check)
    if "fp32_groups_flat" in said:
        members = _read_flats(model, said["fp32_groups_flat"], state, found)
    elif "fp32_groups" in said:
        members = _read_masters(model, said["fp32_groups"], state, found)
    else:
        members = _read_named(model, state, groups, found)
    _agree_on_steps(members, groups, found)
    found.groups = settings_of(groups, members)
    return found


def _read_flats(model: ModelState, flats: list[Tensor], state: dict[Any, Any], found: Unsharded) -> list[list[str]]:
    """Masters one after the other, found out by the weights that they round to."""
    left = dict(model.weights)
    members: list[list[str]] = []
    for i, flat in enumerate(flats):
        tensors, numbers = tensors_in(state.get(i, {}), (flat.numel(),)), scalars_in(state.get(i, {}))
        offset, names = 0, []
        while offset < flat.numel():
            name = _rounds_to(flat[offset:], left)
            weight = left.pop(name)
            place = Place(0, weight.numel(), weight.numel(), after=offset)
            found.held[name] = {
                kind: (place, lambda rank, v=value: found.check(v).reshape(-1))
                for kind, value in {MASTER: flat, **tensors}.items()
            }
            found.numbers[name] = numbers
            names.append(name)
            offset += weight.numel()
        members.append(names)
    return members


def _rounds_to(values: Tensor, left: dict[str, Tensor]) -> str:
    """The first parameter in the model's order whose weights these values begin with, rounded."""
    for name, weight in left.items():
        numel = weight.numel()
        if 0 < numel <= values.numel() and torch.equal(values[:numel].to(weight.dtype), weight.reshape(-1)):
            return name
    raise MismatchedCheckpoint(f"no parameter's weights are what the optimizer's masters round to: {_REMEDY}")


def _read_masters(
    model: ModelState, masters: list[list[Tensor]], state: dict[Any, Any], found: Unsharded
) -> list[list[str]]:
    """The same of masters in tensors of their own."""
    left = dict(model.weights)
    members: list[list[str]] = []
    index = 0
    for group in masters:
        names = []
        for master in group:
            same = {n: w for n, w in left.items() if w.shape == master.shape}
            name = _rounds_to(master.reshape(-1), same)
            left.pop(name)
            _put(found, name, master, state.get(index, {}))
            names.append(name)
            index += 1
        members.append(names)
    return members


def _read_named(
    model: ModelState, state: dict[Any, Any], groups: list[dict[str, Any]], found: Unsharded
) -> list[list[str]]:
    """torch's own optimizer over fp32 parameters, which are the masters."""
    named = [group.get("param_names") for group in groups]
    if all(isinstance(names, list) for names in named):
        by_index = {i: n for group in groups for i, n in zip(group["params"], group["param_names"], strict=True)}
    else:
        by_index = _by_shape(model, state, groups)
    for index, name in by_index.items():
        _put(found, name, model.weights[name], state.get(index, {}))
    return [[by_index[i] for i in group["params"]] for group in groups]


def _by_shape(model: ModelState, state: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[int, str]:
    """A state's number → the parameter's name."""
    numbered = [(i, group_index) for group_index, group in enumerate(groups) for i in group["params"]]
    if len(groups) == 1 and len(numbered) == len(model.weights):
        return {i: name for (i, _), name in zip(numbered, model.weights, strict=True)}
    slots: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, group_index in numbered:
        shapes = {tuple(v.shape) for v in dict(items(state.get(i, {}))).values() if isinstance(v, Tensor) and v.dim()}
        if len(shapes) != 1:
            raise MismatchedCheckpoint(f"state {i} of the optimizer does not say which parameter it is of: {_REMEDY}")
        slots.setdefault(shapes.pop(), []).append((i, group_index))
    found = {}
    for shape, members in slots.items():
        names = [name for name, weight in model.weights.items() if tuple(weight.shape) == shape]
        if len(names) != len(members) or len({group_index for _, group_index in members}) != 1:
            raise MismatchedCheckpoint(
                f"it has {len(members)} states of shape {shape} and {len(names)} such parameters, in "
                f"{len({g for _, g in members})} groups, and does not say which is of which: {_REMEDY}"
            )
        found |= {i: name for (i, _), name in zip(members, names, strict=True)}
    return found


def _put(found: Unsharded, name: str, master: Tensor, state: Any) -> None:
    tensors = tensors_in(state, (master.numel(),))
    found.held[name] = {kind: whole(value, found.check) for kind, value in {MASTER: master, **tensors}.items()}
    found.numbers[name] = scalars_in(state)


def _agree_on_steps(members: Sequence[Sequence[str]], groups: list[dict[str, Any]], found: Unsharded) -> None:
    """FusedAdam counts in the last state of a group alone: the others stay at 0, and all have stepped as often."""
    for names, group in zip(members, groups, strict=False):
        if "bias_correction" in group:
            steps = [found.numbers[n]["step"] for n in names if "step" in found.numbers[n]]
            for name in names:
                if "step" in found.numbers[name]:
                    found.numbers[name] = {**found.numbers[name], "step": max(steps)}
