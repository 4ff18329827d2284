"""How ranks ended: read from the folder in which they left word, put in order, told to the user.

The folder is torchrun's log folder of one launch: RUN/attempt_0/LOCAL_RANK/, with the files that
`tritonspeed.cli.rank_entry` describes.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

MARK = "tritonspeed-failures "
"""Starts the line with which a host that another one controls hands over its failures, as JSON."""


class Death(Protocol):
    """What torchrun knows of a rank that failed (torch.distributed.elastic's ProcessFailure)."""

    pid: int
    exitcode: int
    timestamp: int


_LATER_CHARS = 160  # what follows from the first failure is mostly a long word for "the peer is gone"


@dataclass(frozen=True)
class Failure:
    """One rank that failed. `time` is in seconds since the epoch; `details` a traceback or empty."""

    rank: int
    world: int
    host: str
    status: int
    time: float
    message: str
    details: str

    @property
    def line(self) -> str:
        return f"rank {self.rank} of {self.world} failed: {self.message} [{self.host}, exit status {self.status}]"


@dataclass(frozen=True)
class Rank:
    """A rank that has started: its process and its folder."""

    pid: int
    rank: int
    world: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    @property
    def recorded_error(self) -> bool:
        return (self.folder / "error.json").exists()


def started_ranks(root: Path) -> list[Rank]:
    """The ranks that have left word under torchrun's log folder `root`."""
    ranks = []
    for path in root.glob("*/attempt_*/*/rank.json"):
        facts = json.loads(path.read_text())
        ranks.append(Rank(facts["pid"], facts["rank"], facts["world"], path.parent))
    return ranks


def collect(deaths: Mapping[int, Death], root: Path, ended_by_us: frozenset[int]) -> list[Failure]:
    """The failures of this host, the first one first.

    A rank that torchrun or the launcher ended, because another one had failed, is not a failure.

    Args:
        deaths: by global rank, every rank that ended with a status other than 0.
        root: torchrun's log folder.
        ended_by_us: the process ids that the launcher had to kill.
    """
    by_rank = {rank.rank: rank for rank in started_ranks(root)}
    found = [_failure(number, death, by_rank.get(number)) for number, death in deaths.items()]
    own = [
        failure
        for failure, death in zip(found, deaths.values(), strict=True)
        if _left_word(by_rank.get(failure.rank)) or (death.exitcode != -signal.SIGTERM and death.pid not in ended_by_us)
    ]
    return sorted(own or found, key=lambda failure: failure.time)


def _left_word(rank: Rank | None) -> bool:
    return rank is not None and rank.recorded_error


def _failure(number: int, death: Death, rank: Rank | None) -> Failure:
    world = rank.world if rank else number + 1
    host = socket.gethostname()
    status = 128 - death.exitcode if death.exitcode < 0 else death.exitcode
    if rank is not None and rank.recorded_error:
        record = json.loads((rank.folder / "error.json").read_text())
        message, extra = record["message"]["message"], record["message"]["extraInfo"]
        time = float(record.get("time", extra["timestamp"]))  # torchrun's own @record writes whole seconds
        status = record.get("status", status)  # the process may have been killed on its way out
        return Failure(number, world, host, status, time, message, extra["py_callstack"])
    fault_file = rank.folder / "fault.txt" if rank else None
    fault = fault_file.read_text() if fault_file is not None and fault_file.exists() else ""
    return Failure(number, world, host, status, float(death.timestamp), _silent_death(death.exitcode), fault)


def _silent_death(code: int) -> str:
    if code >= 0:
        return f"it ended with exit status {code} and no exception"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"it was killed by {name}; when nobody did that, the host ran out of memory"
    return f"it was ended by {name}"


def to_line(failures: Sequence[Failure]) -> str:
    """The failures as one line for the controlling host; `from_line` reads it."""
    return MARK + json.dumps([asdict(failure) for failure in failures])


def from_line(line: str) -> list[Failure]:
    """The failures of a line that begins with MARK."""
    return [Failure(**fields) for fields in json.loads(line.removeprefix(MARK))]


def describe(failures: Sequence[Failure]) -> str:
    """What the user reads last: the other failures in a line each, then the first one's traceback and its line."""
    first, *others = failures
    later = [f"then {failure.line[:_LATER_CHARS]}" for failure in others]
    return "\n".join(text for text in (*later, first.details.rstrip(), first.line) if text)
