"""Safetensors files of whole tensors, as Hugging Face reads them: planned from shapes, filled in any order by anyone.

    model.safetensors                                                    all of it, where it fits in one file
    model-00001-of-00002.safetensors ... model.safetensors.index.json    more than ``max_shard_bytes``

Everyone who knows the tensors' names, shapes and dtypes works out the same plan: header, size and place of every byte.
So many ranks fill one file, each its own ranges, and none tells another anything. Header and order are, byte for byte,
what the safetensors library writes: dtypes from the widest down, then names, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritonspeed.offload.direct import bytes_of
from tritonspeed.offload.durable import sync_folder, write_synced
from tritonspeed.offload.page_file import DTYPES, MAX_HEADER_BYTES, free_bytes
from tritonspeed.zero.tensor_files import PART_ELEMS

STEM = "model"
MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's own default
MOST_SHARDS = 99_999  # five digits in a file's name
_WIDEST_FIRST = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its first byte in a file."""

    file: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class WeightsPlan:
    """Which files there will be and what stands where in them.

    Attributes:
        places: of every tensor, by name.
        headers: first bytes of every file, by its name.
        sizes: bytes of every file.
        index: (file name, JSON text) of the index over several files; None where there is one.
    """

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    index: tuple[str, str] | None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.sizes.values()) - sum(map(len, self.headers.values()))


def plan_weights(tensors: Shapes, max_shard_bytes: int | None = MAX_SHARD_BYTES, stem: str = STEM) -> WeightsPlan:
    """Deal tensors out to files, in the order given.

    Args:
        tensors: name → (shape, dtype).
        max_shard_bytes: of the tensors in one file; one that is larger has a file to itself. None is no bound.
        stem: of the file names.

    Raises:
        ValueError: a name or dtype that the format does not have, a bound below 1, or more files than can be named.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be at least 1, or None for one file")
    for name, (_, dtype) in tensors.items():
        if dtype not in DTYPES or name == "__metadata__":
            raise ValueError(
                f"{name!r} of {dtype}: safetensors has no such tensor; it keeps {', '.join(map(str, DTYPES))}"
            )
    shards = [list(shard) for shard in shard_names({n: _num_bytes(*t) for n, t in tensors.items()}, max_shard_bytes)]
    names = shard_files(len(shards), stem, ".safetensors")
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, shard in zip(names, shards, strict=True):
        headers[file], begins, sizes[file] = _header({name: tensors[name] for name in shard})
        for name in shard:
            shape, dtype = tensors[name]
            places[name] = Place(file, begins[name], dtype, tuple(shape))
    plan = WeightsPlan(places, headers, sizes, None)
    if len(shards) == 1:
        return plan
    content = index_text({name: places[name].file for name in tensors}, plan.num_bytes)
    return WeightsPlan(places, headers, sizes, (f"{stem}.safetensors.index.json", content))


def shard_names(num_bytes: Mapping[str, int], max_shard_bytes: int | None) -> Iterator[list[str]]:
    """Names for each file, in order: a file is ended by the first tensor that does not fit. At least one file."""
    shard: list[str] = []
    filled = 0
    for name, size in num_bytes.items():
        if shard and max_shard_bytes is not None and filled + size > max_shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def shard_files(num_shards: int, stem: str, suffix: str) -> list[str]:
    """File names of so many shards.

    Raises:
        ValueError: more than a name can count.
    """
    if num_shards > MOST_SHARDS:
        raise ValueError(f"{num_shards:,} files, must be at most {MOST_SHARDS:,}: allow larger ones (max_shard_size)")
    if num_shards == 1:
        return [stem + suffix]
    return [f"{stem}-{k:05d}-of-{num_shards:05d}{suffix}" for k in range(1, num_shards + 1)]


def index_text(files: Mapping[str, str], total_bytes: int) -> str:
    """The JSON beside several files: tensor → file, and the bytes of all tensors."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def parse_shard_size(size: int | str | None) -> int | None:
    """Bytes of 5_000_000_000, "5GB" (powers of ten), "5GiB" (powers of two); None is no bound.

    Raises:
        ValueError: anything else.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool)):
        number: int | None = size
    else:
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?B)\s*", str(size).upper())
        number = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if number is not None and number < 1:
        raise ValueError(f"max_shard_size {size!r}: write bytes, or a number and a unit: 5000000000, '5GB', '2GiB'")
    return number


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _header(tensors: Shapes) -> tuple[bytes, dict[str, int], int]:
    """(first bytes of the file, first byte of every tensor in it, bytes of the file)."""
    order = sorted(tensors, key=lambda name: (_WIDEST_FIRST.index(DTYPES[tensors[name][1]]), name))
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end, offsets = 0, {}
    for name in order:
        shape, dtype = tensors[name]
        offsets[name], end = end, end + _num_bytes(shape, dtype)
        content[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors):,} tensors need a header of {len(text):,} bytes, the format allows "
                         f"{MAX_HEADER_BYTES:,}: allow less in a file (max_shard_size)")  # fmt: skip
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end


class WeightsWriter:
    """Fills a plan's files. Any number of processes may, each what it has; they need not wait for each other.

    Files are given their size before they are written to. On a network file system a client that believes a page to be
    behind the end of a file fills it up with zeros, and would write these over what another has put there.

    Args:
        folder: exists.
        plan: the same one everywhere.
    """

    def __init__(self, folder: Path, plan: WeightsPlan) -> None:
        self._folder, self.plan = folder, plan
        self._open: dict[str, int] = {}

    def write(self, name: str, lo: int, values: Tensor) -> None:
        """Elements from ``lo`` on of the flattened tensor ``name``; (n,) of any float dtype, cast to the plan's."""
        place = self.plan.places[name]
        assert lo >= 0 and lo + values.numel() <= place.numel, (
            f"{name}: elements [{lo}, {lo + values.numel()}) of {place.numel}"
        )
        for start in range(0, values.numel(), PART_ELEMS):
            part = values[start : start + PART_ELEMS].to(place.dtype).to("cpu").contiguous()
            self._write_at(place.file, bytes_of(part), place.begin + (lo + start) * place.dtype.itemsize)

    def write_frame(self) -> None:
        """Headers, sizes, and the index, if there is one: one process does."""
        for file, header in self.plan.headers.items():
            self._write_at(file, memoryview(header), 0)
        if self.plan.index is not None:
            self.write_text(*self.plan.index)

    def write_text(self, file: str, text: str) -> None:
        """A small file beside the weights."""
        write_synced(self._folder / file, text.encode())

    def sync(self) -> None:
        """Wait until the disk has what this process has written."""
        for file, descriptor in self._open.items():
            with self._named(file):
                os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads them soon
        sync_folder(self._folder)

    def close(self) -> None:
        """Let go of the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_at(self, file: str, content: memoryview, offset: int) -> None:
        with self._named(file):
            if file not in self._open:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
                self._open[file] = os.open(self._folder / file, flags, 0o644)
                os.ftruncate(self._open[file], self.plan.sizes[file])
            while content:
                num_bytes = os.pwrite(self._open[file], content, offset)
                content, offset = content[num_bytes:], offset + num_bytes

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        """Errors that say which file, how large it is to be, and what is free."""
        try:
            yield
        except OSError as error:
            needed, free = self.plan.sizes[file], free_bytes(self._folder)
            text = f"{error.strerror}: it is to have {needed:,} bytes, and {free:,} are free on that disk"
            raise OSError(error.errno, text, str(self._folder / file)) from error


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """One file of tensors, whole or not at all. Its name decides: ``.safetensors``, else a ``torch.save`` of a dict.

    The second is what other programs ask for by its name (``pytorch_model.bin``); nothing here reads it.

    Args:
        path: what was there before is replaced.
        tensors: by name. One tensor under several names is written once: by ``torch.save`` for all of them, into
            safetensors under the first.
        dtype: floating-point tensors are cast to it.

    Raises:
        ValueError: a tensor that the format does not have.
        OSError: the system's reason; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.suffix == ".safetensors":
            _write_safetensors(temporary, tensors, dtype)
        else:
            _write_torch(temporary, tensors, dtype)
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_safetensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    first = {_identity(name, tensor): name for name, tensor in reversed(tensors.items())}
    chosen = {name: tensor for name, tensor in tensors.items() if first[_identity(name, tensor)] == name}
    shapes = {name: (tuple(tensor.shape), _cast_of(tensor, dtype)) for name, tensor in chosen.items()}
    with WeightsWriter(path.parent, plan_weights(shapes, None, path.stem)) as writer:
        writer.write_frame()
        for name, tensor in chosen.items():
            writer.write(name, 0, tensor.detach().reshape(-1))
        writer.sync()


def _write_torch(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    made: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in tensors.items():
        if (key := _identity(name, tensor)) not in made:
            values = tensor.detach().to("cpu", _cast_of(tensor, dtype)).contiguous()
            # a view would take all of its storage into the file with it
            is_view = values.untyped_storage().nbytes() != values.numel() * values.element_size()
            made[key] = values.clone() if is_view else values
    with open(path, "wb") as stream:
        torch.save({name: made[_identity(name, tensor)] for name, tensor in tensors.items()}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _identity(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Equal for the same elements under two names; an empty tensor has no elements to share."""
    if tensor.numel() == 0:
        return (name,)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _cast_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
