"""Tensors inside what modules take and return: tuples, lists, dicts, dataclasses, any depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside ``value``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name, None))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor inside plain tuples, lists and dicts replaced by ``change(tensor)``.

    Containers whose tensors do not change are returned as they are, so that identity survives where it can.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        items = {k: map_tensors(v, change) for k, v in value.items()}
        return items if any(items[k] is not value[k] for k in value) else value
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        parts = [map_tensors(v, change) for v in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
