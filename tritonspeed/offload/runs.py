"""Which bytes of a flat were written, in disjoint runs, and the digest of each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

from tritonspeed.offload.tiers import Done, Handle

_DONE = Done()


@dataclass(frozen=True)
class Run:
    """Bytes [lo, hi) that were written together.

    Attributes:
        digest: xxh3_64 in hex, or on its way; None is not known.
        handle: of the write.
    """

    lo: int
    hi: int
    digest: str | Future[str] | None = None
    handle: Handle = _DONE

    def known_digest(self) -> str | None:
        """The digest, waited for."""
        return self.digest.result() if isinstance(self.digest, Future) else self.digest


class Runs:
    """Disjoint runs in order; what is written again replaces what was there."""

    def __init__(self, runs: list[Run] | None = None) -> None:
        self._runs = list(runs or ())

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs))

    def __len__(self) -> int:
        return len(self._runs)

    def overlapping(self, lo: int, hi: int) -> list[Run]:
        """Those that share a byte with [lo, hi)."""
        first = bisect_left(self._runs, lo, key=lambda run: run.hi)
        found = []
        for run in self._runs[first:]:
            if run.lo >= hi:
                break
            if max(lo, run.lo) < min(hi, run.hi):
                found.append(run)
        return found

    def add(self, new: Run) -> None:
        """Put a run in the place of all it overlaps; what sticks out of it loses its digest, not its handle."""
        if new.lo == new.hi:
            return
        rest = [new]
        for old in self.overlapping(new.lo, new.hi):
            self._runs.remove(old)
            if old.lo < new.lo:
                rest.append(replace(old, hi=new.lo, digest=None))
            if old.hi > new.hi:
                rest.append(replace(old, lo=new.hi, digest=None))
        for run in rest:
            self._runs.insert(bisect_left(self._runs, run.lo, key=lambda other: other.lo), run)

    def gaps(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """What of [lo, hi) is in none of them."""
        found = []
        for run in self.overlapping(lo, hi):
            if run.lo > lo:
                found.append((lo, run.lo))
            lo = run.hi
        if lo < hi:
            found.append((lo, hi))
        return found
