"""What took how long on this rank: named spans of time, told to whoever listens; next to nothing while nobody does.

    main            phase forward ─ unit forward ─ gather wait, update wait        one inside the other
                    phase backward ─ unit backward ─ gather send, reduce wait
                    phase step ─ norm, update, publish
    update          updates that run under the next forward, in a thread of their own
    communication   every collective, from its issue to its completion
    offload         what is fetched from another tier, what is stored there

On a CPU a span ends when it ends. On a GPU it is two events on the stream of the moment; whoever listens is told of it
once the GPU has passed them, so nobody waits. A collective's own end is seen by a stream that does nothing else.

A span's own time is what it has beyond the spans inside it, so the own times of a lane add up to the whole.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAIN, UPDATE, COMMUNICATION, OFFLOAD = "main", "update", "communication", "offload"

# kinds of spans, by lane
PHASE = "phase"
UNIT_FORWARD, UNIT_BACKWARD, UNIT_AGAIN = "forward", "backward", "recompute"
GATHER_SEND, GATHER_WAIT = "gather send", "gather wait"
REDUCE_SEND, REDUCE_WAIT = "reduce send", "reduce wait"
NORM, UPDATED, PUBLISH, UPDATE_WAIT = "norm", "update", "publish", "update wait"
COLLECTIVE = "collective"
FETCH, STORE, FETCH_WAIT = "fetch", "store", "fetch wait"

COLLECT_EVERY = 1024  # spans on a GPU that wait to be asked about: asking costs the host a microsecond each

_NOTHING: AbstractContextManager[object] = nullcontext()


class Span:
    """One stretch of time. As a context manager it ends with the block; ``close`` ends it anywhere.

    Attributes:
        kind: one of the names above.
        name: the unit or bucket; of a phase its name, of a collective the operation.
        unit: of a collective, what it is for.
        num_bytes: moved.
        lane: where it stands.
        owner: whose step it belongs to: that of the phase around it.
        parent: the span around it on its lane.
        begin, end: seconds on the host's monotonic clock (``time.perf_counter``).
        inner_s: in spans inside it.
        caller: the function that asked for a collective, where somebody wants to know.
    """

    __slots__ = (
        *("_base", "_begun", "_ended", "_spans", "begin", "caller", "end", "inner_s", "is_open"),
        *("kept", "kind", "lane", "name", "num_bytes", "owner", "parent", "unit"),
    )

    def __init__(self, spans: Spans, kind: str, name: str, num_bytes: int, lane: str, parent: Span | None) -> None:
        self._spans, self.kind, self.name, self.num_bytes, self.lane = spans, kind, name, num_bytes, lane
        self.parent, self.owner = parent, parent.owner if parent is not None else None
        self.unit = self.caller = ""
        self.begin = self.end = self.inner_s = 0.0
        self.is_open = True
        self.kept: Any = None  # tensors that must outlive the operation, see ``Spans.watch``
        self._base: _Base | None = None
        self._begun: torch.cuda.Event | None = None
        self._ended: torch.cuda.Event | None = None

    @property
    def duration_s(self) -> float:
        return self.end - self.begin

    @property
    def own_s(self) -> float:
        """Beyond the spans inside it."""
        return self.end - self.begin - self.inner_s

    def close(self) -> None:
        """It has ended; a second time is once."""
        if self.is_open:
            self.is_open = False
            self._spans._close(self)

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Base:
    """A moment that both clocks know: the first by waiting for the GPU, each later one by the GPU's own count."""

    def __init__(self, event: torch.cuda.Event, before: _Base | None) -> None:
        self.event, self._before = event, before
        self._at = time.perf_counter() if before is None else 0.0

    def at(self) -> float:
        if self._before is not None:
            self._at = self._before.at() + self._before.event.elapsed_time(self.event) / 1e3
            self._before = None
        return self._at


class Spans:
    """The spans of one rank. Off until somebody listens."""

    def __init__(self) -> None:
        self.on = False
        self.names_callers = False
        self._listeners: list[Callable[[Span], None]] = []
        self._stack: list[Span] = []
        self._beside = threading.local()  # threads that work beside the step have a stack of their own
        self._device: torch.device | None = None  # a GPU, whose clock is asked
        self._base: _Base | None = None
        self._observer: torch.cuda.Stream | None = None
        self._under_way: deque[Span] = deque()
        self._lock = threading.RLock()

    # listening

    def listen(self, listener: Callable[[Span], None], device: torch.device) -> None:
        """Tell ``listener`` of every span that ends from now on, in the order of their ends.

        Args:
            listener: called with a span whose times are known; it must be quick, and must not raise.
            device: where the rank computes. A GPU is waited for, once.
        """
        if not self._listeners:
            self._stack = []
            if device.type == "cuda":
                self._device = device
                torch.cuda.synchronize(device)
                self._observer = torch.cuda.Stream(device)
                self._base = None
                self.mark()
        with self._lock:
            self._listeners = [*self._listeners, listener]
            self.on = True

    def leave(self, listener: Callable[[Span], None]) -> None:
        """Tell ``listener`` no more. What is under way on a GPU is lost to it: ``collect(wait=True)`` before."""
        with self._lock:
            self._listeners = [each for each in self._listeners if each != listener]
            self.on = bool(self._listeners)

    def mark(self) -> None:
        """Between two steps: spans from here on are timed from here. GPUs count in 32 bits, finely for seconds only."""
        if self._device is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            if self._base is None:
                event.synchronize()
            self._base = _Base(event, self._base)

    # spans

    def span(self, kind: str, name: str, num_bytes: int = 0, on_host: bool = False) -> AbstractContextManager[object]:
        """Around what takes time, on the lane of the thread.

        Args:
            on_host: the host does it, or waits for it, on a GPU's rank too.
        """
        return self.open(kind, name, num_bytes, on_host) if self.on else _NOTHING

    def phase(self, name: str, owner: object) -> AbstractContextManager[object]:
        """Around a part of the step of ``owner``."""
        if not self.on:
            return _NOTHING
        span = self.open(PHASE, name)
        span.owner = owner
        return span

    def open(self, kind: str, name: str, num_bytes: int = 0, on_host: bool = False) -> Span:
        """A span that begins now, inside the one that began last. Only while ``on``."""
        stack = getattr(self._beside, "stack", None)
        lane = MAIN if stack is None else UPDATE
        stack = self._stack if stack is None else stack
        span = Span(self, kind, name, num_bytes, lane, stack[-1] if stack else None)
        stack.append(span)
        self._begin(span, on_host)
        return span

    def start(self, kind: str, name: str, num_bytes: int = 0) -> Span | None:
        """What goes on beside the computing, on the host's clock; None while nobody listens."""
        if not self.on:
            return None
        span = Span(self, kind, name, num_bytes, OFFLOAD, None)
        self._begin(span, on_host=True)
        return span

    def collective(self, operation: str, unit: str, num_bytes: int) -> Span | None:
        """A collective that is issued now; None while nobody listens."""
        if not self.on:
            return None
        span = Span(self, COLLECTIVE, operation, num_bytes, COMMUNICATION, None)
        span.unit = unit
        if self.names_callers:
            span.caller = _caller()
        self._begin(span, on_host=False)
        return span

    def watch(self, span: Span, works: list[Any], *tensors: Tensor) -> None:
        """On NCCL: see when ``works`` end, rather than when somebody waits for them.

        Args:
            tensors: what they read and write. NCCL lets go of them at the first wait, which is this one.
        """
        if self._observer is None or span._begun is None:
            return
        with torch.cuda.stream(self._observer):
            for work in works:
                work.wait()
            span._ended = torch.cuda.Event(enable_timing=True)
            span._ended.record(self._observer)
        span.kept = tensors

    @contextmanager
    def beside(self) -> Iterator[None]:
        """For a thread that works beside the step: its spans stand on a lane of their own."""
        self._beside.stack = []
        try:
            yield
        finally:
            del self._beside.stack

    # clocks

    def _begin(self, span: Span, on_host: bool) -> None:
        if self._device is None or on_host:
            span.begin = time.perf_counter()
        else:
            span._base, span._begun = self._base, self._event()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _close(self, span: Span) -> None:
        if span._begun is None:
            span.end = time.perf_counter()
        elif span._ended is None:
            span._ended = self._event()
        span.kept = None
        if span.lane in (MAIN, UPDATE):
            stack = getattr(self._beside, "stack", self._stack)
            if stack and stack[-1] is span:
                stack.pop()
            elif span in stack:  # something inside was left open: an interrupted backward
                del stack[stack.index(span) :]
        if not self.on:
            return
        if self._device is None:
            self._tell(span)
            return
        with self._lock:  # in the order of their ends: what is inside a span comes before it
            self._under_way.append(span)
            many = len(self._under_way) % COLLECT_EVERY == 0
        if many:
            self.collect()

    def collect(self, wait: bool = False) -> None:
        """Tell of what a GPU has ended.

        Args:
            wait: for all of it.
        """
        if wait and self._device is not None and self._under_way:
            torch.cuda.synchronize(self._device)
        with self._lock:
            while self._under_way:
                span = self._under_way[0]
                if span._ended is not None and span._begun is not None:
                    if not span._ended.query():
                        return
                    assert span._base is not None, "an event is counted from a moment that the host knows"
                    span.begin = span._base.at() + span._base.event.elapsed_time(span._begun) / 1e3
                    span.end = span.begin + span._begun.elapsed_time(span._ended) / 1e3
                self._under_way.popleft()
                self._tell(span)

    def _tell(self, span: Span) -> None:
        with self._lock:
            if span.parent is not None:
                span.parent.inner_s += span.end - span.begin
            for listener in self._listeners:
                listener(span)


def _caller() -> str:
    """The function outside comm/ that asked for a collective: "file:function"."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("tritonspeed.comm"):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?').removeprefix('tritonspeed.')}:{frame.f_code.co_name}"
