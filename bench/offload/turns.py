"""A turn on a machine that others use too: its time, its own work, and theirs. Standard library only."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.systems.launch import busy_seconds

AUTOGROUP = Path("/proc/self/autogroup")


@contextmanager
def first_in_line(asked: bool) -> Iterator[None]:
    """This session's processes before everybody else's on the cores, for the turn alone (Linux, wants root).

    The ordinary scheduler, with all the weight it gives: neighbours then take none of the cores that are used here; the
    disk, the memory and what is idle are still shared with them. Start the process in a session of its own. Real-time
    scheduling will not do: threads that spin at the end of a parallel region then keep those of the disk waiting.
    """
    if asked:
        AUTOGROUP.write_text("-20")
    try:
        yield
    finally:
        if asked:
            AUTOGROUP.write_text("0")


def timed(work: Callable[[], object], first: bool) -> dict[str, float]:
    """Seconds, own core-seconds, and cores that others took."""
    with first_in_line(first):
        busy, used, start = busy_seconds(), _own_seconds(), time.perf_counter()
        work()
        seconds, own = time.perf_counter() - start, _own_seconds() - used
        others = max(0.0, (busy_seconds() - busy - own) / seconds)
    return {"seconds": seconds, "own_core_seconds": own, "others_cores": others}


def in_turns(
    turns: Mapping[str, tuple[Callable[[], object], Callable[[], object]]], rounds: int, first: bool
) -> dict[str, list[dict[str, float]]]:
    """Every round runs every (prepare, work) once, each round beginning with another; only the work is timed."""
    names = list(turns)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            prepare, work = turns[name]
            prepare()
            found[name].append(timed(work, first))
    return found


def _own_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
