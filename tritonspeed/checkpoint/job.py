"""What is asked of a save, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritonspeed.checkpoint.folder import check_tag
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.source import ParameterFacts


@dataclass(frozen=True)
class Job:
    """What one rank has to save.

    Attributes:
        folder: of all checkpoints; made where it is missing.
        tag: name of this one; rank 0's counts.
        records: this rank's flats.
        scalars: the optimizer's numbers, with the parameters that have them.
        state: the rank's own: what ``tree.encode`` takes.
        parameters: every parameter, by its first name.
        step: optimizer steps.
        facts: small things to know without reading on (JSON).
        set_latest: let ``latest`` name it.
        keep_last: so many of the newest checkpoints stay; None keeps all.
        extras: called on every rank with the hidden folder and the records as they are saved, in the thread that
            writes; what it writes must be on disk when it returns.

    Raises:
        ValueError: the tag cannot be one, or nothing would be kept.
    """

    folder: Path
    tag: str
    records: Sequence[Record]
    scalars: Sequence[tuple[dict[str, float], tuple[str, ...]]]
    state: dict[str, Any]
    parameters: Mapping[str, ParameterFacts]
    step: int
    facts: dict[str, Any] = field(default_factory=dict)
    set_latest: bool = True
    keep_last: int | None = None
    extras: Callable[[Path, Sequence[Record]], None] | None = None

    def __post_init__(self) -> None:
        check_tag(self.tag)
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last is {self.keep_last}, must be at least 1, or None to keep all")


@dataclass(frozen=True)
class SaveReport:
    """What the last save took on this rank.

    Attributes:
        path: of the checkpoint.
        num_bytes: this rank's files.
        seconds: until all ranks had committed.
        write_seconds: of these, for this rank's files.
        stall_seconds: in which training stood still.
    """

    path: Path
    num_bytes: int
    seconds: float
    write_seconds: float
    stall_seconds: float
