"""What one rank has recorded of a few steps, as plain values: what travels to rank 0, and what is drawn there."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

from tritonspeed.comm import Span
from tritonspeed.zero.ledger import NEW_PEAK

TIERS = ("device", "host", "disk")
SERIES = ("parameters", "gradients", "optimizer", "communication", "host", "disk")  # of the memory curve
ALLOCATOR = "allocator"  # a GPU's own count, activations included


class Stretch(NamedTuple):
    """One span, closed."""

    kind: str
    name: str
    unit: str
    num_bytes: int
    lane: str
    begin: float
    end: float

    @classmethod
    def of(cls, span: Span) -> Stretch:
        return cls(span.kind, span.name, span.unit, span.num_bytes, span.lane, span.begin, span.end)


@dataclass
class StepMark:
    """An optimizer step that ended while the trace was recorded."""

    step: int
    begin: float
    end: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recorded:
    """One rank's.

    Attributes:
        host, moments: which machine's clock the times are of, and the times at which barriers of all ranks ended.
        before: tier → category → bytes when the trace began.
        changes: tier → (time, category, bytes from then on), as the ledger has them.
        allocated: (time, bytes) of a GPU's allocator.
    """

    rank: int
    device: str
    host: str = ""
    moments: list[float] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    spans: list[Stretch] = field(default_factory=list)
    steps: list[StepMark] = field(default_factory=list)
    before: dict[str, dict[str, int]] = field(default_factory=dict)
    changes: dict[str, list[tuple[float, str, int]]] = field(default_factory=dict)
    allocated: list[tuple[float, int]] = field(default_factory=list)

    def to_text(self) -> str:
        """Compressed, in ASCII."""
        return base64.b85encode(zlib.compress(json.dumps(asdict(self)).encode())).decode()

    @classmethod
    def from_text(cls, text: str) -> Recorded:
        """What ``to_text`` gave."""
        values = json.loads(zlib.decompress(base64.b85decode(text)))
        values["spans"] = [Stretch(*each) for each in values["spans"]]
        values["steps"] = [StepMark(**each) for each in values["steps"]]
        values["changes"] = {tier: [(t, c, n) for t, c, n in rows] for tier, rows in values["changes"].items()}
        values["allocated"] = [(t, n) for t, n in values["allocated"]]
        return cls(**values)

    def shifted(self, by: float) -> Recorded:
        """The same on a clock that shows ``by`` seconds more."""
        return Recorded(
            rank=self.rank,
            device=self.device,
            host=self.host,
            begin=self.begin + by,
            end=self.end + by,
            spans=[s._replace(begin=s.begin + by, end=s.end + by) for s in self.spans],
            steps=[StepMark(s.step, s.begin + by, s.end + by, s.facts) for s in self.steps],
            before=self.before,
            changes={tier: [(t + by, c, n) for t, c, n in rows] for tier, rows in self.changes.items()},
            allocated=[(t + by, n) for t, n in self.allocated],
        )

    def curve(self) -> Iterator[tuple[float, dict[str, int]]]:
        """(time, bytes by ``SERIES``), from the beginning on, whenever something changes."""
        now = {tier: dict(self.before[tier]) for tier in TIERS}
        rows = sorted(((t, tier, c, n) for tier in TIERS for t, c, n in self.changes[tier]), key=lambda row: row[0])
        yield self.begin, _series(now)
        for at, tier, category, num_bytes in rows:
            if category != NEW_PEAK:
                now[tier][category] = num_bytes
                yield at, _series(now)

    def peaks(self) -> list[dict[str, int]]:
        """Per step, the most bytes in each tier: what ``StepReport`` calls its peaks."""
        found = [{} for _ in self.steps]
        for tier in TIERS:
            now, step = dict(self.before[tier]), 0
            peak = sum(now.values())
            for _, category, num_bytes in self.changes[tier]:
                if category == NEW_PEAK:
                    if step < len(found):
                        found[step][tier] = peak
                    step, peak = step + 1, sum(now.values())
                else:
                    now[category] = num_bytes
                    peak = max(peak, sum(now.values()))
        return found


def _series(now: dict[str, dict[str, int]]) -> dict[str, int]:
    device = {category: now["device"].get(category, 0) for category in SERIES[:4]}
    return {**device, "host": sum(now["host"].values()), "disk": sum(now["disk"].values())}


def aligned(ranks: Iterable[Recorded]) -> list[Recorded]:
    """All on rank 0's clock, from its beginning on.

    Ranks on one machine have one clock. Another machine's differs by what it shows, in the median, when a barrier of
    all ranks ends: good to the time that a barrier takes to tell everybody.
    """
    ranks = list(ranks)
    first = ranks[0]
    found = []
    for each in ranks:
        apart = [ours - theirs for ours, theirs in zip(first.moments, each.moments, strict=True)]
        by = median(apart) if each.host != first.host and apart else 0.0
        found.append(each.shifted(by - first.begin))
    return found


def in_rows(spans: Iterable[Stretch]) -> list[list[Stretch]]:
    """Spans that may overlap, in as few rows as do without."""
    rows: list[list[Stretch]] = []
    for span in sorted(spans, key=lambda s: (s.begin, s.end)):
        free = next((row for row in rows if row[-1].end <= span.begin), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows
