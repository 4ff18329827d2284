"""Where the wall time of a step goes (``wall_clock_breakdown``): for each unit what it computes and what it waits for.

Every moment of a step is counted once: for the innermost span that it falls into (``comm/spans.py``), or, where it
falls into none, as outside the engine: the data loader, the caller's own code, other engines. So the table's cells add
up to the wall time, from the end of one step to the end of the next.

    forward, backward   computing; what a unit's forward repeats inside backward stands in its own column
    gather send         starting an all-gather: this rank's slice is put into place, and posted
    gather wait         until the unit is whole, where it was not in time (stage 3)
    reduce send, wait   the same of gradients; on a CPU the sum over the ranks is taken in the wait
    step                norm: what the ranks tell each other, and the host's one wait · update · publish: what the ranks
                        send each other of the updated parameters (stage 0: of the sums) · waits for other tiers

An update that runs under the next forward does so in a thread of its own: it is said, and is not in the sum.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from tritonspeed import comm
from tritonspeed.comm import Mesh, Span
from tritonspeed.comm import spans as kinds
from tritonspeed.zero import ShardedModel

OUTSIDE_UNITS, STEP = "outside units", "step"
COLUMNS = (
    *(kinds.UNIT_FORWARD, kinds.GATHER_SEND, kinds.GATHER_WAIT, kinds.UNIT_AGAIN),
    *(kinds.UNIT_BACKWARD, kinds.REDUCE_SEND, kinds.REDUCE_WAIT),
)
STEP_COLUMNS = (kinds.NORM, kinds.UPDATED, kinds.PUBLISH, kinds.UPDATE_WAIT, kinds.FETCH_WAIT, "rest")
SUMMARISED_FROM = 3  # repeated units make one row

Cell = tuple[str, str]  # (unit, one of COLUMNS), or (STEP, one of STEP_COLUMNS)


@dataclass
class StepTimes:
    """What the spans of some steps add up to, on this rank.

    Attributes:
        units: names of the model's units, in order.
        num_steps: how many steps.
        wall_s: from the end of the step before the first one to the end of the last.
        seconds: own time by cell.
        counts: spans by cell.
        engine_s: inside the engine's phases, and in its units outside of them.
        beside_s: of updates under the next forward.
        by_rank: every rank's cells, in the order of ``cells``, where the ranks were asked.
    """

    units: list[str]
    num_steps: int = 0
    wall_s: float = 0.0
    seconds: defaultdict[Cell, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[Cell] = field(default_factory=Counter)
    engine_s: float = 0.0
    beside_s: float = 0.0
    by_rank: list[list[float]] = field(default_factory=list)

    @property
    def cells(self) -> list[Cell]:
        """All there may be, on every rank in this order."""
        units = [(unit, column) for unit in (*self.units, OUTSIDE_UNITS) for column in COLUMNS]
        return units + [(STEP, column) for column in STEP_COLUMNS]

    @property
    def outside_s(self) -> float:
        """Outside the engine."""
        return self.wall_s - self.engine_s

    @property
    def total_s(self) -> float:
        """The sum of the table: ``wall_s``, but for what was cut off by its ends."""
        return sum(self.seconds.values()) + self.outside_s

    def exchange(self, mesh: Mesh) -> None:
        """Learn every rank's cells. Collective."""
        mine = torch.tensor([self.seconds[cell] for cell in self.cells], dtype=torch.float64, device=mesh.device)
        table = comm.exchange(mesh, mine)
        flat, width = comm.read_scalars(mesh, table.flatten()), len(self.cells)
        self.by_rank = [flat[i : i + width] for i in range(0, len(flat), width)]


class Breakdown:
    """Listens to the spans of one engine, and adds them up.

    Args:
        sharded: its units; not kept.
        owner: of its phases.
    """

    def __init__(self, sharded: ShardedModel, owner: object) -> None:
        self._owner = owner
        self._units = [group.name for group in sharded.groups]
        self._unit_of = {bucket.name: group.name for group in sharded.groups for bucket in group.buckets}
        self._unit_of |= {name: name for name in self._units}
        self._since: float | None = None
        self._now = StepTimes(self._units)

    def __call__(self, span: Span) -> None:
        """A span has ended."""
        if span.lane == kinds.UPDATE:
            self._now.beside_s += span.own_s
            return
        if span.lane != kinds.MAIN or span.owner not in (self._owner, None):
            return
        if span.owner is None and span.name not in self._unit_of:
            return
        if self._since is None:
            self._since = span.begin
        if span.parent is None:
            self._now.engine_s += span.duration_s
        cell = self._cell(span)
        self._now.seconds[cell] += span.own_s
        self._now.counts[cell] += 1

    def _cell(self, span: Span) -> Cell:
        if span.kind == kinds.PHASE:
            return (STEP, "rest") if span.name == STEP else (OUTSIDE_UNITS, span.name)
        if span.kind in (kinds.NORM, kinds.UPDATED, kinds.PUBLISH, kinds.UPDATE_WAIT):
            return STEP, span.kind
        if span.kind == kinds.FETCH_WAIT:
            within = span.parent.kind if span.parent is not None else ""
            return (self._unit_of[span.name], kinds.GATHER_WAIT) if "gather" in within else (STEP, span.kind)
        return self._unit_of.get(span.name, OUTSIDE_UNITS), span.kind

    def end_step(self, now: float) -> None:
        """An optimizer step has ended at ``now``."""
        since = now if self._since is None else self._since
        self._now.wall_s += now - since
        self._now.num_steps += 1
        self._since = now

    def start_again(self, now: float) -> None:
        """What was between the end of the last step and ``now`` is nobody's: the tables' and traces' own writing."""
        self._since = now

    def take(self) -> StepTimes:
        """What has been added up since the last time."""
        taken, self._now = self._now, StepTimes(self._units)
        return taken


def table_of(times: StepTimes, step: int, rank: int = 0) -> str:
    """The table, in milliseconds per step.

    Args:
        step: the last of them.
        rank: whose it is.
    """
    per_step = 1e3 / max(times.num_steps, 1)
    columns = [c for c in COLUMNS if c != kinds.UNIT_AGAIN or any(times.counts[u, c] for u in times.units)]
    rows = [(name, [sum(times.seconds[u, c] for u in units) for c in columns]) for name, units in _rows(times.units)]
    rows.append((OUTSIDE_UNITS, [times.seconds[OUTSIDE_UNITS, c] for c in columns]))
    rows.append(("all units", [sum(cells) for cells in zip(*(cells for _, cells in rows), strict=True)]))
    width = max(len("outside the engine"), *(len(name) for name, _ in rows))
    wall = max(times.wall_s, 1e-12)
    mean = f", mean of {times.num_steps} steps" if times.num_steps > 1 else ""
    lines = [
        f"step {step} · {times.wall_s * per_step:.2f} ms{mean} · rank {rank} of {max(len(times.by_rank), 1)}, in ms",
        "unit".ljust(width) + "".join(f"{c:>13}" for c in (*columns, "all", "share")),
    ]

    def line(name: str, cells: list[str], total_s: float) -> str:
        share = f"{100 * total_s / wall:.1f} %"
        return name.ljust(width) + "".join(f"{c:>13}" for c in (*cells, f"{total_s * per_step:.2f}", share))

    for name, cells in rows:
        lines.append(line(name, [f"{c * per_step:.2f}" if c else "-" for c in cells], sum(cells)))
    parts = [(c, times.seconds[STEP, c]) for c in STEP_COLUMNS]
    blank = [""] * len(columns)
    lines.append(line(STEP, blank, sum(s for _, s in parts)))
    lines += [line(f"  {c}", blank, s) for c, s in parts if s * per_step >= 0.005]
    lines.append(line("outside the engine", blank, times.outside_s))
    lines.append(line("all", blank, times.total_s))
    if times.beside_s:
        lines.append(f"updates under the forward, in a thread of their own: {times.beside_s * per_step:.2f} ms")
    return "\n".join([*lines, *_ranks_apart(times, per_step)])


def _rows(units: list[str]) -> list[tuple[str, list[str]]]:
    """(row, its units): repeated blocks, whose names differ in a number, are one."""
    found: dict[str, list[str]] = {}
    for unit in units:
        found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", unit), []).append(unit)
    rows: list[tuple[str, list[str]]] = []
    for pattern, members in found.items():
        if len(members) >= SUMMARISED_FROM:
            rows.append((f"{pattern} ×{len(members)}", members))
        else:
            rows += [(unit, [unit]) for unit in members]
    return rows


def _ranks_apart(times: StepTimes, per_step: float) -> list[str]:
    """How far the ranks are apart, in what they compute and in what they wait for."""
    lines = []
    computing = (kinds.UNIT_FORWARD, kinds.UNIT_AGAIN, kinds.UNIT_BACKWARD, kinds.UPDATED)
    waiting = (kinds.GATHER_WAIT, kinds.REDUCE_WAIT, kinds.NORM, kinds.PUBLISH)
    for title, wanted in (("computing", computing), ("waiting", waiting)):
        sums = [
            sum(s for (_, column), s in zip(times.cells, cells, strict=True) if column in wanted) * per_step
            for cells in times.by_rank
        ]
        if len(sums) > 1:
            mean, most, least = sum(sums) / len(sums), max(sums), min(sums)
            over = f", {100 * (most / mean - 1):.1f} % over the mean" if mean else ""
            lines.append(
                f"{title}: {mean:.2f} ms in the mean of {len(sums)} ranks; most {most:.2f} on rank {sums.index(most)}"
                f"{over}; least {least:.2f} on rank {sums.index(least)}"
            )
    return lines
