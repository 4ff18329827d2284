"""How long a step's backward waited for gradients on their way: what monitors write as backward_allreduce."""

from __future__ import annotations

from tritonspeed.comm.spans import MAIN, REDUCE_SEND, REDUCE_WAIT, Span


class ReduceTime:
    """Listens to the spans of one engine.

    Args:
        owner: of its phases.
    """

    def __init__(self, owner: object) -> None:
        self._owner, self._seconds = owner, 0.0

    def __call__(self, span: Span) -> None:
        """A span has ended."""
        if span.kind in (REDUCE_SEND, REDUCE_WAIT) and span.lane == MAIN and span.owner in (self._owner, None):
            self._seconds += span.own_s

    def take_ms(self) -> float:
        """Milliseconds since it was asked last."""
        found, self._seconds = 1e3 * self._seconds, 0.0
        return found
