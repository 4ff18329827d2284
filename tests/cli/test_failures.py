"""Which of several dead ranks failed first, and in which words the user hears of it."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tritonspeed.cli import failures


@dataclass
class Death:
    """What torchrun knows of a rank that ended."""

    exitcode: int
    timestamp: int = 1000
    pid: int = 0


def left(root: Path, rank: int, error: str = "", time: float = 0.0, fault: str = "") -> None:
    """The files of a rank of three, under torchrun's folders."""
    folder = root / "run" / "attempt_0" / str(rank)
    folder.mkdir(parents=True)
    (folder / "rank.json").write_text(json.dumps({"pid": 100 + rank, "rank": rank, "world": 3}))
    (folder / "fault.txt").write_text(fault)
    if error:
        extra = {"py_callstack": f"Traceback of {error}", "timestamp": str(int(time))}
        record = {"message": {"message": error, "extraInfo": extra}, "time": time, "status": 1}
        (folder / "error.json").write_text(json.dumps(record))


def test_the_first_failure_is_told_last(tmp_path: Path) -> None:
    left(tmp_path, 0, "peer is gone", 1000.4)
    left(tmp_path, 1, "the cause", 1000.2)
    left(tmp_path, 2)
    deaths = {0: Death(1), 1: Death(-signal.SIGABRT), 2: Death(-signal.SIGTERM, pid=102)}
    found = failures.collect(deaths, tmp_path, frozenset())
    assert [(failure.rank, failure.status) for failure in found] == [(1, 1), (0, 1)]
    text = failures.describe(found).splitlines()
    assert text[0].startswith("then rank 0 of 3 failed: peer is gone")
    assert text[1] == "Traceback of the cause"
    assert text[2].startswith("rank 1 of 3 failed: the cause [")
    assert failures.from_line(failures.to_line(found)) == found


def test_a_silent_death_comes_before_what_follows_from_it(tmp_path: Path) -> None:
    left(tmp_path, 0, "peer is gone", 1000.4)
    left(tmp_path, 1, fault="Fatal Python error: Segmentation fault")
    left(tmp_path, 2)
    deaths = {0: Death(1), 1: Death(-signal.SIGSEGV), 2: Death(-signal.SIGKILL, pid=102)}
    found = failures.collect(deaths, tmp_path, ended_by_us=frozenset({102}))
    assert [failure.rank for failure in found] == [1, 0]
    assert (found[0].status, found[0].message) == (128 + signal.SIGSEGV, "it was ended by SIGSEGV")
    assert failures.describe(found).splitlines()[1] == "Fatal Python error: Segmentation fault"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, "killed by SIGKILL; when nobody did that, the host ran out of memory"),
        (7, "it ended with exit status 7 and no exception"),
    ],
)
def test_deaths_without_a_word(tmp_path: Path, code: int, words: str) -> None:
    left(tmp_path, 0)
    (failure,) = failures.collect({0: Death(code)}, tmp_path, frozenset())
    assert words in failure.line


def test_when_every_rank_was_ended_from_outside_all_are_told(tmp_path: Path) -> None:
    for rank in range(2):
        left(tmp_path, rank)
    found = failures.collect({0: Death(-signal.SIGTERM), 1: Death(-signal.SIGTERM)}, tmp_path, frozenset())
    assert [failure.rank for failure in found] == [0, 1]


def test_torchruns_own_records_are_read(tmp_path: Path) -> None:
    left(tmp_path, 0)
    extra = {"py_callstack": "Traceback", "timestamp": "1000"}
    path = tmp_path / "run" / "attempt_0" / "0" / "error.json"
    path.write_text(json.dumps({"message": {"message": "recorded by the script", "extraInfo": extra}}))
    (failure,) = failures.collect({0: Death(5)}, tmp_path, frozenset())
    assert (failure.message, failure.status, failure.time) == ("recorded by the script", 5, 1000.0)
