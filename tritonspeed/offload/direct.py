"""Files read and written around the page cache, by a few threads, straight from and to tensors.

The page cache costs a copy and evicts what training needs; ``O_DIRECT`` moves pages between disk and buffer by
themselves: 2,950 MiB/s read where a copy out of a map took 730 to 1,770, at a tenth of the CPU time. It wants offsets,
lengths and addresses on pages. The last part of a page, where a run ends within one, goes through a page of its own.

A file system that refuses it (some network and memory disks) is read and written through the cache, whose pages are
dropped again; a warning says so once.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.offload.page_file import free_bytes, whole_pages

_log = logging.getLogger("tritonspeed")
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or name a folder on another one (nvme_path)",
    errno.EDQUOT: "the quota is used up: free space, or name a folder on another disk (nvme_path)",
    errno.EFBIG: "a limit on the size of files is in the way: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only, perhaps after an error of the disk: see the kernel's log (dmesg)",
    errno.EIO: "the disk failed: see the kernel's log (dmesg) and the disk's own (smartctl); move to another disk",
}


class DiskError(OSError):
    """A request that failed: which file, where in it, why, and what to do. ``errno`` is the system's."""


@dataclass
class Traffic:
    """What went over the link to the disk. Seconds are those in which at least one request was under way.

    Attributes:
        read_bytes, written_bytes: moved.
        read_seconds, write_seconds: busy with it; writing includes waiting for the disk to have it (fdatasync).
    """

    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _under_way: dict[str, int] = field(default_factory=lambda: {"read": 0, "write": 0}, repr=False, compare=False)
    _since: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    @contextmanager
    def busy(self, way: str, num_bytes: int) -> Iterator[None]:
        """Count a request while it is under way; ``way`` is read or write. One that fails moves nothing."""
        with self._lock:
            if self._under_way[way] == 0:
                self._since[way] = time.perf_counter()
            self._under_way[way] += 1
        moved = 0
        try:
            yield
            moved = num_bytes
        finally:
            with self._lock:
                self._under_way[way] -= 1
                seconds = time.perf_counter() - self._since[way] if self._under_way[way] == 0 else 0.0
                if way == "read":
                    self.read_bytes += moved
                    self.read_seconds += seconds
                else:
                    self.written_bytes += moved
                    self.write_seconds += seconds


class Pool:
    """The threads that carry out requests, shared by all files of a folder."""

    def __init__(self, requests: Requests) -> None:
        self.block_bytes = whole_pages(requests.block_bytes)
        num_threads = max(requests.depth, requests.threads)  # a thread waits for one request at a time
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tritonspeed-disk")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="tritonspeed-digest")
        self.traffic = Traffic()
        self.is_closed = False

    def start(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """``work(*args)``, a request, in one of the threads."""
        return self._threads.submit(work, *args)

    def start_beside(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """``work(*args)``, no request, in a thread of its own: among the others, digests took 3 % of a step's time."""
        return self._beside.submit(work, *args)

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        self.is_closed = True
        self._threads.shutdown()
        self._beside.shutdown()


class Requested:
    """A handle of several requests."""

    def __init__(self, futures: Sequence[Future[Any]]) -> None:
        self.futures = futures

    def wait(self) -> None:
        """Until all have ended, so that the buffer is free again; then raises the first error, every time."""
        errors = [error for future in self.futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]


class DirectFile:
    """An open file of a fixed size; ``begin`` is where its contents start, offsets below count from there.

    Args:
        path: of a file that exists and is as long as it will be, in whole pages.
        pool: carries out the requests.
        begin: in bytes, on a page.
        num_bytes: of the contents; requests stay within.

    Attributes:
        is_direct: the page cache is not used.
        is_dirty: written to since the last ``sync``.
        holders: who needs the bytes as they are, by any number of theirs.
    """

    _descriptor = -1  # until it is open

    def __init__(self, path: str | os.PathLike[str], pool: Pool, begin: int, num_bytes: int) -> None:
        assert begin % PAGE_BYTES == 0, f"{path}: contents begin at {begin}, not on a page"
        self.path, self.begin, self.num_bytes, self.is_dirty = Path(path), begin, num_bytes, True
        self.holders: set[int] = set()
        self._pool = pool
        self._fallback_lock = threading.Lock()
        self._descriptor, self.is_direct = _open(path)
        if not self.is_direct:
            _say_buffered(self.path)

    @property
    def is_shared(self) -> bool:
        """Somebody else has it too, under another name or held: its bytes must stay as they are."""
        return bool(self.holders) or os.fstat(self._descriptor).st_nlink > 1

    @property
    def descriptor(self) -> int:
        """For what is no request."""
        return self._descriptor

    def read(self, offset: int, into: Tensor) -> Requested:
        """Start reading into ``into``, contiguous in host memory that begins on a page; ``offset`` is on a page."""
        view = self._view(offset, into)
        return Requested([self._pool.start(self._read, at, part) for at, part in self._blocks(offset, view)])

    def write(self, offset: int, values: Tensor) -> Requested:
        """Start writing ``values``, contiguous in host memory that begins on a page; ``offset`` is on a page.

        Where they end within a page, the rest of that page becomes zeros: it must be the last one of the contents.
        """
        blocks = self._blocks_to_write(offset, values)
        return Requested([self._pool.start(self._write, at, part) for at, part in blocks])

    def write_here(self, offset: int, values: Tensor) -> None:
        """The same in the calling thread, for who has threads of its own: a hand-over less."""
        for at, part in self._blocks_to_write(offset, values):
            self._write(at, part)

    def _blocks_to_write(self, offset: int, values: Tensor) -> list[tuple[int, memoryview]]:
        view = self._view(offset, values)
        assert len(view) % PAGE_BYTES == 0 or offset + len(view) == self.num_bytes, (
            f"{self.path}: a write of [{offset}, {offset + len(view)}) ends within a page"
        )
        self.is_dirty = True
        return list(self._blocks(offset, view))

    def sync_here(self) -> None:
        """``sync`` in the calling thread."""
        self._sync()

    def sync(self) -> Requested:
        """Start making what was written survive a power cut; writes must have been waited for."""
        return Requested([self._pool.start(self._sync)])

    def close(self) -> None:
        """Give back the descriptor; no request may be under way."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _view(self, offset: int, tensor: Tensor) -> memoryview:
        assert tensor.is_contiguous() and tensor.device.type == "cpu", f"{self.path}: contiguous host memory is needed"
        assert offset % PAGE_BYTES == 0, f"{self.path}: offset {offset} is not on a page"
        assert tensor.data_ptr() % PAGE_BYTES == 0 or tensor.numel() == 0, f"{self.path}: the buffer is not on a page"
        view = bytes_of(tensor)
        assert offset + len(view) <= self.num_bytes, (
            f"{self.path}: [{offset}, {offset + len(view)}) is not within its {self.num_bytes} bytes"
        )
        return view

    def _blocks(self, offset: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Cut into requests; the last part of a page is one of its own."""
        whole, block = len(view) // PAGE_BYTES * PAGE_BYTES, self._pool.block_bytes
        for lo in range(0, whole, block):
            yield offset + lo, view[lo : min(lo + block, whole)]
        if whole < len(view):
            yield offset + whole, view[whole:]

    def _read(self, offset: int, view: memoryview) -> None:
        if len(view) % PAGE_BYTES == 0:
            self._move("read", os.preadv, offset, view)
            return
        page = bytes_of(host_empty(PAGE_BYTES, torch.uint8))
        self._move("read", os.preadv, offset, page)
        view[:] = page[: len(view)]

    def _write(self, offset: int, view: memoryview) -> None:
        if len(view) % PAGE_BYTES == 0:
            self._move("write", os.pwritev, offset, view)
            return
        page = bytes_of(host_empty(PAGE_BYTES, torch.uint8))  # fresh from the system: zeros
        page[: len(view)] = view
        self._move("write", os.pwritev, offset, page)

    def _move(self, way: str, call: Callable[[int, list[memoryview], int], int], offset: int, view: memoryview) -> None:
        """One request, to its end: the system may carry out less of it at a time."""
        with self._pool.traffic.busy(way, len(view)):
            done = 0
            while done < len(view):
                at, was_direct = self.begin + offset + done, self.is_direct
                try:
                    num_bytes = call(self._descriptor, [view[done:]], at)
                except OSError as error:
                    if error.errno == errno.EINVAL and was_direct:  # refused, or what is left begins within a page
                        self._leave_direct()
                        continue
                    raise self._explained(error, way, at, len(view) - done) from error
                if num_bytes == 0:
                    raise DiskError(
                        errno.EIO,
                        f"{way} {done} of {len(view)} bytes at {self.begin + offset}: the file was cut off at "
                        f"{os.fstat(self._descriptor).st_size} bytes while in use; start again from a checkpoint",
                        str(self.path),
                    )
                done += num_bytes
        if not self.is_direct and way == "read":
            os.posix_fadvise(self._descriptor, self.begin + offset, len(view), os.POSIX_FADV_DONTNEED)

    def _leave_direct(self) -> None:
        """From now on through the page cache; several threads may find out at once."""
        with self._fallback_lock:
            if self.is_direct:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)
                self.is_direct = False
        _say_buffered(self.path)

    def _explained(self, error: OSError, way: str, at: int, num_bytes: int) -> DiskError:
        remedy = _REMEDIES.get(error.errno or 0, "see the kernel's log (dmesg)")
        if error.errno == errno.ENOSPC:
            remedy = f"{free_bytes(self.path.parent):,} bytes are free: {remedy}"
        what = f"{way} of {num_bytes:,} bytes at {at} failed: {error.strerror}; {remedy}"
        return DiskError(error.errno, what, str(self.path))

    def _sync(self) -> None:
        now = os.fstat(self._descriptor)
        needed = self.begin + whole_pages(self.num_bytes)
        if now.st_nlink == 0 or now.st_size < needed:
            what = "was deleted" if now.st_nlink == 0 else f"was cut off at {now.st_size} of {needed} bytes"
            raise DiskError(
                errno.ENOENT if now.st_nlink == 0 else errno.EIO,
                f"the file {what} while in use: nobody else may change this folder; start again from a checkpoint",
                str(self.path),
            )
        try:
            with self._pool.traffic.busy("write", 0):
                os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._explained(error, "sync", self.begin, self.num_bytes) from error
        self.is_dirty = False
        if not self.is_direct:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _open(path: str | os.PathLike[str]) -> tuple[int, bool]:
    """(descriptor, whether it goes around the page cache)."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags | _O_DIRECT), bool(_O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return os.open(path, flags), False
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE:
            raise
        if soft == hard:
            raise DiskError(
                error.errno, f"{soft} files are open, the limit: raise it (ulimit -n)", str(path)
            ) from error
    # every flat keeps a file or two open, a large model a thousand; the soft limit is there for select()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _open(path)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


_said_buffered = False


def _say_buffered(path: Path) -> None:
    """Once per process: disk requests go through the page cache."""
    global _said_buffered
    if not _said_buffered:
        _said_buffered = True
        _log.warning(
            "%s: the file system refuses direct I/O (O_DIRECT); files are read and written through the page cache, "
            "which is slower and takes memory: name a folder on a local disk (nvme_path)",
            path.parent,
        )
