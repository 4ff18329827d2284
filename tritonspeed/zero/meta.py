"""Models on the meta device: shapes without memory until each unit is made, one at a time, when the model is sharded.

    files        the values that ``load_safetensors`` was given
    otherwise    ``reset_parameters()`` of the module that owns the parameter,
                 then the function that ``apply_later`` was given, as ``model.apply(function)`` would call it

[Note: values that are lost] What a constructor writes (``nn.init``, ``self.apply(init_weights)``) is lost on the meta
device, and ``reset_parameters`` would put other values in its place without a word. Each write counts up a tensor's
version: where the meta tensor has seen more writes than ``reset_parameters`` makes, there was another writer, and that
is an error. Writes through ``.data`` are not counted; a method ``_init_weights``, by which GPT-style models are usually
initialised, tells of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import getweakrefs

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed.zero.group import group_of
from tritonspeed.zero.load import remembered_for

M = TypeVar("M", bound=nn.Module)
_LATER = "_tritonspeed_later"
_REMEDY = (
    "say what initialises it with ts.zero.apply_later(model, init_weights), where its values are with"
    " ts.zero.load_safetensors(model, path), or build the model under ts.zero.Init() instead"
)


@dataclass(frozen=True)
class _Later:
    function: Callable[[nn.Module], Any]


def apply_later(model: M, function: Callable[[nn.Module], Any]) -> M:
    """``model.apply(function)`` for a model on the meta device, carried out as its parameters get memory.

    A constructor's ``self.apply(init_weights)`` writes to the meta device in vain: it is to be said again here. Modules
    get their ``reset_parameters()`` first, where they have one, then ``function``, children before parents: modules
    that own parameters, and those with everything below them in one unit (a block, not the whole model). Values that
    ``load_safetensors`` has found win over both.

    Returns:
        The model.

    Example:
        >>> with torch.device("meta"):
        ...     model = GPT(config)
        >>> ts.zero.apply_later(model, model._init_weights)
    """
    model.__dict__[_LATER] = _Later(function)
    return model


@torch.no_grad()
def materialise(model: nn.Module, parameters: list[Parameter], reads: bool = True) -> None:
    """Give parameters on the meta device memory and values, identity kept. See the module's docstring.

    Args:
        model: where the modules that own them are found.
        parameters: one unit's; the rest of an owning module's own parameters come along.
        reads: False leaves what is in files unread, on ranks that are sent rank 0's values anyway.

    Raises:
        ValueError: nobody says what the values are; or somebody did, and they are lost ([Note: values that are lost]).
    """
    for module in model.modules():  # a table of positions, say: the units of parameters do not lead to it
        if not _own(module):
            _make_buffers(model, module, reads)
    wanted = {id(p) for p in parameters if p.device.type == "meta"}
    if not wanted:
        return
    owners = [m for m in model.modules() if any(id(p) in wanted for p in _own(m))]
    calls = _calls(model)
    made = [p for owner in owners for p in _make(model, owner, bool(calls), reads)]
    fresh = {id(p) for p in made}
    for module, function in calls:
        if module in owners or _is_ready(module, fresh):
            function(module)
    for p in made:
        remembered = remembered_for(model, p)
        if remembered is not None:
            remembered.read(p, p if reads else None)
        elif p.is_floating_point() and p.isnan().any():
            owner, name = next((m, n) for m in owners for n, q in dict.items(m._parameters) if q is p)
            raise ValueError(f"nothing has written {name!r} of {type(owner).__name__}: {_REMEDY}")


def _own(module: nn.Module) -> list[Parameter]:
    return [p for p in dict.values(module._parameters) if p is not None]


def _calls(model: nn.Module) -> list[tuple[nn.Module, Callable[[nn.Module], Any]]]:
    """What ``apply_later`` has asked for: (module, function), children first."""
    found: dict[nn.Module, Callable[[nn.Module], Any]] = {}
    for module in model.modules():
        later = module.__dict__.get(_LATER)
        if later is not None:
            children_first: list[nn.Module] = []
            module.apply(children_first.append)
            found |= {m: later.function for m in children_first if m not in found}
    return list(found.items())


def _is_ready(module: nn.Module, fresh: set[int]) -> bool:
    """Whether everything below ``module`` has memory, some of it only now, and nobody has sharded it yet."""
    below = [p for m in module.modules() for p in _own(m)]
    return any(id(p) in fresh for p in below) and all(p.device.type != "meta" and group_of(p) is None for p in below)


def _make(model: nn.Module, owner: nn.Module, has_calls: bool, reads: bool) -> list[Parameter]:
    """Memory for the owner's parameters and buffers, and what its ``reset_parameters`` writes; NaN where it is none."""
    fresh = {n: p for n, p in dict.items(owner._parameters) if p is not None and p.device.type == "meta"}
    if not fresh:
        return []  # a head tied to an embedding that has come before
    unknown = [name for name, p in fresh.items() if remembered_for(model, p) is None]
    reset = getattr(owner, "reset_parameters", None)
    if unknown and reset is None and not has_calls:
        raise ValueError(
            f"{type(owner).__name__} has parameters on the meta device and no reset_parameters() to give them values:"
            f" define it, {_REMEDY}"
        )
    kept = [(p, p.detach().clone()) for p in _own(owner) if p.device.type != "meta"]
    num_writes = {name: p._version for name, p in fresh.items()}
    for p in fresh.values():
        values = torch.empty_like(p, device="cpu")
        if values.is_floating_point():
            values.fill_(float("nan"))
        if getweakrefs(p):
            raise ValueError(
                f"{type(owner).__name__} has parameters on the meta device and keeps weak references to them, so they"
                " cannot get memory: build the model under ts.zero.Init() instead"
            )
        torch.utils.swap_tensors(p, Parameter(values, requires_grad=p.requires_grad))
    written = {name: p._version for name, p in fresh.items()}
    was_reset = _make_buffers(model, owner, reads)
    if unknown and reset is not None and not was_reset:
        reset()
    for p, value in kept:
        p.copy_(value)
    others = [name for name in unknown if num_writes[name] > fresh[name]._version - written[name]]
    if unknown and not has_calls and (others or _initialises_itself(model)):
        raise ValueError(
            f"{(others or unknown)[0]!r} of {type(owner).__name__} was initialised by more than reset_parameters(), on"
            f" the meta device, where the values are lost: {_REMEDY}"
        )
    return list(fresh.values())


def _initialises_itself(model: nn.Module) -> bool:
    return any(callable(getattr(type(module), "_init_weights", None)) for module in model.modules())


def _make_buffers(model: nn.Module, module: nn.Module, reads: bool) -> bool:
    """Memory and values for a module's own buffers; whether ``reset_parameters`` was called for them."""
    fresh = {n: b for n, b in module._buffers.items() if b is not None and b.device.type == "meta"}
    known = {name: remembered_for(model, buffer) for name, buffer in fresh.items()}
    for name, buffer in fresh.items():
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    needs_reset = any(remembered is None for remembered in known.values())
    if needs_reset:
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            name = next(name for name, remembered in known.items() if remembered is None)
            raise ValueError(
                f"{type(module).__name__} has the buffer {name!r} on the meta device and no reset_parameters() to give"
                f" it values: define it, or make the buffer with device='cpu'"
            )
        reset()
    for name, remembered in known.items():
        if remembered is not None:
            remembered.read(fresh[name], module._buffers[name] if reads else None)
    return needs_reset
