"""One value of a config to its declared type: tolerant of the ways people spell numbers, strict about the rest."""

import difflib
import math
import typing
from collections.abc import Iterable
from typing import Any, Literal

from tritonspeed.config.keys import AUTO, Dtype, Spec

DTYPE_NAMES: dict[str, str] = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}
FLOORED_UNITS = ("elements", "bytes")


def dtype_name(value: object) -> str | None:
    """ "fp32", "fp16" or "bf16" from any usual spelling, a torch.dtype included; None if it is none of them."""
    return DTYPE_NAMES.get(str(value).lower().removeprefix("torch."))


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the nearest known name, or "" if none is near."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f", did you mean {by_lower[near[0]]!r}?" if near else ""


def coerce(spec: Spec, value: Any) -> Any:
    """`value` as the type that `spec` declares. "auto" stays for `resolve`, null means the default.

    Sizes in elements or bytes are floored (0.9·h² is a float, and so is 5e8 in JSON); counts must be whole.
    Numbers and booleans in quotes are read. ValueError names the key, the value and what would do.
    """
    if value is None:
        return spec.default
    if isinstance(value, str) and value == AUTO and not spec.is_open:
        return AUTO
    converted = _convert(spec, value)
    low, high = spec.key.low, spec.key.high
    if low is not None and converted < low:
        raise ValueError(f"{spec.path} = {value!r} must be at least {low:g}")
    if high is not None and converted > high:
        raise ValueError(f"{spec.path} = {value!r} must be at most {high:g}")
    return converted


def _convert(spec: Spec, value: Any) -> Any:
    if spec.hint == Dtype:
        name = dtype_name(value)
        if name is None:
            raise ValueError(f"{spec.path} = {value!r} must be one of fp32, fp16, bf16")
        return name
    if typing.get_origin(spec.hint) is Literal:
        return _choice(spec, value)
    if spec.hint is bool:
        return _boolean(spec, value)
    if spec.hint in (int, float):
        return _number(spec, value)
    if spec.hint is str:
        if not isinstance(value, str):
            raise ValueError(f"{spec.path} = {value!r} must be a string")
        return value
    if spec.is_open:
        if not isinstance(value, dict):
            raise ValueError(f"{spec.path} = {value!r} must be a block {{...}}")
        return value
    return _items(spec, value)


def _choice(spec: Spec, value: Any) -> Any:
    for choice in spec.choices:
        if isinstance(choice, str) and isinstance(value, str) and choice.lower() == value.lower():
            return choice
        if not isinstance(choice, str) and not isinstance(value, bool) and _as_number(value) == choice:
            return choice
    raise ValueError(f"{spec.path} = {value!r} must be one of {', '.join(str(c) for c in spec.choices)}")


def _boolean(spec: Spec, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value in (0, 1):
        return bool(value)
    raise ValueError(f"{spec.path} = {value!r} must be true or false")


def _as_number(value: Any) -> int | float | None:
    """A number, also one in quotes; None for anything else, booleans included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) else None


def _number(spec: Spec, value: Any) -> int | float:
    number = _as_number(value)
    if number is None or math.isnan(number):
        raise ValueError(f"{spec.path} = {value!r} must be a number")
    if spec.hint is float:
        if math.isinf(number) and spec.key.unit != "steps":
            raise ValueError(f"{spec.path} = {value!r} must be finite")
        return number
    if math.isinf(number):
        raise ValueError(f"{spec.path} = {value!r} must be finite")
    if number != math.floor(number) and spec.key.unit not in FLOORED_UNITS:
        raise ValueError(f"{spec.path} = {value!r} must be a whole number")
    return math.floor(number)


def _items(spec: Spec, value: Any) -> list[Any]:
    """A list of strings or of whole numbers; one alone stands for a list of one."""
    (kind,) = typing.get_args(spec.hint)
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, kind) and not isinstance(each, bool) for each in items):
        plural = "strings" if kind is str else "whole numbers"
        raise ValueError(f"{spec.path} = {value!r} must be a list of {plural}")
    return items
