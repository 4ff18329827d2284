"""What a module shows of parameters that are elsewhere: to readers, to copies, to state dicts.

read        in a forward or backward: the unit is made whole; elsewhere: a placeholder, NaN to readers, no to writers
copy        ``deepcopy``, ``pickle``, ``torch.save(model)`` of a module whose parameters are whole (stages 0-2) give an
            ordinary module without our hooks; of a sharded one, an error that says what to do
state_dict  a sharded parameter appears as a meta tensor: its name, shape and dtype, and no number that could be taken
            for a value. ``ShardedModel.full_state_dict`` gathers the values
load        into whole parameters, masters included; into sharded ones, an error that says what to do

[Note: reading a parameter from elsewhere] A fused head reads ``lm_head.weight`` without calling ``lm_head``. The
modules' ``_parameters`` are dictionaries that make the unit whole on such a read while a forward or backward is under
way, and keep it until that ends. Its backward may come after another one, or after a forward under no_grad, that ended
the hold: so it is made whole again where backward reaches the module that was running when it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed.zero.group import Group, group_of, place_of

GATHER_FIRST = "inside `with ts.zero.GatheredParameters(model.parameters(), modifier_rank=0):`"


class GuardedParameters(dict):
    """A module's ``_parameters``: see [Note: reading a parameter from elsewhere]."""

    __slots__ = ("_groups", "_read")

    def __init__(self, parameters: dict[str, Parameter | None], read: Callable[[Group], None]) -> None:
        super().__init__(parameters)
        self._read = read
        self._groups: dict[str, Group] = {}
        for name, p in parameters.items():
            self._note(name, p)

    def _note(self, name: str, p: Parameter | None) -> None:
        group = None if p is None else group_of(p)
        if group is not None and group.frees:
            self._groups[name] = group
        else:
            self._groups.pop(name, None)

    def __getitem__(self, name: str) -> Parameter | None:
        group = self._groups.get(name)
        if group is not None and "forward" not in group.holds:  # its own module's forward reads without a detour
            self._read(group)
        return super().__getitem__(name)

    def __setitem__(self, name: str, p: Parameter | None) -> None:
        super().__setitem__(name, p)
        self._note(name, p)  # another parameter, of another unit, under the old name: tied weights

    def __reduce__(self) -> tuple[Any, ...]:
        away = [name for name, group in self._groups.items() if not group.is_whole]
        if away:
            raise ValueError(
                f"a module whose parameters ({', '.join(away)}) are sharded over the ranks cannot be copied or pickled:"
                f" do it before it is sharded, or {GATHER_FIRST}, or save engine.module_state_dict()"
            )
        return dict, (dict(dict.items(self)),)


class ModuleHook:
    """One of our hooks on a module. Copied or pickled with its module, it becomes one that does nothing."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args) if self._call is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, ()


def _away(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> Iterator[tuple[str, Parameter]]:
    """(key, parameter) of the module's own sharded parameters that ``state_dict`` has."""
    for name, p in dict.items(module._parameters):
        group = None if p is None else group_of(p)
        if p is not None and group is not None and not group.is_whole and prefix + name in state_dict:
            yield prefix + name, p


def hide_sharded(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """After ``state_dict()``: meta tensors in place of placeholders; a parameter itself (``keep_vars``) is left."""
    for key, p in _away(module, state_dict, prefix):
        if state_dict[key] is not p:
            state_dict[key] = torch.empty(p.shape, dtype=p.dtype, device="meta")


def refuse_sharded(module: nn.Module, state_dict: dict[str, Any], prefix: str, local: dict[str, Any], *_: Any) -> None:
    """Before ``load_state_dict()``: values have nowhere to go while the parameters are sharded.

    Raises:
        ValueError: for a sharded parameter; or with ``assign=True``, which would replace parameters that we manage.
    """
    away = [key for key, _ in _away(module, state_dict, prefix)]
    if away:
        raise ValueError(
            f"'{away[0]}' is sharded over the ranks and cannot be loaded into as it is: load {GATHER_FIRST}"
        )
    if local.get("assign_to_params_buffers") and any(
        p is not None and group_of(p) for p in dict.values(module._parameters)
    ):
        raise ValueError("load_state_dict(assign=True) would replace parameters that ZeRO manages: leave assign out")


def keep_loaded(module: nn.Module, _: Any) -> None:
    """After ``load_state_dict()``, which all ranks call with the same values: masters take what was loaded."""
    for p in dict.values(module._parameters):
        if p is not None and group_of(p) is not None:
            _, bucket, index = place_of(p)
            bucket.take_back([index])
