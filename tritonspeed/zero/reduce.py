"""Gradients leave in a fixed order, each bucket once it is complete, one under way while the next one fills.

The order is the reverse of the units' own (the order in which backward fills them), the root and the persistent
parameters last. It never depends on which gradient came first: that may differ between ranks, and between two runs.
What a rank does not use leaves as zeros.

When a bucket is complete has two answers. Where nothing is gathered in backward, a bucket is complete when its
gradients are here, or backward ends: ranks may disagree about that moment, as they then do nothing else. At stage 3
they gather units in between, and a rank that waits for a gradient which never comes (an expert it did not use) would
issue its reduction after a gather that the others issue before: there, a bucket is complete when backward leaves its
unit, which all ranks do at the same place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from tritonspeed.zero.layout import Layout
from tritonspeed.zero.plan import PERSISTENT, ROOT

MAX_UNDER_WAY = 1  # it travels while the next one fills: more would only hold memory


class Sender(Protocol):
    """What is asked of a bucket here. ``estimate`` has buckets of its own, of which only the bytes are counted."""

    layout: Layout
    parameters: list[Any]
    trainable: bool
    frees: bool

    @property
    def outbox(self) -> object | None: ...

    def receive(self, index: int, gradient: Any, accumulating: bool) -> None: ...

    def send(self, accumulating: bool) -> Callable[[], None]: ...

    def drop_grad(self) -> None: ...


B = TypeVar("B", bound=Sender)


class Unit(Protocol[B]):
    """What is asked of a group here."""

    name: str
    index: int
    buckets: list[B]


def departure_order(groups: Sequence[Unit[B]]) -> list[B]:
    """The trainable buckets of ``groups`` in the order in which they are reduced."""
    late = {ROOT: 1, PERSISTENT: 2}
    ordered = sorted(groups, key=lambda g: (late.get(g.name, 0), -g.index))
    return [b for g in ordered for b in g.buckets if b.trainable]


class Reducer(Generic[B]):
    """Takes gradients in any order, sends them in one.

    Args:
        buckets: in departure order.
        overlap: send while backward goes on; otherwise each reduction is waited for at once.
        max_elems: gradient elements under way at most (``reduce_bucket_size``); one bucket always may.
        shards_gradients: reduce after every backward, not only at the end of an accumulation.
    """

    def __init__(self, buckets: list[B], overlap: bool, max_elems: int, shards_gradients: bool) -> None:
        self.buckets, self.overlap, self.max_elems = buckets, overlap, max_elems
        self.shards_gradients = shards_gradients
        self.num_accumulated = 1  # micro-steps per step: more than one makes stages 0, 1 accumulate before sending
        self.sending = True  # False within an accumulation (stages 0, 1) and under no_sync
        self.requires_all = False  # a parameter without a gradient is an error (``ignore_unused_parameters`` false)
        self._used: set[tuple[int, int]] = set()  # (bucket, parameter), while ``requires_all`` counts them
        self._held_back = False  # some backward of this step did not send
        self._position = {id(b): i for i, b in enumerate(buckets)}
        self._counts_leaving = any(b.frees for b in buckets)  # what completes a bucket: see the module's docstring
        self._usual = [1 if self._counts_leaving else len(b.parameters) for b in buckets]
        self._expected = list(self._usual)  # gradients, or times left, that complete a bucket: learned as it goes
        self._arrived = [0] * len(buckets)
        self._next = 0
        self._under_way: deque[tuple[B, Callable[[], None]]] = deque()

    @property
    def num_unsent(self) -> int:
        """Buckets that hold gradients no reduction has taken yet."""
        return sum(b.outbox is not None for b in self.buckets)

    @property
    def _accumulates(self) -> bool:
        """Whether gradients are summed before they leave. The same on every rank: it decides the wire's dtype."""
        local = self.num_accumulated > 1 or not self.sending or self._held_back
        return local and not self.shards_gradients

    def receive(self, bucket: B, index: int, gradient: Any) -> None:
        """One parameter's gradient has been computed."""
        if self.requires_all:
            self._used.add((id(bucket), index))
        bucket.receive(index, gradient, self._accumulates)
        if not self._counts_leaving:
            self._count(bucket)

    def leave(self, buckets: Iterable[B]) -> None:
        """Backward has left the unit of these buckets: what it has of their gradients is there."""
        for bucket in buckets:
            if self._counts_leaving and bucket.frees and bucket.trainable:
                self._count(bucket)

    def _count(self, bucket: B) -> None:
        self._arrived[self._position[id(bucket)]] += 1
        if self.sending:
            while self._next < len(self.buckets) and self._arrived[self._next] >= self._expected[self._next]:
                self._send(self.buckets[self._next])
                self._next += 1

    def finish_backward(self) -> None:
        """The last gradient of this backward is in: send what has not left, wait for what is under way."""
        if self.sending:
            for bucket in self.buckets[self._next :]:
                self._send(bucket)
            # what several segments of backward use arrives several times: next time wait for all of them
            self._expected = [n or usual for n, usual in zip(self._arrived, self._usual, strict=True)]
        self._held_back = not self.sending
        self._drain()
        self._arrived = [0] * len(self.buckets)
        self._next = 0

    def check_all_used(self) -> None:
        """Where ``requires_all``: every parameter has had a gradient since the last time gradients left.

        Raises:
            ValueError: naming the first that has not. All that there is has left by then: ranks stay in step.
        """
        if not (self.requires_all and self.sending):
            return
        used, self._used = self._used, set()
        spans = [(id(b), i, s) for b in self.buckets for i, s in enumerate(b.layout.spans)]
        unused = [span.name for bucket, i, span in spans if (bucket, i) not in used]
        if unused:
            raise ValueError(
                f"{len(unused)} trainable parameter(s) had no part in the loss, the first is {unused[0]!r}, and"
                " zero_optimization.ignore_unused_parameters is false: set it to true (the default; they then count as"
                " gradients of zero), freeze them, or use them"
            )

    def flush(self) -> None:
        """Send everything that is held back, on every rank alike: late gradients, an accumulation cut short."""
        for bucket in self.buckets:
            self._send(bucket)
        self._drain()

    def resume(self, used: Iterable[tuple[B, int]]) -> None:
        """Gradients of earlier micro-steps were put into the buckets: go on accumulating.

        Args:
            used: (bucket, parameter) that had one.
        """
        self._held_back = self.num_unsent > 0
        self._used |= {(id(bucket), index) for bucket, index in used}

    def reset(self) -> None:
        """Forget a backward that did not finish, and every gradient of its step."""
        self._drain()
        self._arrived = [0] * len(self.buckets)
        self._next = 0
        self._used.clear()
        for bucket in self.buckets:
            bucket.drop_grad()

    def _send(self, bucket: B) -> None:
        room = self.max_elems - bucket.layout.numel
        while self._under_way and (
            len(self._under_way) >= MAX_UNDER_WAY or sum(b.layout.numel for b, _ in self._under_way) > room
        ):
            self._finish_oldest()
        self._under_way.append((bucket, bucket.send(self._accumulates)))
        if not self.overlap:
            self._drain()

    def _drain(self) -> None:
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._under_way.popleft()[1]()
