"""The tensors of a rank's own state: a safetensors file, small, read whole and checked."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tritonspeed.checkpoint.data_file import BLOCK_BYTES, fill, opened
from tritonspeed.checkpoint.errors import CheckpointError, CorruptCheckpoint
from tritonspeed.offload.direct import bytes_of
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import DTYPES, MAX_HEADER_BYTES

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
MOST_DIMENSIONS = 64  # of a tensor in PyTorch


def read_state_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Args:
        digest: xxh3_64 of the file; None is not compared.

    Raises:
        CorruptCheckpoint: the bytes are not what was written, or no safetensors.
    """
    if digest is not None and digest_of_file(path) != digest:
        raise CorruptCheckpoint(f"{path} is not what was written: its digest does not match")
    try:
        with opened(path) as (descriptor, size):
            header, begin = _header(descriptor, size, path)
            held = host_empty(size - begin, torch.uint8)
            fill(descriptor, begin, bytes_of(held), path)
        return {name: held[lo:hi].clone().view(dtype).view(shape) for name, dtype, shape, lo, hi in header}
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory: {error}") from error


def digest_of_file(path: Path) -> str:
    """xxh3_64 of a whole file, in hex.

    Raises:
        CorruptCheckpoint: it is no regular file, or cannot be read.
    """
    state = xxhash.xxh3_64()
    with opened(path) as (descriptor, size):
        held = bytes_of(host_empty(min(size, BLOCK_BYTES), torch.uint8))
        for at in range(0, size, BLOCK_BYTES):
            view = held[: min(BLOCK_BYTES, size - at)]
            fill(descriptor, at, view, path)
            state.update(view)
    return state.hexdigest()


def check_safetensors(path: Path) -> int:
    """Check that a file is as long as its header says; returns its bytes.

    Raises:
        CorruptCheckpoint: it is not, or is no safetensors file.
    """
    with opened(path) as (descriptor, size):
        _header(descriptor, size, path)
        return size


def _header(
    descriptor: int, size: int, path: Path
) -> tuple[list[tuple[str, torch.dtype, tuple[int, ...], int, int]], int]:
    """([(name, dtype, shape, lo, hi)] in order of their bytes, where the bytes begin); they fill the file."""
    start = bytearray(8)
    if size < 10:
        raise CorruptCheckpoint(f"{path} has {size} bytes: this is no safetensors file")
    fill(descriptor, 0, memoryview(start), path)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CorruptCheckpoint(f"{path} has {size:,} bytes and says that its header has {length:,}")
    text = bytearray(length)
    fill(descriptor, 8, memoryview(text), path)
    try:
        content = json.loads(bytes(text))
        if not isinstance(content, dict):
            raise ValueError("no object")
        content.pop("__metadata__", None)
        found = sorted((_entry(name, facts) for name, facts in content.items()), key=lambda entry: entry[3:])
        end = 0
        for name, _, _, lo, hi in found:
            if lo != end:
                raise ValueError(f"{name!r} begins at byte {lo}, not at {end}")
            end = hi
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end:,}, the file at {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CorruptCheckpoint(f"{path}: the header is not that of a safetensors file: {reason}") from error
    return found, 8 + length


def _entry(name: str, facts: Any) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    dtype, shape, (lo, hi) = _DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"]
    numbers = (*shape, lo, hi)
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"shape {shape!r:.80} and bytes [{lo!r:.20}, {hi!r:.20}) of {name!r:.80}")
    if hi - lo != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r:.80} of shape {shape!r:.80} has {hi - lo:,} bytes")
    return name, dtype, tuple(shape), lo, hi
