"""Tensors in safetensors files, read in parts: one file, or a folder with Hugging Face's index of many.

A safetensors file is an 8-byte length, a JSON header, and the tensors' bytes, row-major: elements [lo, hi) of a tensor
are one range of the file. Exactly those bytes are read, by plain reads: pages of a mapped file would count as this
process's memory, and a model bigger than that is what this is for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # the format's own bound
MOST_ELEMS = 2**53  # beyond it a JSON number is no exact integer
PART_ELEMS = 4 * 2**20  # read at once: 16 MiB of fp32; the time of a request is lost in it

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's place: ``begin`` is its first byte in the file ``path``."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class TensorFiles:
    """What a checkpoint holds, by name; headers are read now, values when they are asked for.

    Args:
        path: a ``.safetensors`` file, an index of such files (``*.index.json``), or a folder with ``model.safetensors``
            or ``model.safetensors.index.json``.

    Raises:
        ValueError: nothing of the kind there, a file that the index names is absent or elsewhere, or a damaged file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        single, index = _find(self.path)
        if index is None:
            self.entries = dict(_read_header(single))
            return
        wanted = _read_index(index)
        for file in dict.fromkeys(wanted.values()):
            found = dict(_read_header(index.parent / file))
            names = [name for name, place in wanted.items() if place == file]
            absent = [name for name in names if name not in found]
            if absent:
                raise ValueError(f"{index} says that {file} holds {some_names(absent)}, and it does not")
            self.entries |= {name: found[name] for name in names}

    def read(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the tensor ``name``, (hi - lo,) in the file's dtype.

        Raises:
            ValueError: the file has become shorter since its header was read.
        """
        entry = self.entries[name]
        values = torch.empty(hi - lo, dtype=entry.dtype)
        if hi > lo:
            _read_into(entry.path, entry.begin + lo * entry.dtype.itemsize, values)
        return values

    def parts(self, name: str, lo: int, hi: int, part_elems: int) -> Iterator[tuple[int, Tensor]]:
        """``read`` in parts of at most ``part_elems``: (first element, values), in order."""
        for start in range(lo, hi, part_elems):
            yield start, self.read(name, start, min(start + part_elems, hi))


def some_names(names: list[str], at_most: int = 8) -> str:
    """The first names of a list, quoted, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(repr(name) for name in names[:at_most]) + more


def _find(path: Path) -> tuple[Path, Path | None]:
    """(the one file, None), or (the index, the index)."""
    if path.is_dir():
        for name in (SINGLE, INDEX):
            if (path / name).exists():
                path = path / name
                break
        else:
            there = some_names(sorted(p.name for p in path.iterdir())) or "nothing"
            raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}, it has {there}: name the file itself")
    if not path.exists():
        raise ValueError(f"there is no {path}: pass a .safetensors file, or a folder with {SINGLE} or {INDEX}")
    return path, path if path.suffix == ".json" else None


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name, as the index has it; every file is there, in the index's folder."""
    wanted: dict[str, str] = {}
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(wanted, dict) and all(isinstance(x, str) for item in wanted.items() for x in item)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f'{path} is no index of safetensors files: it needs {{"weight_map": {{tensor: file, ...}}}}')
    files = sorted(set(wanted.values()))
    for file in files:
        # what links point to is the user's affair (the Hugging Face hub's folders are links); names are the file's
        if any(kind(file).anchor or ".." in kind(file).parts for kind in (PurePosixPath, PureWindowsPath)):
            raise ValueError(f"{path} names {file!r}, which is outside its folder: files must stand beside the index")
    absent = [file for file in files if not (path.parent / file).is_file()]
    if absent:
        raise ValueError(
            f"{path} names {len(files)} files, and {some_names(absent)} is not there: is the download complete?"
        )
    return wanted


def _read_header(path: Path) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of every tensor in a file, checked against the file's size."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"{path} is no safetensors file, or is cut short: {size:,} bytes, its header {length:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = [(name, *_parse(path, facts, 8 + length)) for name, facts in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, its header cannot be read: {error!r}") from error
    for name, entry, end in found:
        if entry.begin < 8 + length or end - entry.begin != entry.numel * entry.dtype.itemsize or end > size:
            raise ValueError(
                f"{path} is damaged or cut short: {name!r} of shape {entry.shape} should be bytes {entry.begin:,} to"
                f" {end:,}, and the file has {size:,}"
            )
        yield name, entry


def _parse(path: Path, facts: dict[str, Any], base: int) -> tuple[Entry, int]:
    dtype, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(_DTYPES)}")
    numbers = [*shape, begin, end]
    if not all(type(n) is int and 0 <= n <= MOST_ELEMS for n in numbers) or prod(n or 1 for n in shape) > MOST_ELEMS:
        raise ValueError(f"shape {shape!r:.80} at bytes {begin!r:.40} to {end!r:.40}")
    return Entry(path, _DTYPES[dtype], tuple(shape), base + begin), base + end


def _read_into(path: Path, begin: int, values: Tensor) -> None:
    """Fill ``values`` with the file's bytes from ``begin`` on."""
    left = memoryview(values.view(torch.uint8).numpy().data)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while left:
            num_bytes = file.readinto(left)
            if not num_bytes:
                raise ValueError(f"{path} has become shorter: {len(left):,} bytes are missing at its end")
            left = left[num_bytes:]
