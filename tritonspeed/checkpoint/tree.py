"""Python values as JSON and tensors, and back: what a run keeps for itself, without pickle.

None, bool, text, finite float, int up to 2⁵³, list, dict with text keys     stand as JSON has them
everything else                                                             {"$tag": what it is made from}
tensors and arrays                                                          {"$tensor": key}, the values beside the JSON

A dict with a key that begins with "$" is written as pairs, so no tag can be forged from the inside. Types come back as
they were, floats and arrays to the last bit. Reading calls nothing but the constructors below: an unknown tag is an
error.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import math
import pathlib
import re
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritonspeed.offload.page_file import DTYPES

MOST_LEVELS = 64  # of nesting; each costs Python a few frames of its thousand
EXACT_INT = 2**53  # beyond it a JSON number is no exact integer
TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_DEVICE = re.compile(r"[a-z]{1,32}(:[0-9]{1,4})?")
_BITS = re.compile(r"[0-9a-f]{16}")
_KEYS = (str, int, float, bool, type(None), bytes, tuple, frozenset)  # hashable by value

Tensors = dict[str, Tensor]


def encode(value: Any, where: str) -> tuple[Any, Tensors]:
    """``value`` as JSON and tensors. Tensors are copied: what becomes of the originals changes nothing.

    A tensor comes back on the CPU, and a parameter as a tensor without gradient.

    Args:
        where: what the value is called, for errors, and what the tensors' names begin with: "client_state".

    Returns:
        what ``json.dumps`` takes; tensors on the CPU, contiguous, of the dtypes of ``page_file.DTYPES``.

    Raises:
        ValueError: something in it is neither data nor small enough; the text says where, and what to keep instead.
    """
    encoder = _Encoder()
    return encoder.encode(value, where, 0), encoder.tensors


def decode(content: Any, tensors: Mapping[str, Tensor], where: str = "state") -> Any:
    """The value that ``encode`` was given.

    Args:
        content: as ``json.loads`` gave it, from anyone.
        tensors: by name.
        where: for errors.

    Raises:
        ValueError: it is not what ``encode`` writes; the text says where.
    """
    return _Decoder(tensors).decode(content, where, 0)


class _Encoder:
    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def encode(self, value: Any, where: str, level: int) -> Any:
        if level > MOST_LEVELS:
            raise ValueError(f"{where} is nested deeper than {MOST_LEVELS} levels, or contains itself: flatten it")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in _TO_JSON:
            return _TO_JSON[kind](value)
        if kind is list:
            return self._each(value, where, level)
        if kind in (tuple, torch.Size):
            return {"$tuple" if kind is tuple else "$size": self._each(value, where, level)}
        if kind in (set, frozenset):
            return {f"${kind.__name__}": sorted(self._keys(value, where, level), key=repr)}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, where, level)
        if kind in (Tensor, nn.Parameter):
            return {"$tensor": self._tensor(value, where)}
        if kind is np.ndarray:
            return {"$array": self._array(value, where)}
        if isinstance(value, np.generic) and _is_plain(value.dtype):
            return {"$number": [value.dtype.str, value.tobytes().hex()]}
        if kind is datetime and (value.tzinfo is None or type(value.tzinfo) is timezone):
            return {"$datetime": [value.replace(fold=0).isoformat(), value.fold]}
        raise ValueError(_refusal(value, where))

    def _each(self, values: Iterable[Any], where: str, level: int) -> list[Any]:
        return [self.encode(value, f"{where}[{i}]", level + 1) for i, value in enumerate(values)]

    def _keys(self, values: Iterable[Any], where: str, level: int) -> list[Any]:
        for value in values:
            if type(value) not in _KEYS and not (isinstance(value, np.generic) and _is_plain(value.dtype)):
                raise ValueError(
                    f"{where} has the key or member {value!r:.80}, a {type(value).__name__}: use text, numbers, or"
                    " tuples of them"
                )
        return [self.encode(value, f"{where}, member {value!r:.80}", level + 1) for value in values]

    def _mapping(self, value: dict[Any, Any], where: str, level: int) -> dict[str, Any]:
        inner = [self.encode(each, f"{where}[{key!r}]", level + 1) for key, each in value.items()]
        is_plain = type(value) is dict and all(type(k) is str and _is_text(k) and k[:1] != "$" for k in value)
        if is_plain:
            return dict(zip(value, inner, strict=True))
        tag = f"${type(value).__name__.lower()}"
        return {tag: [list(pair) for pair in zip(self._keys(value, where, level), inner, strict=True)]}

    def _tensor(self, x: Tensor, where: str) -> Any:
        if x.layout is not torch.strided or x.is_quantized or x.is_meta:
            kind = "meta" if x.is_meta else "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            raise ValueError(f"{where} is a {kind} tensor: keep a dense one, with values")
        x = x.detach().resolve_conj().resolve_neg()
        held = torch.empty(x.shape, dtype=x.dtype).copy_(x)
        if held.dtype in DTYPES:
            self.tensors[where] = held
            return where
        self.tensors[where] = held.reshape(-1).view(torch.uint8)
        return [where, str(held.dtype).removeprefix("torch."), list(held.shape)]

    def _array(self, x: np.ndarray, where: str) -> list[Any]:
        if not _is_plain(x.dtype):
            raise ValueError(f"{where} is an array of {x.dtype}: keep numbers of at most 8 bytes, or x.tolist()")
        held = np.array(x, order="C", copy=True)
        raw = torch.from_numpy(np.frombuffer(held.tobytes(), np.uint8).copy()) if held.size else torch.empty(0).byte()
        same = TORCH_DTYPES.get(held.dtype.name) if held.dtype.isnative else None
        self.tensors[where] = raw.view(same).reshape(held.shape) if same in DTYPES else raw
        return [where, held.dtype.str, list(held.shape)]


def _is_plain(dtype: np.dtype) -> bool:
    """Numbers that are the same on every machine."""
    return dtype.itemsize <= {"b": 1, "i": 8, "u": 8, "f": 8, "c": 16}.get(dtype.kind, 0)


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _text(text: str) -> Any:
    return text if _is_text(text) else {"$str": text.encode("utf-8", "surrogatepass").hex()}


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"$float": "inf" if value > 0 else "-inf"}
    return {"$float": struct.pack(">d", value).hex()}  # which NaN it is, too


_TO_JSON: dict[type, Callable[[Any], Any]] = {
    str: _text,
    int: lambda value: value if abs(value) <= EXACT_INT else {"$int": hex(value)},
    float: _float,
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    date: lambda value: {"$date": value.isoformat()},
    timedelta: lambda value: {"$timedelta": [value.days, value.seconds, value.microseconds]},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
    pathlib.PosixPath: lambda value: {"$path": _text(str(value))},
    pathlib.WindowsPath: lambda value: {"$path": _text(str(value))},
    pathlib.PurePosixPath: lambda value: {"$posixpath": _text(str(value))},
    pathlib.PureWindowsPath: lambda value: {"$windowspath": _text(str(value))},
}


def _refusal(value: Any, where: str) -> str:
    kind = type(value)
    name = kind.__name__
    remedies: list[tuple[bool, str]] = [
        (isinstance(value, enum.Enum), "keep its .value"),
        (isinstance(value, tuple) and hasattr(value, "_asdict"), "keep its ._asdict()"),
        (dataclasses.is_dataclass(value) and not isinstance(value, type), "keep dataclasses.asdict() of it"),
        (isinstance(value, defaultdict), "keep dict() of it: what it makes new entries with is code"),
        (isinstance(value, complex), "keep [x.real, x.imag]"),
        (isinstance(value, Tensor), "keep .as_subclass(torch.Tensor), or what it is made from"),
        (isinstance(value, torch.Generator), "keep its .get_state()"),
        (isinstance(value, datetime), "keep .astimezone(datetime.timezone.utc) of it"),
        (hasattr(value, "state_dict") and not isinstance(value, type), "keep its .state_dict()"),
        (isinstance(value, dict | list | str | int | float), f"keep the plain {_plain_base(kind)} that it holds"),
    ]
    default = (
        "a checkpoint holds numbers, text, tensors, arrays, lists, tuples, sets and dicts, nothing that loading"
        " would have to call: keep what it is made from"
    )
    remedy = next((text for applies, text in remedies if applies), default)
    return f"{where} is {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}: {remedy}"


def _plain_base(kind: type) -> str:
    return next((base.__name__ for base in (bool, dict, list, str, int, float) if issubclass(kind, base)), "value")


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def decode(self, content: Any, where: str, level: int) -> Any:
        if level > MOST_LEVELS:
            raise ValueError(f"{where} is nested deeper than {MOST_LEVELS} levels")
        if content is None or isinstance(content, bool | int | float | str):
            return content
        if isinstance(content, list):
            return self._each(content, where, level)
        if not isinstance(content, dict):
            raise ValueError(f"{where}: {type(content).__name__} is not JSON")
        if not any(key[:1] == "$" for key in content):
            return {key: self.decode(each, f"{where}[{key!r}]", level + 1) for key, each in content.items()}
        if len(content) > 1:
            raise ValueError(f"{where}: a tag stands among other keys")
        ((tag, inner),) = content.items()
        try:
            return self._tagged(tag, inner, where, level)
        except (ValueError, RuntimeError, TypeError, OverflowError, IndexError, struct.error) as error:
            if isinstance(error, _Told):
                raise
            raise _Told(f"{where}: not what {tag!r:.40} is made from: {error}") from error

    def _each(self, content: Any, where: str, level: int) -> list[Any]:
        if not isinstance(content, list):
            raise _Told(f"{where}: {type(content).__name__} where a list is expected")
        return [self.decode(each, f"{where}[{i}]", level + 1) for i, each in enumerate(content)]

    def _tagged(self, tag: str, content: Any, where: str, level: int) -> Any:
        if tag in _FROM_JSON:
            return _FROM_JSON[tag](content)
        if tag in _PATHS:
            return _PATHS[tag](_of(str, self.decode(content, where, level + 1)))
        if tag in _SEQUENCES:
            values = self._each(content, where, level)
            made = _SEQUENCES[tag](values)
            if len(made) != len(values):
                raise _Told(f"{where}: two members are the same")
            return made
        if tag in _MAPPINGS:
            values = dict(self._each(content, where, level))
            if len(values) != len(content):
                raise _Told(f"{where}: two keys are the same")
            return _MAPPINGS[tag](values)
        if tag == "$tensor":
            return self._tensor(content, where)
        if tag == "$array":
            return self._array(content, where)
        raise _Told(f"{where}: {tag!r:.40} is no tag of this format")

    def _held(self, name: Any, where: str) -> Tensor:
        if not isinstance(name, str) or name not in self.tensors:
            raise _Told(f"{where}: there is no tensor {name!r:.80}")
        return self.tensors[name]

    def _tensor(self, content: Any, where: str) -> Tensor:
        if isinstance(content, str):
            return self._held(content, where)
        name, dtype, shape = content
        return self._held(name, where).view(_from_dtype(dtype)).reshape(_shape(shape))

    def _array(self, content: Any, where: str) -> np.ndarray:
        name, dtype, shape = content
        held = self._held(name, where).contiguous().reshape(-1).view(torch.uint8).numpy()
        return np.frombuffer(held.tobytes(), _numpy_dtype(dtype)).reshape(_shape(shape)).copy()


class _Told(ValueError):
    """An error that says where already."""


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.80} where {kind.__name__} is expected")
    return value


def _shape(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError(f"{values!r:.80} is no shape")
    return values


def _numpy_dtype(text: Any) -> np.dtype:
    if not re.fullmatch(r"[<>|][biufc][0-9]{1,2}", _of(str, text)):
        raise ValueError(f"{text!r:.40} is no dtype of numbers")
    dtype = np.dtype(text)
    if not _is_plain(dtype):
        raise ValueError(f"{text!r} is no dtype of numbers")
    return dtype


def _from_float(content: Any) -> float:
    if content in ("inf", "-inf"):
        return float(content)
    if not _BITS.fullmatch(_of(str, content)):
        raise ValueError(f"{content!r:.40} is no float")
    return struct.unpack(">d", bytes.fromhex(content))[0]


def _from_number(content: Any) -> np.generic:
    dtype, text = content
    return np.frombuffer(bytes.fromhex(_of(str, text)), _numpy_dtype(dtype))[0]


def _from_datetime(content: Any) -> datetime:
    text, fold = content
    return datetime.fromisoformat(_of(str, text)).replace(fold=_of(int, fold))


def _from_device(content: Any) -> torch.device:
    if not _DEVICE.fullmatch(_of(str, content)):
        raise ValueError(f"{content!r:.40} is no device")
    return torch.device(content)


def _from_dtype(content: Any) -> torch.dtype:
    if _of(str, content) not in TORCH_DTYPES:
        raise ValueError(f"{content!r:.40} is no dtype")
    return TORCH_DTYPES[content]


_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "$str": lambda content: bytes.fromhex(_of(str, content)).decode("utf-8", "surrogatepass"),
    "$int": lambda content: int(_of(str, content), 16),
    "$float": _from_float,
    "$bytes": lambda content: base64.b64decode(_of(str, content), validate=True),
    "$date": lambda content: date.fromisoformat(_of(str, content)),
    "$datetime": _from_datetime,
    "$timedelta": lambda content: timedelta(*(_of(int, n) for n in content)),
    "$number": _from_number,
    "$dtype": _from_dtype,
    "$device": _from_device,
}
_PATHS: dict[str, Callable[[str], Any]] = {
    "$path": pathlib.Path,
    "$posixpath": pathlib.PurePosixPath,
    "$windowspath": pathlib.PureWindowsPath,
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "$tuple": tuple,
    "$size": lambda values: torch.Size(_shape(values)),
    "$set": set,
    "$frozenset": frozenset,
}
_MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "$dict": dict,
    "$ordereddict": OrderedDict,
    "$counter": Counter,
}
