"""A rank's file, read block by block and checked against the digests of its index.

A *block* is what is read at once: neighbouring runs, each with a digest, of 8 MiB together; a longer run is several
blocks, which are checked together before the first of them is given.

    runs      |-- digest --|-- digest --|-- digest --|------------- digest of 100 MiB -------------|
    blocks    |----------- block ------------|       |--- block ---|--- block ---|--- block --- ...|

Names come from an index that anybody may have written: only regular files of the rank's own folder are opened, links
to elsewhere are not followed, and sizes are those the system gives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from tritonspeed.checkpoint.errors import CheckpointError, CorruptCheckpoint
from tritonspeed.checkpoint.manifest import FileRecord, Interval
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.direct import bytes_of
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.page_file import DTYPES, MAX_HEADER_BYTES, Piece, whole_pages

Verify = Literal["full", "sampled", "none"]

BLOCK_BYTES = 8 * 2**20
LONG_BYTES = 64 * 2**20  # a run that is longer is checked as a stream, and then read again where it is wanted
SAMPLED_RUNS = 8  # one of so many is checked under "sampled"
_DIRECT = getattr(os, "O_DIRECT", 0)
_NOT_THERE = {
    errno.ENOENT: "is missing",
    errno.ENOTDIR: "is missing",
    errno.ELOOP: "is a symbolic link, and only files of the checkpoint itself are read",
    errno.EISDIR: "is a folder",
    errno.ENXIO: "is no regular file",
    errno.ENAMETOOLONG: "has a name longer than the system takes",
    errno.EIO: "cannot be read: the disk failed, see the kernel's log (dmesg)",
}


@contextmanager
def opened(path: Path, direct: bool = False) -> Iterator[tuple[int, int]]:
    """A regular file to read: (descriptor, bytes that it has).

    Args:
        direct: around the page cache, where the file system can.

    Raises:
        CorruptCheckpoint: it is missing, a link, a folder, a pipe; the disk cannot read it.
        CheckpointError: the system refuses for another reason, such as permissions.
    """
    # a pipe would block the opening without O_NONBLOCK, for a regular file it means nothing
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = -1
    try:
        try:
            descriptor = os.open(path, flags | (_DIRECT if direct else 0))
        except OSError as error:
            if not (direct and error.errno == errno.EINVAL):
                raise
            descriptor = os.open(path, flags)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptCheckpoint(f"{path} is no regular file")
        yield descriptor, found.st_size
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise CorruptCheckpoint(f"{path} {_NOT_THERE[error.errno]}") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeError, ValueError) as error:  # a name that no file can have
        raise CorruptCheckpoint(f"{str(path)!r} is no file: {error}") from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def read_whole(path: Path, most_bytes: int) -> bytes:
    """A small file.

    Raises:
        CorruptCheckpoint: as ``opened``, or it is longer than ``most_bytes``.
    """
    with opened(path) as (descriptor, size):
        if size > most_bytes:
            raise CorruptCheckpoint(f"{path} has {size:,} bytes, at most {most_bytes:,} are expected")
        held = bytearray(size)
        fill(descriptor, 0, memoryview(held), path)
        return bytes(held)


def fill(descriptor: int, offset: int, view: memoryview, path: Path) -> None:
    """Read all of ``view`` from byte ``offset`` on; what direct I/O refuses comes through the page cache."""
    done = 0
    while done < len(view):
        try:
            num_bytes = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise
            continue
        if num_bytes == 0:
            raise CorruptCheckpoint(f"{path} was cut off at byte {offset + done:,} while it was read")
        done += num_bytes


def _leave_direct(descriptor: int) -> bool:
    """Read through the page cache from now on; False where it is so already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [lo, hi) of a flat, and the runs whose digests say that they are right.

    Attributes:
        first, last: runs [first, last) of the record.
        is_part: of one long run, which is checked by itself.
    """

    lo: int
    hi: int
    first: int
    last: int
    is_part: bool = False


def cut_blocks(record: FileRecord) -> list[Block]:
    """A flat as blocks, in order, without gap."""
    blocks: list[Block] = []
    first, runs = 0, record.digests
    for i, (lo, hi, _) in enumerate(runs):
        if hi - lo > LONG_BYTES:
            blocks += [Block(at, min(at + BLOCK_BYTES, hi), i, i + 1, True) for at in range(lo, hi, BLOCK_BYTES)]
            first = i + 1
        elif i + 1 == len(runs) or runs[i + 1][1] - runs[first][0] > BLOCK_BYTES:
            blocks.append(Block(runs[first][0], hi, first, i + 1))
            first = i + 1
    return blocks


class DataFile:
    """One file of a rank; nothing is opened before it is read.

    Args:
        path: of the file.
        record: what the rank's index says of it.
        layout: what stands where in it.
        rank, world: whose it is.
        parameters: of the checkpoint.
        verify: what is compared before values are given: every run touched, a sample, or sizes alone.

    Attributes:
        blocks: of the flat, in order.
        before, after: the rank's files that its index names before and after this one.
    """

    before: DataFile | None = None
    after: DataFile | None = None

    def __init__(
        self,
        path: Path,
        record: FileRecord,
        layout: tuple[Interval, ...],
        rank: int,
        world: int,
        parameters: Mapping[str, ParameterFacts],
        verify: Verify,
    ) -> None:
        self.path, self.record, self.layout, self.rank, self.world = path, record, layout, rank, world
        self.parameters, self.verify = parameters, verify
        self.blocks = cut_blocks(record)
        self._lock, self._is_checked = threading.Lock(), False
        self._checked_runs: set[int] = set()

    def read_block(self, index: int, buffer: Tensor) -> Tensor:
        """Read one block and check it.

        Args:
            buffer: bytes in host memory that begins on a page, as many as ``buffer_bytes`` says.

        Returns:
            The block's bytes, a view of ``buffer``.

        Raises:
            CorruptCheckpoint: they are not what was written.
        """
        block = self.blocks[index]
        with opened(self.path, direct=True) as (descriptor, size):
            self._check(descriptor, size)
            if block.is_part:
                self._check_long_run(descriptor, block.first)
            held = self._read(descriptor, block.lo, block.hi, buffer)
        view = bytes_of(held)
        for i in range(block.first, block.last) if not block.is_part else ():
            lo, hi, digest = self.record.digests[i]
            if self._is_compared(i) and digest_of(view[lo - block.lo : hi - block.lo]) != digest:
                raise self._damaged(lo, hi)
        return held

    def buffer_bytes(self, index: int) -> int:
        """What ``read_block`` reads into: whole pages around the block."""
        block = self.blocks[index]
        return whole_pages(block.hi) - block.lo // PAGE_BYTES * PAGE_BYTES

    def is_compared(self, index: int) -> bool:
        """Whether reading a block compares a digest."""
        block = self.blocks[index]
        return any(self._is_compared(i) for i in range(block.first, block.last))

    def check_header(self) -> None:
        """Compare size and header, if nobody has yet.

        Raises:
            CorruptCheckpoint: they are not what was written.
        """
        if not self._is_checked:
            with opened(self.path) as (descriptor, size):
                self._check(descriptor, size)

    def _is_compared(self, run: int) -> bool:
        return self.verify == "full" or (self.verify == "sampled" and run % SAMPLED_RUNS == 0)

    def _damaged(self, lo: int, hi: int) -> CorruptCheckpoint:
        begin = self.record.begin
        return CorruptCheckpoint(
            f"{self.path}: bytes [{begin + lo:,}, {begin + hi:,}) are not what was written: their digest does not match"
        )

    def _read(self, descriptor: int, lo: int, hi: int, buffer: Tensor) -> Tensor:
        """Bytes [lo, hi) of the flat, by whole pages."""
        start, end = lo // PAGE_BYTES * PAGE_BYTES, whole_pages(hi)
        fill(descriptor, self.record.begin + start, bytes_of(buffer[: end - start]), self.path)
        return buffer[lo - start : hi - start]

    def _check_long_run(self, descriptor: int, run: int) -> None:
        """Once: the digest of a run that no buffer holds."""
        with self._lock:
            if run in self._checked_runs or not self._is_compared(run):
                return
            lo, hi, digest = self.record.digests[run]
            state, buffer = xxhash.xxh3_64(), host_empty(BLOCK_BYTES + PAGE_BYTES, torch.uint8)
            for at in range(lo, hi, BLOCK_BYTES):
                state.update(bytes_of(self._read(descriptor, at, min(at + BLOCK_BYTES, hi), buffer)))
            if state.hexdigest() != digest:
                raise self._damaged(lo, hi)
            self._checked_runs.add(run)

    def _check(self, descriptor: int, size: int) -> None:
        """Once: the size, and that the header is the one that was written and says what the index says."""
        if size != self.record.file_bytes:
            raise CorruptCheckpoint(
                f"{self.path} has {size:,} bytes, must have {self.record.file_bytes:,}: it was cut off or replaced"
            )
        with self._lock:
            if not self._is_checked and self.verify != "none":
                self._check_header(descriptor)
            self._is_checked = True

    def _check_header(self, descriptor: int) -> None:
        if self.record.begin > 8 + MAX_HEADER_BYTES:
            raise CorruptCheckpoint(f"{self.path}: a header of {self.record.begin:,} bytes is no header of the format")
        held = host_empty(self.record.begin, torch.uint8)
        fill(descriptor, 0, bytes_of(held), self.path)
        content = bytes_of(held)
        if digest_of(content) != self.record.header:
            raise CorruptCheckpoint(f"{self.path}: the header, bytes [0, {len(content):,}), is not what was written")
        try:
            if int.from_bytes(content[:8], "little") != len(content) - 8:
                raise ValueError(f"it says that it has {int.from_bytes(content[:8], 'little'):,} bytes")
            self._compare_header(json.loads(bytes(content[8:])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise CorruptCheckpoint(f"{self.path}: the header is not of this format: {reason}") from error

    def _compare_header(self, header: dict[str, Any]) -> None:
        """What the header names must be what the index says; it may name more."""
        record, size = self.record, self.record.dtype.itemsize
        facts = header["__metadata__"]
        said = {
            "kind": record.kind,
            "bucket": record.bucket,
            "dtype": DTYPES[record.dtype],
            "numel": str(record.numel),
            "rank": str(self.rank),
            "world": str(self.world),
        }
        for key, value in said.items():
            if facts[key] != value:
                raise ValueError(f"its {key} is {facts[key]!r:.80}, in the index it is {value!r}")
        for i in self.layout:
            if i.hi > i.lo:
                piece = Piece.of(i.name, self.parameters[i.name].shape, i.start, i.lo, i.hi)
                places = [piece.start * size, (piece.start + piece.numel) * size]
                if header[piece.name]["data_offsets"] != places or header[piece.name]["dtype"] != said["dtype"]:
                    raise ValueError(f"{piece.name!r} stands elsewhere than the index says")
