"""Copies between a GPU and page-locked host memory, under what the GPU computes meanwhile.

    compute   unit k-1 │ unit k          │ unit k+1        │       the current stream
    up                 │ unit k+1 arrives│ unit k+2 ...            starts after what compute had been given by then
    down               │ gradient of k+1 │ gradient of k           likewise

Each way has a stream of its own, and every copy comes after what the current stream has been given so far: its memory
may have been used for something else until there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

UP, DOWN, ASIDE = "up", "down", "aside"
_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}


def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    found = _streams.get((device, name))
    return found if found is not None else _streams.setdefault((device, name), torch.cuda.Stream(device))


class Crossing:
    """A copy under way. It keeps both ends alive until it is waited for, so no allocator is told of its stream.

    Args:
        stream, ended: what it runs on, and when it is there; None where it was made at once, on a CPU.
        ends: its two tensors.
    """

    def __init__(
        self, stream: torch.cuda.Stream | None = None, ended: torch.cuda.Event | None = None, *ends: Tensor
    ) -> None:
        self._stream, self._ended, self._ends = stream, ended, ends

    def wait(self) -> None:
        """Until it is there: the host may read or overwrite its end, any stream the other one."""
        if self._ended is not None:
            self._ended.synchronize()
        self._ends = ()

    def join(self) -> None:
        """What the current stream is given from now on comes after it; the host goes on.

        Memory of that stream may be given back from then on: whoever gets it next on this stream comes after too.
        """
        if self._ended is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._ended)  # type: ignore[union-attr]
        self._ends = ()

    def following(self) -> AbstractContextManager[object]:
        """What is started inside comes after the copy, and need not come after what is computed meanwhile."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Crossings:
    """The copies of one model: starts them, and knows how many bytes went each way and how long that took."""

    def __init__(self) -> None:
        self._ways = {UP: _Way(), DOWN: _Way()}

    def up(self, source: Tensor, target: Tensor) -> Crossing:
        """Start copying ``source``, on the host, to ``target`` on the device; one shape and dtype.

        Until ``Crossing.wait``, leave the source alone; until ``wait`` or ``join``, the target.
        """
        return self._start(UP, source, target, target.device)

    def down(self, source: Tensor, target: Tensor) -> Crossing:
        """Start copying ``source``, on the device, to ``target`` on the host; one shape and dtype.

        Until ``Crossing.wait``, leave the target alone; until ``wait`` or ``join``, the source.
        """
        return self._start(DOWN, source, target, source.device)

    def _start(self, way: str, source: Tensor, target: Tensor, device: torch.device) -> Crossing:
        if device.type != "cuda":
            begun = time.perf_counter()
            target.copy_(source)
            self._ways[way].add(source.nbytes, time.perf_counter() - begun)
            return Crossing()
        stream = _stream(device, way)
        stream.wait_stream(torch.cuda.current_stream(device))
        # a host that waits sleeps: spinning would take a core from the optimizer
        begins, ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begins.record(stream)
            target.copy_(source, non_blocking=True)
            ended.record(stream)
        self._ways[way].add(source.nbytes, (begins, ended))
        return Crossing(stream, ended, source, target)

    def traffic(self) -> dict[str, tuple[int, float]]:
        """(bytes, seconds busy) of each way so far, of copies that have ended."""
        return {"to host": self._ways[DOWN].total(), "to device": self._ways[UP].total()}


Span = float | tuple[torch.cuda.Event, torch.cuda.Event]


class _Way:
    """Bytes and time of one way; copies that a GPU has not ended yet are asked again later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: deque[tuple[int, tuple[torch.cuda.Event, torch.cuda.Event]]] = deque()
        self._num_bytes, self._seconds = 0, 0.0

    def add(self, num_bytes: int, span: Span) -> None:
        with self._lock:
            if isinstance(span, tuple):
                self._under_way.append((num_bytes, span))
                self._collect()
            else:
                self._num_bytes += num_bytes
                self._seconds += span

    def total(self) -> tuple[int, float]:
        with self._lock:
            self._collect()
            return self._num_bytes, self._seconds

    def _collect(self) -> None:
        while self._under_way and self._under_way[0][1][1].query():
            num_bytes, (begins, ended) = self._under_way.popleft()
            self._num_bytes += num_bytes
            self._seconds += begins.elapsed_time(ended) / 1000


def aside(device: torch.device) -> AbstractContextManager[None]:
    """For a thread to work in: its GPU is ``device``, and its stream one of its own.

    That stream comes after what the caller's has been given by now, and what the caller gives it from now on need not
    be waited for: a new thread would stand in line behind the default stream. On a CPU nothing happens.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = _stream(device, ASIDE)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    torch.cuda.set_device(stream.device)  # of this thread: a new one has GPU 0
    with torch.cuda.stream(stream):
        yield
