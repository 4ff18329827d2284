"""How long the bytes of a step take: the bound of each link, the one that binds, and what overlap hides.

    step = time_of(workload, machine);   step.seconds, step.binding, step.seconds_of

Links work at once, so a phase takes as long as its slowest one. Where the optimizer runs under the next forward (stage
3), the step takes t_backward + max(t_forward, t_optimizer), more where both use one link; else the sum of the three.
There is no latency in it, and every link at its full speed: a run is slower. ``achieved`` says by how much.

Source   ZeRO-Infinity, arXiv:2104.07857, section 4 (bandwidths against arithmetic)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonspeed.estimation.machine import LINKS, Machine
from tritonspeed.estimation.traffic import Bytes, Workload, bytes_of, total_bytes


@dataclass(frozen=True)
class StepTime:
    """The least time of one step.

    Attributes:
        bytes_of: link → bytes of one rank in the step (flops, for compute).
        seconds_of: link → the seconds that they take on their own.
        phase_seconds: forward, backward, optimizer.
        serial_seconds: the phases one after another.
        overlapped_seconds: the optimizer under the next forward.
        is_overlapped: which of the two this run does.
        tokens_to_hide: per rank and step: from so many on, arithmetic covers the optimizer and what forward fetches,
            so that overlapped offload costs nothing; None where the run does not overlap.
    """

    bytes_of: Mapping[str, float]
    seconds_of: Mapping[str, float]
    phase_seconds: Mapping[str, float]
    serial_seconds: float
    overlapped_seconds: float
    is_overlapped: bool
    tokens_to_hide: float | None

    @property
    def seconds(self) -> float:
        return self.overlapped_seconds if self.is_overlapped else self.serial_seconds

    @property
    def binding(self) -> str:
        """The link that takes longest."""
        return max(self.seconds_of, key=lambda link: self.seconds_of[link])


def link_seconds(num_bytes: Mapping[str, float], machine: Machine, ranks_per_node: int, dtype: str) -> Bytes:
    """Link → seconds, for the bytes of one rank where each rank of the node moves as many."""
    return {
        link: num / machine.speed_of(link, dtype) * (ranks_per_node if machine.is_per_node(link) else 1)
        for link, num in num_bytes.items()
    }


def _slowest(seconds: Mapping[str, float], machine: Machine) -> float:
    times = dict(seconds)
    if not machine.disk_is_duplex:
        times["disk"] = times.pop("disk_read", 0.0) + times.pop("disk_write", 0.0)
    return max(times.values(), default=0.0)


def time_of(work: Workload, machine: Machine) -> StepTime:
    """The least time of a step of ``work`` on nodes like ``machine``.

    Raises:
        ValueError: a node has fewer devices than ranks.
    """
    if work.ranks_per_node > machine.num_devices:
        raise ValueError(
            f"{work.ranks_per_node} ranks on a node, but {machine.name} has {machine.num_devices} devices:"
            " spread the ranks over more nodes, or name a machine with more"
        )
    seconds = {
        phase: link_seconds(num_bytes, machine, work.ranks_per_node, work.dtype)
        for phase, num_bytes in bytes_of(work).items()
    }
    slowest = {phase: _slowest(times, machine) for phase, times in seconds.items()}
    forward, optimizer = seconds["forward"], seconds["optimizer"]
    both = {link: forward.get(link, 0.0) + optimizer.get(link, 0.0) for link in LINKS}
    totals = {link: both[link] + seconds["backward"].get(link, 0.0) for link in LINKS}
    hide = None
    if work.is_overlapped:
        beside = {link: time for link, time in both.items() if link != "compute"}
        hide = tokens_to_hide(_slowest(beside, machine), work.num_active, machine, work.dtype, flops_per_param=2)
    return StepTime(
        bytes_of=total_bytes(work),
        seconds_of={link: time for link, time in totals.items() if time},
        phase_seconds=slowest,
        serial_seconds=sum(slowest.values()),
        overlapped_seconds=slowest["backward"] + _slowest(both, machine),
        is_overlapped=work.is_overlapped,
        tokens_to_hide=hide,
    )


def tokens_to_hide(
    seconds: float, num_active: float, machine: Machine, dtype: str = "bf16", flops_per_param: float = 6
) -> float:
    """T* = seconds · F / (flops per parameter · Ψa): the tokens whose arithmetic takes as long.

    Args:
        seconds: of a link.
        num_active: parameters that a token meets.
        flops_per_param: 2 hides it under forward, 6 under forward and backward.
    """
    return seconds * machine.speed_of("compute", dtype) / (flops_per_param * num_active)


@dataclass(frozen=True)
class Achieved:
    """One link in a run.

    Attributes:
        link: of ``LINKS``.
        num_bytes: that this rank moved.
        seconds: that it was busy.
        bytes_per_s: the quotient.
        bound_bytes_per_s: what the machine's link gives this rank, its share of what the node's ranks have in common.
        share: achieved over bound.
    """

    link: str
    num_bytes: float
    seconds: float
    bytes_per_s: float
    bound_bytes_per_s: float
    share: float

    def __str__(self) -> str:
        speed, bound = self.bytes_per_s / 1e9, self.bound_bytes_per_s / 1e9
        name, gib = self.link.replace("_", " "), self.num_bytes / 2**30
        return f"{name}: {gib:,.2f} GiB in {self.seconds:.2f} s, {speed:.2f} of {bound:.2f} GB/s ({self.share:.0%})"


def achieved(report: Any, machine: Machine, ranks_per_node: int = 1) -> list[Achieved]:
    """What each link reached in a step, beside what it can: a row per link that moved something.

    Args:
        report: a ``StepReport``, whose ``links`` are taken, or those themselves: link → (bytes, seconds it was busy).
        machine: from ``calibrate``, or the table.
        ranks_per_node: how many share the node's links.

    Raises:
        ValueError: a link has no such name.
    """
    given: Mapping[str, tuple[float, float]] = report if isinstance(report, Mapping) else report.links
    found = {link.replace(" ", "_"): moved for link, moved in given.items()}
    unknown = sorted(set(found) - set(LINKS))
    if unknown:
        raise ValueError(f"links {', '.join(unknown)}: there are {', '.join(LINKS)}")
    rows = []
    for link in LINKS:
        num_bytes, seconds = found.get(link, (0, 0.0))
        if num_bytes and seconds > 0:
            bound = machine.speed_of(link) / (ranks_per_node if machine.is_per_node(link) else 1)
            speed = num_bytes / seconds
            rows.append(Achieved(link, num_bytes, seconds, speed, bound, speed / bound))
    return rows
