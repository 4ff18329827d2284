"""What a sharded parameter answers to ``ds_id`` and its kin: properties of ``Parameter``, nothing hung on any of them.

``hasattr(p, "ds_id")`` is how programs ask whether ZeRO stage 3 manages a parameter; so on any other parameter these
properties raise AttributeError, as if they were not there.

A sharded parameter keeps its shape here: ``p.shape`` is what ``p.ds_shape`` is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed.zero import safe_get_local_fp32_param
from tritonspeed.zero.access import part_of
from tritonspeed.zero.group import group_of, groups_of, place_of


class ZeroParamStatus(enum.Enum):
    """Whether a parameter's values can be read on this rank now."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(enum.Enum):
    """How a parameter is held, as programs ask ``ds_param_type``'s module for it."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


def is_partitioned(p: Parameter) -> bool:
    """Whether a stage that shards parameters manages ``p``: a persistent one, which stays whole, too."""
    return group_of(p) is not None and place_of(p)[1].stage.shards_parameters


def _number(p: Parameter) -> int:
    group, bucket, index = place_of(p)
    return (group.index << 32) + (group.buckets.index(bucket) << 24) + index


def _status(p: Parameter) -> ZeroParamStatus:
    group = place_of(p)[0]
    return ZeroParamStatus.AVAILABLE if group.is_whole else ZeroParamStatus.NOT_AVAILABLE


def _all_gather(p: Parameter, param_list: list[Parameter] | None = None, **_: Any) -> None:
    for group in groups_of(param_list or [p]):
        group.acquire("all_gather")


def _partition(p: Parameter, param_list: list[Parameter] | None = None, **_: Any) -> None:
    for group in groups_of(param_list or [p]):
        group.release("all_gather")
        group.reshard()


def _own_numel(p: Parameter) -> int:
    _, lo, hi, _ = part_of(p)
    return hi - lo


def _summary(p: Parameter, **_: Any) -> dict[str, Any]:
    return {"id": _number(p), "status": _status(p).name, "numel": p.numel(), "shape": tuple(p.shape)}


_ANSWERS: dict[str, Callable[[Parameter], Any]] = {
    "ds_id": _number,
    "ds_shape": lambda p: p.shape,
    "ds_numel": lambda p: p.numel(),
    "ds_status": _status,
    "ds_tensor": lambda p: safe_get_local_fp32_param(p).to(p.dtype),
    "ds_persist": lambda p: not place_of(p)[1].frees,
    "ds_process_group": lambda p: place_of(p)[1].mesh.group,
    "ds_active_sub_modules": lambda p: set(),
    "ds_summary": lambda p: lambda **kwargs: _summary(p, **kwargs),
    "all_gather": lambda p: lambda *args, **kwargs: _all_gather(p, *args, **kwargs),
    "partition": lambda p: lambda *args, **kwargs: _partition(p, *args, **kwargs),
    "partition_numel": lambda p: lambda: _own_numel(p),
}


def show() -> None:
    """Let parameters answer. A no-op the second time."""
    for name, answer in _ANSWERS.items():
        if name not in Parameter.__dict__:
            setattr(Parameter, name, _Answer(name, answer))
    if "ds_external_parameters" not in torch.nn.Module.__dict__:
        torch.nn.Module.ds_external_parameters = _no_external_parameters


def _no_external_parameters(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of another module's parameters that this one uses: none that anybody must know of."""
    return []


class _Answer:
    """A descriptor like property, without a setter: what is set is kept on that parameter, as for any attribute."""

    def __init__(self, name: str, answer: Callable[[Parameter], Any]) -> None:
        self._name, self._answer = name, answer

    def __get__(self, p: Parameter | None, owner: type) -> Any:
        if p is None:
            return self
        if not is_partitioned(p):
            raise AttributeError(f"{type(p).__name__!r} object has no attribute {self._name!r}")
        return self._answer(p)
