"""Records become files: copied into page-aligned memory where they are not in such, digested, written around the cache.

A few threads each take a run of 8 MiB at a time: one copies or digests while others wait for the disk. Files are made
at their full size first, so that a disk without room for all of them is found before anything is written.

Of what a new file takes bare (fallocate, the same requests with O_DIRECT by four threads, fdatasync; medians of paired
rounds in turns, 2 cores shared by a load of 7 to 11, a virtual disk of 2.7 to 4.7 GB/s): 2 GiB in 32 files on pages 90
to 130 %, copied 76 to 89 %; 512 MiB in one file 80 %; 300 files of 1 MiB 73 to 83 %. A whole save of 1 GiB in 32 files,
commit included, 85 to 94 %.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from tritonspeed.checkpoint.manifest import FileRecord, Interval
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.commit_record import digest_of, header_digest
from tritonspeed.offload.direct import DirectFile, Pool, bytes_of
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.offload.page_file import PageFile, create, free_bytes, header_bytes

RUN_BYTES = 8 * 2**20  # of what has one digest: also the most that a reader of a few elements reads in vain
MOST_OPEN_FILES = 512  # synced together
MOST_NAME_BYTES = 200
Digests = tuple[tuple[int, int, str], ...]
_PART = re.compile(r"(?P<name>.*)\[(?P<lo>\d+):(?P<hi>\d+)\]", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Written:
    """What an index says of a rank's files.

    Attributes:
        files, layouts: as in ``RankIndex``.
        num_bytes: of the files.
    """

    files: tuple[FileRecord, ...]
    layouts: tuple[tuple[Interval, ...], ...]
    num_bytes: int


def layout_of(file: PageFile, parameters: Mapping[str, ParameterFacts]) -> tuple[Interval, ...]:
    """Which parameters' elements stand where in a file, by the names of its tensors.

    Args:
        parameters: all there are, by name.

    Raises:
        ValueError: a tensor's name is no parameter's, nor a part of one.
    """
    found = []
    for piece in file.pieces:
        if piece.name in parameters:
            found.append(Interval(piece.name, 0, piece.numel, piece.start))
            continue
        part = _PART.fullmatch(piece.name)
        if part is None or part["name"] not in parameters:
            raise ValueError(f"{file.kind} of {file.bucket}: {piece.name!r} is no parameter, nor a part of one")
        found.append(Interval(part["name"], int(part["lo"]), int(part["hi"]), piece.start))
    return tuple(found)


def file_name(file: PageFile) -> str:
    """``layers.0.master.safetensors``; a name that is too long for file systems ends with its digest."""
    stem = f"{quote(file.bucket, safe='')}.{quote(file.kind, safe='')}"
    if len(stem) > MOST_NAME_BYTES:
        stem = f"{stem[: MOST_NAME_BYTES - 17]}.{digest_of(stem.encode())}"
    return f"{stem}.safetensors"


class Writer:
    """Writes records into files.

    Args:
        requests: sizes and numbers of disk requests.
    """

    def __init__(self, requests: Requests) -> None:
        self._pool = Pool(requests)
        # as many as there are requests under way, and two that copy and digest meanwhile
        self._threads = ThreadPoolExecutor(max(requests.depth, requests.threads) + 2, "tritonspeed-save")
        self._own = threading.local()

    def write(self, folder: Path, records: Sequence[Record], parameters: Mapping[str, ParameterFacts]) -> Written:
        """Write files into ``folder``, until the disk has them; held slots are placed there. It is not synced itself.

        Raises:
            OSError: the disk is full, with needed and free bytes; or another reason of the system's.
        """
        held, rest = [r for r in records if r.held is not None], [r for r in records if r.held is None]
        begins = _create(folder, rest)
        digests = self._place(folder, held)
        for first in range(0, len(rest), MOST_OPEN_FILES):
            digests.update(self._write_some(folder, rest[first : first + MOST_OPEN_FILES], begins))
        numbers: dict[tuple[Interval, ...], int] = {}
        files = []
        for record in records:
            file, name = record.file, file_name(record.file)
            number = numbers.setdefault(layout_of(file, parameters), len(numbers))
            begin = begins[name] if name in begins else len(header_bytes(file))
            header = header_digest(file)
            files.append(
                FileRecord(name, file.bucket, file.kind, file.dtype, file.numel, number, begin, header, digests[name])
            )
        return Written(tuple(files), tuple(numbers), sum(each.file_bytes for each in files))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._pool.close()

    def _place(self, folder: Path, records: Sequence[Record]) -> dict[str, Digests]:
        def place(record: Record) -> Digests:
            assert record.held is not None, f"{record.file.kind} of {record.file.bucket}: not held"
            record.held.place(folder / file_name(record.file))
            return record.held.digests()

        futures = {file_name(record.file): self._threads.submit(place, record) for record in records}
        wait(futures.values())
        return {name: future.result() for name, future in futures.items()}

    def _write_some(self, folder: Path, records: Sequence[Record], begins: Mapping[str, int]) -> dict[str, Digests]:
        """Write, then sync all together: a journal is committed once for many files."""
        opened: list[DirectFile] = []
        runs: dict[str, list[tuple[int, int, Future[str]]]] = {}
        futures: list[Future[str]] = []
        syncs: list[Future[None]] = []
        try:
            for record in records:
                name, size = file_name(record.file), record.file.dtype.itemsize
                file = DirectFile(folder / name, self._pool, begins[name], record.file.flat_bytes)
                opened.append(file)
                runs[name] = []
                step = RUN_BYTES // size
                for lo in range(0, record.file.numel, step):
                    hi = min(lo + step, record.file.numel)
                    future = self._threads.submit(self._write_run, file, record.read, lo, hi, size)
                    futures.append(future)
                    runs[name].append((lo * size, hi * size, future))
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.result()
            syncs += [self._threads.submit(file.sync_here) for file in opened]
            for future in syncs:
                future.result()
        finally:
            rest: list[Future[Any]] = [*futures, *syncs]
            for future in rest:
                future.cancel()
            wait(rest)
            for file in opened:
                file.close()
        return {name: tuple((lo, hi, made.result()) for lo, hi, made in each) for name, each in runs.items()}

    def _write_run(self, file: DirectFile, read: Callable[[int, int], Tensor], lo: int, hi: int, size: int) -> str:
        values = self._on_pages(read(lo, hi).detach().reshape(-1))
        digest = digest_of(bytes_of(values))
        file.write_here(lo * size, values)
        return digest

    def _on_pages(self, values: Tensor) -> Tensor:
        """The values where direct I/O can take them from: where they are, or in memory that this thread keeps."""
        device = values.device.type
        if device == "cpu" and values.data_ptr() % PAGE_BYTES == 0:
            return values
        if self._own.__dict__.get("device") != device:
            self._own.device = device
            self._own.stage = host_empty(RUN_BYTES, torch.uint8, pin=device != "cpu")
        staged = self._own.stage[: values.nbytes]
        if device == "cpu":  # torch's copy would wake its own threads in each of ours
            np.copyto(staged.numpy(), values.view(torch.uint8).numpy())
            return staged.view(values.dtype)
        return staged.view(values.dtype).copy_(values)


def _create(folder: Path, records: Sequence[Record]) -> dict[str, int]:
    """Make all files at their full size; where the flat begins in each."""
    begins: dict[str, int] = {}
    free = free_bytes(folder)
    try:
        for record in records:
            begins[file_name(record.file)] = create(folder / file_name(record.file), record.file)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = sum(len(header_bytes(record.file)) + record.file.data_bytes for record in records)
        raise OSError(error.errno, _is_full(error.errno, needed, free), os.fspath(folder)) from error
    return begins


def _is_full(code: int, needed: int, free: int) -> str:
    if code == errno.EFBIG:
        return f"{needed:,} bytes are needed and a limit on the size of files is in the way: raise it (ulimit -f)"
    what = "disk full" if code == errno.ENOSPC else "the quota is used up"
    return f"{what}: {needed:,} bytes are needed and {free:,} are free: free some, or save into another folder"
