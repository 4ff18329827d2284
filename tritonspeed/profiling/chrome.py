"""A trace in Chrome's format, for chrome://tracing and ui.perfetto.dev.

One process per rank; its rows are threads: steps, compute (phases, units in them, waits in those), communication,
offload. Rows of what may overlap (communication, offload) are as many as it takes. A counter shows the memory by owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tritonspeed.comm.spans import COMMUNICATION, MAIN, OFFLOAD, UPDATE
from tritonspeed.profiling.recorded import ALLOCATOR, Recorded, Stretch, in_rows

ROWS = (
    (MAIN, "compute"),
    (UPDATE, "update, under the next forward"),
    (COMMUNICATION, "communication"),
    (OFFLOAD, "offload"),
)
FIRST_THREAD = {MAIN: 1, UPDATE: 2, COMMUNICATION: 10, OFFLOAD: 100}
_COLOURS = {  # chrome://tracing knows these names; Perfetto chooses by itself
    "forward": "thread_state_running",
    "backward": "rail_response",
    "recompute": "rail_animation",
    "gather wait": "terrible",
    "reduce wait": "terrible",
    "update": "good",
    "publish": "thread_state_iowait",
}


def chrome_trace(ranks: Sequence[Recorded]) -> dict[str, Any]:
    """The document, for ``json.dump``.

    Args:
        ranks: on one clock, whose 0 is the beginning.
    """
    events: list[dict[str, Any]] = []
    for each in ranks:
        events += _names(each)
        events += [_step(each.rank, mark) for mark in each.steps]
        for lane, title in ROWS:
            spans = [span for span in each.spans if span.lane == lane]
            overlap = lane in (COMMUNICATION, OFFLOAD)
            for number, row in enumerate(in_rows(spans) if overlap else [spans] if spans else []):
                thread = FIRST_THREAD[lane] + number
                events.append(_name(each.rank, thread, f"{title} {number + 1}" if number else title))
                events += [_event(each.rank, thread, span) for span in row]
        events += [_counter(each.rank, "memory", at, values) for at, values in each.curve()]
        events += [_counter(each.rank, "GPU allocator", at, {ALLOCATOR: n}) for at, n in each.allocated]
    peaks = {f"rank {each.rank}": each.peaks() for each in ranks}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"peak_bytes_by_step": peaks}}


def _names(each: Recorded) -> list[dict[str, Any]]:
    process = {"ph": "M", "pid": each.rank, "tid": 0}
    return [
        {**process, "name": "process_name", "args": {"name": f"rank {each.rank} ({each.device})"}},
        {**process, "name": "process_sort_index", "args": {"sort_index": each.rank}},
        _name(each.rank, 0, "steps"),
    ]


def _name(rank: int, thread: int, title: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": title}}


def _step(rank: int, mark: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": rank,
        "tid": 0,
        "cat": "step",
        "name": f"step {mark.step}",
        "ts": 1e6 * mark.begin,
        "dur": 1e6 * (mark.end - mark.begin),
        "args": mark.facts,
    }


def _event(rank: int, thread: int, span: Stretch) -> dict[str, Any]:
    is_collective = span.lane == COMMUNICATION
    title = (
        f"{span.name} {span.unit}"
        if is_collective
        else span.name
        if span.kind == "phase"
        else f"{span.kind} {span.name}"
    )
    args: dict[str, Any] = {"unit": span.unit if is_collective else span.name}
    if span.num_bytes:
        args["bytes"] = span.num_bytes
    event = {
        "ph": "X",
        "pid": rank,
        "tid": thread,
        "cat": span.kind,
        "name": title.strip(),
        "ts": 1e6 * span.begin,
        "dur": 1e6 * (span.end - span.begin),
        "args": args,
    }
    return {**event, "cname": _COLOURS[span.kind]} if span.kind in _COLOURS else event


def _counter(rank: int, name: str, at: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "pid": rank, "tid": 0, "name": name, "ts": 1e6 * at, "args": values}
