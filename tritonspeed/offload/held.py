"""A slot that stays as it is while training goes on: the file of a checkpoint, without a byte copied.

A committed slot is a whole safetensors file whose digests are known. ``hold`` gives it a second name in the folder, in
microseconds; the flat then never writes into that file again, but makes itself another one before it next would.
``place`` links it into a checkpoint. Where that disk is another one, or knows no links, the extents are shared
(FICLONE), or the bytes are copied, while the next steps run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Literal

import xxhash
from torch import Tensor

from tritonspeed.offload.commit_record import CorruptState
from tritonspeed.offload.direct import DirectFile, DiskError, Pool, Requested, bytes_of
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.page_file import PageFile, create
from tritonspeed.offload.runs import Run, Runs

COPY_BYTES = 8 * 2**20  # read at once: one request; two of them are in memory for each file that is copied
Way = Literal["linked", "reflinked", "copied"]

_FICLONE = 0x40049409
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
_numbers = count()


class Held:
    """One slot of a flat, as it was when ``DiskFlat.hold`` was called; what the run does since does not show.

    Everything here may be called in other threads, ``read`` in several at once. Bytes can be read while the folder is
    open.

    Attributes:
        contents: what the file holds; ``header_digest(contents)`` is that of its header.
    """

    _file: DirectFile | None = None
    _name: Path | None = None  # the second one, where the file system has them

    def __init__(self, file: DirectFile, contents: PageFile, runs: Runs, pool: Pool) -> None:
        self.contents, self._pool, self._source, self._process = contents, pool, file, os.getpid()
        self._opening, self._is_durable = threading.Lock(), not file.is_dirty
        self._runs = Runs([*runs])
        for lo, hi in runs.gaps(0, contents.flat_bytes):
            self._runs.add(Run(lo, hi))
        name = file.path.with_name(f".held-{next(_numbers)}.{file.path.name}")
        try:
            os.link(file.path, name)
            self._name = name
        except OSError:  # an open file keeps its bytes too, without a name
            self._file = DirectFile(file.path, pool, file.begin, file.num_bytes)
        file.holders.add(id(self))

    def read(self, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi), (hi - lo,) in host memory; blocks, any alignment."""
        size, numel = self.contents.dtype.itemsize, self.contents.numel
        if not 0 <= lo <= hi <= numel:
            raise ValueError(f"{self._source.path}: [{lo}, {hi}) is not within [0, {numel})")
        page = PAGE_BYTES // size
        first, last = lo // page * page, min(-(-hi // page) * page, numel)
        values = host_empty(last - first, self.contents.dtype)
        self._open().read(first * size, values).wait()
        return values[lo - first : hi - first]

    def digests(self) -> tuple[tuple[int, int, str], ...]:
        """(lo, hi, xxh3_64 in hex) of runs of the flat, in bytes, in order: together they are all of it.

        Those of what a step stored are known; the rest is read, unless ``place`` has copied it by then.
        """
        if any(run.digest is None for run in self._runs):
            for _ in self._checked():
                pass
        return tuple((run.lo, run.hi, run.known_digest() or "") for run in self._runs)

    def place(self, path: str | os.PathLike[str]) -> Way:
        """Put the file under ``path`` as well, durably; the folder's entry is the caller's to sync.

        What is linked or reflinked is not read. What is copied goes through the folder's pool, around the page cache,
        and is checked against the digests.

        Returns:
            How.

        Raises:
            DiskError: which disk, and what to do; nothing is left under ``path``.
            CorruptState: the slot's bytes are not those that were written.
        """
        path = Path(path)
        if self._link(path):
            way: Way = "linked"
        else:
            way = "reflinked" if self._reflink(path) else "copied"
        try:
            if way == "copied":
                self._copy(path)
            if way != "linked" or not self._is_durable:  # else its name alone is new: a sync took 1.5 to 3 ms a file
                _sync(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return way

    def release(self) -> None:
        """The file is not needed any more; where it was placed, it stays."""
        self._source.holders.discard(id(self))
        if self._name is not None:
            with suppress(OSError):  # the folder may be gone, or read-only; its next run clears it
                self._name.unlink()
            self._name = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if hasattr(self, "_source") and self._process == os.getpid():  # not a forked child, that of a data loader
            self.release()

    def _link(self, path: Path) -> bool:
        if self._name is None:
            return False
        try:
            os.link(self._name, path)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise DiskError(error.errno, f"{self._name} could not be linked: {error.strerror}", str(path)) from error
        return True

    def _reflink(self, path: Path) -> bool:
        """Whether the file system shares extents; then ``path`` has them."""
        source = os.open(self._readable, os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.ioctl(target, _FICLONE, source)
            except OSError:
                path.unlink()
                return False
            finally:
                os.close(target)
        finally:
            os.close(source)
        return True

    def _copy(self, path: Path) -> None:
        target = DirectFile(path, self._pool, create(path, self.contents), self.contents.flat_bytes)
        written: deque[Requested] = deque()
        try:
            for lo, tile in self._checked(written):
                written.append(target.write(lo, tile))
            while written:
                written.popleft().wait()
        finally:
            for handle in written:  # after an error: their buffers are about to go
                with suppress(OSError):
                    handle.wait()
            target.close()

    def _checked(self, written: deque[Requested] | None = None) -> Iterator[tuple[int, Tensor]]:
        """(byte, values) of all of the flat in order, each next tile on its way; digests are compared, or learned.

        Args:
            written: what is under way with tiles that were given out, oldest first: two of them take turns.
        """
        file, size, tiles = self._open(), self.contents.dtype.itemsize, list(self._tiles())
        longest = max((hi - lo for lo, hi, _ in tiles), default=0)
        buffers = [host_empty(longest // size, self.contents.dtype) for _ in tiles[:2]]
        reads: deque[Requested] = deque()
        state, known = xxhash.xxh3_64(), []

        def start(number: int) -> None:
            if number < len(tiles):
                lo, hi, _ = tiles[number]
                reads.append(file.read(lo, buffers[number % 2][: (hi - lo) // size]))

        start(0)
        try:
            for number, (lo, hi, run) in enumerate(tiles):
                reads.popleft().wait()
                if written:
                    written.popleft().wait()
                start(number + 1)
                tile = buffers[number % 2][: (hi - lo) // size]
                state.update(bytes_of(tile))
                if hi == run.hi:
                    known.append(Run(run.lo, hi, self._compared(run, state.hexdigest())))
                    state.reset()
                yield lo, tile
        finally:
            for handle in reads:
                with suppress(OSError):
                    handle.wait()
        self._runs = Runs(known)

    def _tiles(self) -> Iterator[tuple[int, int, Run]]:
        for run in self._runs:
            for lo in range(run.lo, run.hi, COPY_BYTES):
                yield lo, min(lo + COPY_BYTES, run.hi), run

    def _compared(self, run: Run, digest: str) -> str:
        if (run.known_digest() or digest) != digest:
            raise CorruptState(
                f"{self._source.path}: bytes [{run.lo}, {run.hi}) of the flat are not what was written: the disk lost "
                "them, or somebody else changed the file; load the last checkpoint that verifies"
            )
        return digest

    @property
    def _readable(self) -> str:
        """A path that leads to the file."""
        return str(self._name) if self._name is not None else f"/proc/self/fd/{self._open().descriptor}"

    def _open(self) -> DirectFile:
        if self._pool.is_closed:
            raise ValueError(f"{self._source.path}: its folder was closed before the checkpoint was written")
        with self._opening:
            if self._file is None:
                assert self._name is not None, f"{self._source.path}: read after its release"
                self._file = DirectFile(self._name, self._pool, self._source.begin, self._source.num_bytes)
            return self._file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise DiskError(error.errno, f"sync failed: {error.strerror}", str(path)) from error
    finally:
        os.close(descriptor)
