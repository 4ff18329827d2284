"""A turn on a machine that others use too: its time, its own work, and theirs. Standard library only."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.systems.launch import busy_seconds


@contextmanager
def first_in_line(asked: bool) -> Iterator[None]:
    """This process's threads before everybody else's on the cores, for the turn alone (wants root).

    Neighbours then take none of its cores; the disk and the memory's bandwidth are still shared with them.
    """
    if asked:
        _schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        if asked:
            _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setscheduler(int(task.name), policy, os.sched_param(priority))


def timed(work: Callable[[], object], realtime: bool) -> dict[str, float]:
    """Seconds, own core-seconds, and cores that others took."""
    with first_in_line(realtime):
        busy, used, start = busy_seconds(), _own_seconds(), time.perf_counter()
        work()
        seconds, own = time.perf_counter() - start, _own_seconds() - used
        others = max(0.0, (busy_seconds() - busy - own) / seconds)
    return {"seconds": seconds, "own_core_seconds": own, "others_cores": others}


def in_turns(
    turns: dict[str, tuple[Callable[[], object], Callable[[], object]]], rounds: int, realtime: bool
) -> dict[str, list[dict[str, float]]]:
    """Every round runs every (prepare, work) once, each round beginning with another; only the work is timed."""
    names = list(turns)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            prepare, work = turns[name]
            prepare()
            found[name].append(timed(work, realtime))
    return found


def _own_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
