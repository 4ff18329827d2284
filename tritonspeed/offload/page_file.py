"""Valid safetensors whose tensors stand where a disk reads and writes fastest: on whole pages.

A file holds one *flat*, a run of elements of one dtype, between a header and the end of the last page:

    |u64 length|{"__metadata__": ..., names, shapes, offsets}    |p0 p0 p0|pad|p1 p1|p2 p2 p2 p2|pad|
    0                                        padded with spaces  4096·k                             4096·m

The format allows spaces after the header's JSON, so the flat begins on a page. It allows no holes: what lies between
two parameters, and behind the last one up to the end of its page, is a named tensor of bytes, ``__pad__.N``. So
``safetensors.safe_open`` shows every parameter by name, and element i of the flat is at ``data_start + i·itemsize``.
The header is written once and never changed.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritonspeed.offload.memory import PAGE_BYTES

FORMAT = 1
FILLER = "__pad__."
MAX_HEADER_BYTES = 100_000_000  # readers refuse longer ones
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Piece:
    """A parameter, or a run of its elements, in a flat.

    Attributes:
        name: of the tensor in the file.
        shape: of the tensor in the file.
        start: its first element in the flat.
        numel: its elements, the product of ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], start: int, lo: int = 0, hi: int | None = None) -> Piece:
        """Elements [lo, hi) of a parameter: all of it in its shape, or a part: one-dimensional, ``name[lo:hi]``."""
        whole = math.prod(shape)
        hi = whole if hi is None else hi
        if (lo, hi) == (0, whole):
            return cls(name, tuple(shape), start, whole)
        return cls(f"{name}[{lo}:{hi}]", (hi - lo,), start, hi - lo)


@dataclass(frozen=True)
class PageFile:
    """What a file holds.

    Attributes:
        bucket, kind: which flat it is: a bucket's master, exp_avg, ...
        dtype, numel: of the flat.
        pieces: what is named in it, in order of ``start``, without overlap.
        rank, world: whose slice it is.
    """

    bucket: str
    kind: str
    dtype: torch.dtype
    numel: int
    pieces: tuple[Piece, ...] = ()
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        where = f"{self.kind} of {self.bucket}"
        if self.dtype not in DTYPES:
            raise ValueError(f"{where}: {self.dtype} is not kept on disk; {', '.join(map(str, DTYPES))} are")
        if self.numel < 0:
            raise ValueError(f"{where}: {self.numel} elements, must be at least 0")
        end, names = 0, set()
        for piece in self.pieces:
            if piece.numel != math.prod(piece.shape):
                raise ValueError(f"{where}: {piece.name} has shape {piece.shape} and {piece.numel} elements")
            if piece.start < end or piece.start + piece.numel > self.numel:
                raise ValueError(
                    f"{where}: {piece.name} is at [{piece.start}, {piece.start + piece.numel}), "
                    f"must be from {end} on and within {self.numel}"
                )
            if piece.name in names or piece.name == "__metadata__" or piece.name.startswith(FILLER):
                raise ValueError(f"{where}: the name {piece.name} is taken")
            end = piece.start + piece.numel
            names.add(piece.name)

    @property
    def flat_bytes(self) -> int:
        """Of the flat alone."""
        return self.numel * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Of the flat and the filler behind it: whole pages."""
        return whole_pages(self.flat_bytes)


def whole_pages(num_bytes: int) -> int:
    """The next multiple of 4,096."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def header_bytes(file: PageFile) -> bytes:
    """The file's first bytes: length, JSON, spaces up to a page.

    Raises:
        ValueError: longer than readers accept.
    """
    facts = {
        "format": f"tritonspeed.flat.{FORMAT}",
        "bucket": file.bucket,
        "kind": file.kind,
        "rank": str(file.rank),
        "world": str(file.world),
        "dtype": DTYPES[file.dtype],
        "numel": str(file.numel),
    }
    text = json.dumps({"__metadata__": facts, **dict(_tensors(file))}, separators=(",", ":"), ensure_ascii=False)
    content = text.encode()
    content = content.ljust(whole_pages(8 + len(content)) - 8)
    if len(content) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{file.kind} of {file.bucket}: {len(file.pieces)} tensors need a header of {len(content):,} bytes, more "
            f"than the {MAX_HEADER_BYTES:,} of the format: put fewer parameters into a bucket"
        )
    return len(content).to_bytes(8, "little") + content


def _tensors(file: PageFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and entry of every tensor, fillers between them."""
    size, end, num_fillers = file.dtype.itemsize, 0, 0

    def entry(dtype: str, shape: Sequence[int], lo: int, hi: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [lo, hi]}

    for piece in (*file.pieces, None):
        start = file.data_bytes if piece is None else piece.start * size
        if start > end:
            yield f"{FILLER}{num_fillers}", entry("U8", (start - end,), end, start)
            num_fillers += 1
        if piece is not None:
            end = start + piece.numel * size
            yield piece.name, entry(DTYPES[file.dtype], piece.shape, start, end)


def create(path: str | os.PathLike[str], file: PageFile) -> int:
    """Write the header and reserve the space; the flat is zeros.

    A file of that name is replaced; under its other names, a checkpoint's, it stays as it was.

    Returns:
        Where the flat begins, in bytes.

    Raises:
        OSError: ENOSPC, with needed and free bytes, and nothing is left behind; or another reason of the system's.
    """
    header = header_bytes(file)
    num_bytes = len(header) + file.data_bytes
    with suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _reserve(descriptor, num_bytes)
        written = os.pwrite(descriptor, header, 0)
        assert written == len(header), f"{written} of {len(header)} header bytes were written"
    except OSError as error:
        free = free_bytes(Path(path).parent) + os.fstat(descriptor).st_blocks * 512
        os.unlink(path)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        limit = " (or a quota or limit on files)" if error.errno != errno.ENOSPC else ""
        raise OSError(
            error.errno,
            f"disk full{limit}: {num_bytes:,} bytes are needed and {free:,} are free; "
            "free some, or name a folder on another disk (nvme_path)",
            os.fspath(path),
        ) from error
    finally:
        os.close(descriptor)
    return len(header)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Give the file its size, and its place on the disk where the file system can: then no write finds it full."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, num_bytes)


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """What a file may still take on that disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def read_header(path: str | os.PathLike[str]) -> tuple[PageFile, int]:
    """What a file holds and where its flat begins, in bytes.

    Raises:
        ValueError: the file is not one of these, or was cut off; says what is wrong.
    """
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes: this is no safetensors file")
        content = stream.read(length)
        size = os.fstat(stream.fileno()).st_size
    try:
        if len(content) != length:
            raise ValueError(f"the header has {len(content)} of {length} bytes")
        tensors = json.loads(content)
        file = _parse(tensors.pop("__metadata__"), tensors)
        if header_bytes(file) != length.to_bytes(8, "little") + content:
            raise ValueError("the header is not the one that is written for these tensors")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of tritonspeed's disk tier, or damaged: {error}") from error
    if size != 8 + length + file.data_bytes:
        raise ValueError(f"{path}: has {size:,} bytes, must have {8 + length + file.data_bytes:,}: it was cut off")
    return file, 8 + length


def _parse(facts: dict[str, str], tensors: dict[str, Any]) -> PageFile:
    """A header's JSON as a PageFile."""
    if facts["format"] != f"tritonspeed.flat.{FORMAT}":
        raise ValueError(f"format {facts['format']!r}, this version reads 'tritonspeed.flat.{FORMAT}'")
    dtype = {name: dtype for dtype, name in DTYPES.items()}[facts["dtype"]]
    pieces = []
    for name, entry in tensors.items():
        if not name.startswith(FILLER):
            lo, hi = entry["data_offsets"]
            pieces.append(Piece(name, tuple(entry["shape"]), lo // dtype.itemsize, (hi - lo) // dtype.itemsize))
    return PageFile(
        bucket=facts["bucket"],
        kind=facts["kind"],
        dtype=dtype,
        numel=int(facts["numel"]),
        pieces=tuple(pieces),
        rank=int(facts["rank"]),
        world=int(facts["world"]),
    )
