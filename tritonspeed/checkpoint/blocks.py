"""Blocks of a checkpoint's files in memory, checked: those in use, and the next ones on their way.

    file       |----|----|----|----|----|----|----|----|
                used held now  coming ----->                the next ones are read and digested by threads meanwhile

What comes next is seen from what came: block after block of a file, and file after file of a rank. Memory is bounded:
reading ahead takes the place of what was read through, never of what is being read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor

from tritonspeed.checkpoint.data_file import DataFile
from tritonspeed.offload.direct import bytes_of
from tritonspeed.offload.memory import HUGE_PAGE_BYTES, PAGE_BYTES, host_empty

HELD_BYTES = 128 * 2**20
AHEAD_BYTES = 48 * 2**20
MOST_AHEAD = 64  # blocks
FILES_IN_USE = 4  # read in turn, as an optimizer's states are: what was read of them last stays
RETURNED_BYTES = 2 * 2**20  # what is smaller is the allocator's affair
THREADS = 4

Key = tuple[DataFile, int]


@dataclass(slots=True)
class _Held:
    """A block: ``coming`` gives its bytes, in ``buffer``.

    Attributes:
        users: how many are reading from it.
        is_used: somebody has.
    """

    buffer: Tensor
    coming: Future[Tensor]
    users: int = 0
    is_used: bool = False


class Blocks:
    """Gives blocks, reads ahead, and keeps as many as fit.

    Args:
        held_bytes: of memory at most, but for what is being read from.
        ahead_bytes: beyond what was asked for, of one file.
        on_bytes: told of the bytes of each block that was read, when it is given.
    """

    def __init__(
        self,
        held_bytes: int = HELD_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.held_bytes, self.ahead_bytes, self._on_bytes = held_bytes, ahead_bytes, on_bytes
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._held: OrderedDict[Key, _Held] = OrderedDict()  # least recently used first
        self._free: list[Tensor] = []
        self._total_bytes = 0  # of both
        self._returned: deque[Tensor] = deque(maxlen=2)
        self._at: dict[DataFile, int] = {}  # the block of each that was asked for last
        self._in_a_row: dict[DataFile, int] = {}  # how many have followed one another
        self._from_start: set[DataFile] = set()  # whose first block came first
        self._in_order: set[DataFile] = set()  # and so did that of the file before
        self._in_use: OrderedDict[DataFile, None] = OrderedDict()

    @contextmanager
    def block(self, file: DataFile, index: int, last: int = 0) -> Iterator[Tensor]:
        """A block's bytes, checked, to be read from in the ``with`` statement.

        Args:
            last: blocks up to this one of the file are asked for next.

        Raises:
            CorruptCheckpoint: they are not what was written.
        """
        key = (file, index)
        with self._lock:
            held = self._ask(key)
            held.users += 1
            self._read_ahead(key, last)
        try:
            try:
                values = held.coming.result()
            except BaseException:
                with self._lock:
                    if self._held.get(key) is held and held.coming.done():  # not so where Ctrl-C ended the waiting
                        self._free.append(self._held.pop(key).buffer)
                raise
            is_first, held.is_used = not held.is_used, True
            if is_first and self._on_bytes is not None:
                self._on_bytes(values.numel())
            yield values
        finally:
            with self._lock:
                held.users -= 1

    def _ask(self, key: Key) -> _Held:
        """Start reading a block that is not held."""
        held = self._held.get(key)
        if held is None:
            buffer = self._buffer(key, is_awaited=True)
            assert buffer is not None, "a block that somebody waits for always has room"
            held = self._start(key, buffer)
        self._held.move_to_end(key)
        return held

    def _start(self, key: Key, buffer: Tensor) -> _Held:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tritonspeed-load")
        file, index = key
        held = self._held[key] = _Held(buffer, self._threads.submit(file.read_block, index, buffer))
        return held

    def _buffer(self, key: Key, is_awaited: bool) -> Tensor | None:
        """Memory for a block; None where there is none, which is never so if somebody waits for it."""
        capacity = _capacity(key[0].buffer_bytes(key[1]))
        victims: list[Key] | None = None
        while True:
            for i, buffer in enumerate(self._free):
                if buffer.numel() == capacity:
                    return self._free.pop(i)
            if self._total_bytes + capacity > self.held_bytes:
                if self._free:
                    self._total_bytes -= self._free.pop().numel()
                    continue
                victims = self._to_go(is_awaited) if victims is None else victims
                if victims:
                    self._free.append(self._held.pop(victims.pop(0)).buffer)
                    continue
                if not is_awaited:
                    return None
            self._total_bytes += capacity
            return host_empty(capacity, torch.uint8)

    def _to_go(self, is_awaited: bool) -> list[Key]:
        """Blocks that may be given up, best first: those read through; for one that is waited for, any."""
        idle = [key for key, held in self._held.items() if not held.users and held.coming.done()]
        in_use = {(file, self._at[file]) for file in self._in_use}
        through = [key for key in idle if self._held[key].is_used and key not in in_use]
        return through + [key for key in idle if key not in through] if is_awaited else through

    def _read_ahead(self, key: Key, last: int) -> None:
        """Start what comes next, as far as there is room."""
        left = self.ahead_bytes
        for at in self._next(key, last):
            left -= at[0].buffer_bytes(at[1])
            if left < 0:
                return
            if at not in self._held:
                buffer = self._buffer(at, is_awaited=False)
                if buffer is None:
                    return
                self._start(at, buffer)

    def _next(self, key: Key, last: int) -> Iterator[Key]:
        """What will be asked for after ``key``, as far as it is known, or likely."""
        file, index = key
        self._note(file, index)
        # twice as far with each block that follows the one before: a read in one place reads little in vain
        end = max(last + 1, index + 2 ** min(self._in_a_row[file], MOST_AHEAD.bit_length()))
        yield from ((file, i) for i in range(index + 1, min(end, len(file.blocks))))
        # and where file after file was read from its beginning, so will be the next
        left = min(end - len(file.blocks), MOST_AHEAD)
        after = file.after if file in self._in_order else None
        while left > 0 and after is not None and after not in self._at:
            yield from ((after, i) for i in range(min(left, len(after.blocks))))
            left, after = left - len(after.blocks), after.after

    def _note(self, file: DataFile, index: int) -> None:
        """Where in its files the reader is."""
        self._in_use[file] = None
        self._in_use.move_to_end(file)
        if len(self._in_use) > FILES_IN_USE:
            self._in_use.popitem(last=False)
        before = self._at.get(file)
        if before == index:
            return
        self._at[file] = index
        in_a_row = self._in_a_row.get(file, 0) if before is not None and before + 1 == index else -1
        if before is None and index == 0:
            self._from_start.add(file)
            if file.before is not None and file.before in self._from_start:
                self._in_order.add(file)
                in_a_row = self._in_a_row[file.before]
        self._in_a_row[file] = in_a_row + 1

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for values that are given away, (numel,).

        What is large comes back when the last tensor on it is garbage, and is given again: a fifth of a load's time
        went into pages fresh from the system.
        """
        num_bytes = numel * dtype.itemsize
        if num_bytes < RETURNED_BYTES:
            return torch.empty(numel, dtype=dtype)
        capacity, buffer = _capacity(num_bytes), None
        with suppress(IndexError):  # no lock: what comes back does so at any moment, in any thread
            buffer = self._returned.popleft()
        if buffer is None or buffer.numel() != capacity:
            buffer = host_empty(capacity, torch.uint8)
        view = bytes_of(buffer)  # the tensor holds this, and this nothing else
        finalize(view, self._returned.append, buffer)
        return torch.frombuffer(view, dtype=dtype, count=numel)

    def close(self) -> None:
        """Let go of the memory and the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        with self._lock:
            self._held.clear()
            self._free.clear()
            self._total_bytes = 0
        self._returned = deque(maxlen=0)


def _capacity(num_bytes: int) -> int:
    """Of a buffer for so many bytes: few different sizes, so that they are used again."""
    if num_bytes >= HUGE_PAGE_BYTES:
        return -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    return max(PAGE_BYTES, 1 << (num_bytes - 1).bit_length())
