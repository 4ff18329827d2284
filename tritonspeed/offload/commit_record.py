"""The commit record of a rank's folder, and readers of what it names.

``committed.json`` says which slot of every flat belongs to the last committed step, with an xxh3_64 digest of every run
of bytes that was written. It is replaced by renaming, so it is always a whole one; the files it names are not touched
until the next one stands. ``committed(path)`` is for people and tests: a mapping of tensors that are checked as they
are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tritonspeed.offload.direct import bytes_of
from tritonspeed.offload.durable import write_durably
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import PageFile, Piece, header_bytes, read_header

FORMAT = 1
NAME = "committed.json"
READ_BYTES = 8 * 2**20


class CorruptState(Exception):
    """A folder's files are not what its commit record says; the text names the file and the bytes."""


@dataclass(frozen=True)
class FlatRecord:
    """One flat of a commit.

    Attributes:
        bucket, kind: which one.
        file: its name in the folder.
        slot: 0 or 1.
        header: xxh3_64 of the file's header, in hex.
        digests: (lo, hi, xxh3_64 in hex) of runs of the flat, in bytes; none where a flat has one slot.
    """

    bucket: str
    kind: str
    file: str
    slot: int
    header: str
    digests: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class CommitRecord:
    """A committed step: ``facts`` are the caller's, ``time`` is UTC."""

    step: int
    rank: int
    world: int
    flats: tuple[FlatRecord, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def flat_keys(self) -> set[tuple[str, str]]:
        """(bucket, kind) of all that is committed."""
        return {(flat.bucket, flat.kind) for flat in self.flats}

    def text(self) -> str:
        """As JSON, with a digest of itself."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"digest": _digest_of_json(content), **content}, indent=1) + "\n"


def _digest_of_json(content: dict[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True).encode())


def digest_of(content: bytes | memoryview) -> str:
    """xxh3_64 in hex: 27 GB/s on one core, ten times a disk."""
    return xxhash.xxh3_64_hexdigest(content)


def header_digest(file: PageFile) -> str:
    """Of the header that is written for it."""
    return digest_of(header_bytes(file))


def write_record(folder: Path, record: CommitRecord) -> None:
    """Put the record in the place of the last one: whole or not at all. The folder's entry is not synced yet."""
    write_durably(folder / NAME, record.text().encode())


def read_record(folder: Path) -> CommitRecord:
    """The folder's commit record.

    Raises:
        FileNotFoundError: nothing was committed there.
        CorruptState: it is damaged, or of another format.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
        digest = content.pop("digest")
        if digest != _digest_of_json(content):
            raise ValueError("its digest does not match")
        if (found := content.pop("format")) != FORMAT:
            raise ValueError(f"format {found}, this version reads {FORMAT}")
        flats = tuple(
            FlatRecord(digests=tuple((lo, hi, text) for lo, hi, text in flat.pop("digests")), **flat)
            for flat in content.pop("flats")
        )
        return CommitRecord(flats=flats, **content)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: nothing was committed in this folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptState(f"{path}: the commit record is damaged: {error}") from error


class Committed(Mapping[str, Tensor]):
    """``{f"{kind}/{name}": tensor}`` of a rank's folder, read when asked for and checked before it is handed out.

    Flats with one slot have no digests and are not checked. A folder that a run is writing to is read as it was when
    this was made; two steps later its slots have been written again, and a read says so.

    Attributes:
        record: step, time, facts, and the digests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, read_record(folder)
        self._places: dict[str, tuple[_CheckedFile, Piece]] = {}
        self._files = [_CheckedFile(folder, flat, self._reason) for flat in self.record.flats]
        for file in self._files:
            for piece in file.contents.pieces:
                self._places[f"{file.flat.kind}/{piece.name}"] = (file, piece)

    def __getitem__(self, name: str) -> Tensor:
        file, piece = self._places[name]
        return file.read(piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check_all(self) -> None:
        """Read every run and compare its digest."""
        for file in self._files:
            file.check(0, file.contents.flat_bytes)

    def _reason(self) -> str:
        with suppress(CorruptState, FileNotFoundError):
            if (now := read_record(self.folder)) != self.record:
                return f"a run has gone on to step {now.step} meanwhile: read the folder again"
        return "the file was damaged or changed by somebody else"


class _CheckedFile:
    """A committed file; bytes are handed out once their runs' digests were right."""

    def __init__(self, folder: Path, flat: FlatRecord, reason: Any) -> None:
        self.path, self.flat, self._reason = folder / flat.file, flat, reason
        try:
            self.contents, self._begin = read_header(self.path)
        except (OSError, ValueError) as error:
            raise CorruptState(f"{error}; committed as {flat.kind} of {flat.bucket}") from error
        if header_digest(self.contents) != flat.header:
            raise CorruptState(f"{self.path}: the header is not the committed one")
        self._checked: set[int] = set()

    def check(self, lo: int, hi: int) -> None:
        """Compare the digests of all runs that share a byte with [lo, hi)."""
        with open(self.path, "rb", buffering=0) as stream:
            for start, end, wanted in self.flat.digests:
                if start < hi and end > lo and start not in self._checked:
                    if self._digest(stream.fileno(), start, end) != wanted:
                        raise CorruptState(f"{self.path}: bytes [{start}, {end}) of the flat: {self._reason()}")
                    self._checked.add(start)

    def _digest(self, descriptor: int, lo: int, hi: int) -> str:
        digest, block = xxhash.xxh3_64(), bytearray(min(READ_BYTES, hi - lo))
        for start in range(lo, hi, READ_BYTES):
            view = memoryview(block)[: min(READ_BYTES, hi - start)]
            self._read_into(descriptor, start, view)
            digest.update(view)
        os.posix_fadvise(descriptor, self._begin + lo, hi - lo, os.POSIX_FADV_DONTNEED)
        return digest.hexdigest()

    def _read_into(self, descriptor: int, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            num_bytes = os.preadv(descriptor, [view[done:]], self._begin + start + done)
            if num_bytes == 0:
                raise CorruptState(f"{self.path}: cut off at byte {start + done} of the flat: {self._reason()}")
            done += num_bytes

    def read(self, piece: Piece) -> Tensor:
        """A tensor of its own."""
        size = self.contents.dtype.itemsize
        lo, hi = piece.start * size, (piece.start + piece.numel) * size
        self.check(lo, hi)
        tensor = host_empty(piece.numel, self.contents.dtype)
        with open(self.path, "rb", buffering=0) as stream:
            self._read_into(stream.fileno(), lo, bytes_of(tensor))
        return tensor.view(torch.Size(piece.shape))


def committed(path: str | os.PathLike[str]) -> Committed:
    """What the last commit of a rank's folder holds.

    Raises:
        FileNotFoundError: nothing was committed there.
        CorruptState: now, for the record and headers; when a tensor is read, for its bytes.
    """
    return Committed(Path(path))


def verify(path: str | os.PathLike[str]) -> int:
    """Compare every digest of a rank's folder.

    Returns:
        The committed step.

    Raises:
        FileNotFoundError: nothing was committed there.
        CorruptState: what is wrong, and where.
    """
    found = Committed(Path(path))
    found.check_all()
    return found.record.step
