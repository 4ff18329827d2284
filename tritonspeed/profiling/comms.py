"""The log of collectives (``comms_logger``): DeepSpeed's table of operations, sizes, times and bandwidths.

For n ranks, a message of M bytes and t seconds from its issue to its completion:

    operation                        M                                  algorithmic    on the bus
    all_gather_into_tensor           the whole that every rank has then  M / t          M / t · (n-1)/n
    reduce_scatter_tensor            the whole that every rank gave      M / t          M / t · (n-1)/n
    all_to_all_single                what a rank sends                   M / t          M / t · (n-1)/n
    all_reduce                       the tensor                          M / t          M / t · 2(n-1)/n
    broadcast                        the tensor                          M / t          M / t
    exchange                         the facts of a step, of all ranks   M / t          M / t · (n-1)/n

Collectives run under what a rank computes, so t is what they took there, not what anybody waited for
(``wall_clock_breakdown`` says that), and t ends when the result is asked for, except on NCCL: bandwidths are what was
reached at least. Gbit/s, as in DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from tritonspeed import comm
from tritonspeed.comm import Mesh, Span, Spans
from tritonspeed.comm.spans import COLLECTIVE
from tritonspeed.config import Config
from tritonspeed.log import asked_for

log = asked_for()

NAMES = {
    "all-gather": "all_gather_into_tensor",
    "reduce-scatter": "reduce_scatter_tensor",
    "all-to-all": "all_to_all_single",
    "all-reduce": "all_reduce",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "exchange": "exchange",
}
ALIASES = {
    "all_gather": "all_gather_into_tensor",
    "allgather_fn": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "reduce_scatter_fn": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
}
_ON_THE_BUS = {"all_reduce": 2.0, "broadcast": None, "barrier": None}  # × (n-1)/n; None is 1


class CommsLog:
    """Listens to the collectives over one mesh, and counts them.

    Attributes:
        rows: operation → message bytes → (count, seconds in all).
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world = mesh.rank, mesh.world
        self.rows: dict[str, dict[int, tuple[int, float]]] = {}
        self.users = 0  # engines that want it
        self.verbose = self.debug = False
        self.wanted: set[str] | None = None  # None is all

    def configure(self, verbose: bool, prof_all: bool, prof_ops: Sequence[str], debug: bool) -> None:
        """What to record, and how loudly; the keys of the config's block."""
        unknown = sorted(set(prof_ops) - {*NAMES.values(), *ALIASES})
        if unknown and not prof_all:
            log.warning(
                "comms_logger.prof_ops: %s: no collective of these names is used here; %s are",
                unknown,
                list(NAMES.values()),
            )
        self.verbose, self.debug = verbose, debug
        self.wanted = None if prof_all else {ALIASES.get(name, name) for name in prof_ops}

    def __call__(self, span: Span) -> None:
        """A span has ended."""
        if span.kind != COLLECTIVE:
            return
        name = NAMES[span.name]
        if self.wanted is not None and name not in self.wanted:
            return
        record = f"{name} | [Caller Func: {span.caller}]" if self.debug else name
        sizes = self.rows.setdefault(record, {})
        count, seconds = sizes.get(span.num_bytes, (0, 0.0))
        sizes[span.num_bytes] = count + 1, seconds + span.duration_s
        if self.verbose and self.rank == 0:
            algorithmic, bus = bandwidths(name, span.num_bytes, span.duration_s, self.world)
            log.info(
                "comm op: %s | unit: %s | time (ms): %.2f | msg size: %s | algbw (Gbps): %.2f | busbw (Gbps): %.2f",
                *(record, span.unit or "-", 1e3 * span.duration_s, size_text(span.num_bytes), algorithmic, bus),
            )

    def summary(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Operation → message bytes → the row of the table, under DeepSpeed's names."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for record, sizes in sorted(self.rows.items()):
            found[record] = {}
            for num_bytes, (count, seconds) in sorted(sizes.items()):
                algorithmic, bus = bandwidths(record.partition(" ")[0], num_bytes, seconds / count, self.world)
                found[record][num_bytes] = {
                    "count": count,
                    "total_latency_ms": 1e3 * seconds,
                    "avg_latency_ms": 1e3 * seconds / count,
                    "tput_avg_gbps": algorithmic,
                    "busbw_avg_gbps": bus,
                    "msg_size_bytes": num_bytes,
                    "msg_size_str": size_text(num_bytes),
                }
        return found

    def table(self, least_ms: dict[str, dict[int, float]] | None = None) -> str:
        """The table.

        Args:
            least_ms: total latency of the fastest rank, by operation and bytes: adds what this one took longer.
        """
        if not self.rows:
            why = "one rank sends nothing" if self.world == 1 else "no collective has ended since it was enabled"
            return f"comms_logger: {why}"
        titles = ["Comm. Op", "Message Size", "Count", "Total Latency(ms)", "Avg Latency(ms)"]
        titles += ["tput_avg (Gbps)", "busbw_avg (Gbps)"] + (["Straggler(ms)"] if least_ms is not None else [])
        first = 2 + max(len(titles[0]), *(len(record) for record in self.rows))
        lines = [titles[0].ljust(first) + "".join(title.rjust(19) for title in titles[1:])]
        moved, count, ms = 0, 0, 0.0
        for record, sizes in self.summary().items():
            lines.append(record)
            for num_bytes, row in sizes.items():
                cells = [row["msg_size_str"], str(row["count"])]
                cells += [f"{row[key]:.2f}" for key in ("total_latency_ms", "avg_latency_ms")]
                cells += [f"{row[key]:.2f}" for key in ("tput_avg_gbps", "busbw_avg_gbps")]
                if least_ms is not None:
                    cells.append(f"{row['total_latency_ms'] - least_ms.get(record, {}).get(num_bytes, 0.0):.2f}")
                lines.append(" " * first + "".join(cell.rjust(19) for cell in cells))
                moved, count = moved + num_bytes * row["count"], count + row["count"]
                ms += row["total_latency_ms"]
        totals = (size_text(moved), str(count), f"{ms:.2f}")
        lines.append("all".ljust(first) + "".join(cell.rjust(19) for cell in totals))
        return "\n".join(lines)


def bandwidths(name: str, num_bytes: int, seconds: float, world: int) -> tuple[float, float]:
    """(algorithmic, bus) in Gbit/s; the formulas stand above."""
    algorithmic = 8e-9 * num_bytes / seconds if seconds > 0 else 0.0
    factor = _ON_THE_BUS.get(name, 1.0)
    return algorithmic, algorithmic * (1.0 if factor is None else factor * (world - 1) / world)


def size_text(num_bytes: int) -> str:
    """DeepSpeed's writing: "2.0 KB", powers of 1024."""
    size, unit = float(num_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.2f} {unit}" if unit != "B" else f"{num_bytes} B"


_logs: WeakKeyDictionary[Spans, CommsLog] = WeakKeyDictionary()
_latest: ReferenceType[Mesh] | None = None  # whose log was started last


def _mesh_of_log() -> Mesh:
    """Where the functions that are given no mesh look."""
    return (_latest() if _latest is not None else None) or comm.mesh_of()


def log_of(mesh: Mesh) -> CommsLog | None:
    """The log of a mesh, if there is one."""
    return _logs.get(mesh.spans)


def start_log(mesh: Mesh, config: Config) -> bool:
    """Record the collectives over ``mesh`` from now on, as the config's block says; False where it is off."""
    block = config.comms_logger
    if not block.enabled:
        return False
    global _latest
    _latest = ref(mesh)
    made = _logs.setdefault(mesh.spans, CommsLog(mesh))
    made.configure(bool(block.verbose), bool(block.prof_all), list(block.prof_ops), bool(block.debug))
    mesh.spans.names_callers = made.debug
    if made.users == 0:
        mesh.spans.listen(made, mesh.device)
    made.users += 1
    return True


def stop_log(spans: Spans) -> None:
    """One engine wants it no more. What was recorded stays."""
    made = _logs.get(spans)
    if made is not None and made.users > 0:
        made.users -= 1
        if made.users == 0:
            spans.leave(made)


def log_summary(show_straggler: bool = False, return_dict: bool = False, mesh: Mesh | None = None) -> Any:
    """Log the table of collectives, on rank 0: ``deepspeed.comm.log_summary``.

    Args:
        show_straggler: a column more: how much longer this rank took in all than the fastest. Collective.
        return_dict: return ``{"summary": ...}``, on every rank.
        mesh: whose; None is that of the engine that was made last, of those that record.
    """
    mesh = mesh or _mesh_of_log()
    made = log_of(mesh)
    if made is None:
        if mesh.rank == 0:
            log.info("comms_logger is off: enable it in the config, comms_logger.enabled")
        return {"summary": {}} if return_dict else None
    mesh.spans.collect(wait=True)
    summary = made.summary()
    least = _least(mesh, summary) if show_straggler else None
    if mesh.rank == 0:
        log.info("%s", made.table(least))
    return {"summary": summary} if return_dict else None


def reset_log() -> None:
    """Forget what was recorded: the next summary begins here."""
    made = log_of(_mesh_of_log())
    if made is not None:
        made.rows.clear()


def has_comm_data() -> bool:
    """Whether any collective was recorded."""
    return bool(get_logged_comm_ops())


def get_logged_comm_ops() -> list[str]:
    """The operations that were recorded."""
    made = log_of(_mesh_of_log())
    return list(made.rows) if made is not None else []


def get_comm_operation_count() -> int:
    """How many collectives were recorded."""
    made = log_of(_mesh_of_log())
    return sum(count for sizes in made.rows.values() for count, _ in sizes.values()) if made is not None else 0


def _least(mesh: Mesh, summary: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, float]]:
    mine = {op: {n: row["total_latency_ms"] for n, row in sizes.items()} for op, sizes in summary.items()}
    least: dict[str, dict[int, float]] = {}
    for text in comm.gather_texts(mesh, json.dumps(mine), "comms_logger"):
        for record, sizes in json.loads(text).items():
            for num_bytes, ms in sizes.items():
                row = least.setdefault(record, {})
                row[int(num_bytes)] = min(ms, row.get(int(num_bytes), ms))
    return least
