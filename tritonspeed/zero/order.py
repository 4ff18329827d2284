"""In which order units are needed, learned from the last iteration, and what follows from it: what to fetch ahead,
and what to keep. Integers only.

An iteration is one call of the model and the backward that follows. Its trace is the list of units in the order in
which they were needed, with repetition: forward 0 1 2 3, backward 3 2 1 0 0. While an iteration follows the last
trace, the next units are known; where it departs, nothing is fetched ahead until the next iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The knobs of stage 3, in elements, with DeepSpeed's names and defaults.

    ``prefetch_bucket_size``  how far ahead to fetch: 0 is off; any other value is at least one unit.
    ``max_live_parameters``   fetch ahead and keep only while no more than this is whole.
    ``max_reuse_distance``    keep a unit after forward if fewer elements than this are needed before it is needed
    again.
    """

    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000


class Order:
    """The trace of this iteration beside the last one's.

    Args:
        sizes: elements of each unit that is freed after use (0 for those that stay).
        limits: how far to look ahead and back.
    """

    def __init__(self, sizes: Sequence[int], limits: Limits) -> None:
        self.sizes, self.limits = list(sizes), limits
        self._last: dict[str, list[int]] = {}
        self._kind = "train"
        self._now: list[int] = []
        self._follows = False

    def begin(self, kind: str) -> None:
        """A new iteration of ``kind`` ("train" or "eval") starts."""
        if self._now:
            self._last[self._kind] = self._now
        self._kind, self._now = kind, []
        self._follows = bool(self._last.get(kind))

    def need(self, unit: int) -> None:
        """``unit`` is needed now."""
        last = self._last.get(self._kind, [])
        at = len(self._now)
        self._follows = self._follows and at < len(last) and last[at] == unit
        self._now.append(unit)

    def ahead(self, live_elems: int) -> list[int]:
        """The units to fetch now, in order of need, given the elements that are whole or on their way."""
        found: list[int] = []
        budget = self.limits.prefetch_bucket_size
        if not self._follows or budget <= 0:
            return found
        present = self._now[-1]
        for unit in self._last[self._kind][len(self._now) :]:
            size = self.sizes[unit]
            if size == 0 or unit == present or unit in found:
                continue
            if (found and size > budget) or live_elems + size > self.limits.max_live_parameters:
                break
            found.append(unit)
            budget -= size
            live_elems += size
            if budget <= 0:
                break
        return found

    def keep(self, unit: int, live_elems: int) -> bool:
        """Whether to keep ``unit`` whole after its forward, given the elements that are whole (itself included)."""
        if not self._follows or live_elems > self.limits.max_live_parameters:
            return False
        distance = 0
        for later in self._last[self._kind][len(self._now) :]:
            if later == unit:
                return True
            distance += self.sizes[later]
            if distance >= self.limits.max_reuse_distance:
                return False
        return False
