"""``comms_logger``: its bytes are the traffic equations', its table DeepSpeed's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from profiled import DEPTH, make, said, settings, train

from tritonspeed.comm import Mesh
from tritonspeed.estimation.machine import INSIDE
from tritonspeed.estimation.traffic import Workload, total_bytes
from tritonspeed.profiling.comms import CommsLog, bandwidths, log_of, log_summary, size_text
from tritonspeed.zero.stages import stage_of

WORLD, STEPS = 2, 2
UNITS = 1 + DEPTH


def log(**more: Any) -> dict[str, Any]:
    return {"comms_logger": {"enabled": True, **more}}


def moved(stage: int, accumulation: int) -> tuple[float, float, dict[str, int]]:
    """(bytes that the log says this rank received, what the equations say, operations by name) of two steps."""
    engine = make(settings(stage, accumulation, **log()))
    train(engine, 1, accumulation)
    record = log_of(engine.mesh)
    assert record is not None
    record.rows.clear()
    train(engine, STEPS, accumulation, first=1)
    summary = engine.comms_summary(return_dict=True)["summary"]
    exchanges = summary.pop("exchange")
    work = Workload(
        num_params=sum(bucket.layout.numel for bucket in engine.sharded.buckets),
        tokens=0,
        stage=stage_of(stage),
        world=WORLD,
        ranks_per_node=WORLD,
        accumulation=accumulation,
    )
    received = sum(n * row["count"] for rows in summary.values() for n, row in rows.items()) * (WORLD - 1) / WORLD
    counts = {name: sum(row["count"] for row in rows.values()) for name, rows in summary.items()}
    counts["exchange"] = sum(row["count"] for row in exchanges.values())
    engine.destroy()
    assert not engine.mesh.spans.on
    return received, STEPS * total_bytes(work)[INSIDE], counts


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_bytes_are_those_of_the_equations(ranks, stage, accumulation):
    reductions = accumulation if stage >= 2 else 1
    gathers = 2 * accumulation if stage == 3 else 1
    wanted = {
        "all_gather_into_tensor": STEPS * UNITS * gathers,
        "reduce_scatter_tensor": STEPS * UNITS * reductions,
        "exchange": STEPS,
    }
    for received, equation, counts in ranks(WORLD, moved, stage, accumulation):
        assert received == equation > 0
        assert counts == wanted


def filtered(block: dict[str, Any]) -> tuple[list[str], list[str]]:
    with said() as lines:
        engine = make(settings(2, **log(**block)))
        record = log_of(engine.mesh)
        assert record is not None
        record.rows.clear()  # the log is the mesh's: it outlives its engines
        train(engine, 1)
        lines_of_ops = [line for line in lines if line.startswith("comm op: ")]
        engine.comms_summary()
        names = sorted(record.rows)
        engine.destroy()
    return names, lines_of_ops + [line for line in lines if line.startswith("Comm. Op")]


def test_only_the_operations_that_were_asked_for(ranks):
    (names, lines), (_, silent) = ranks(WORLD, filtered, {"prof_all": False, "prof_ops": ["reduce_scatter"]})
    assert names == ["reduce_scatter_tensor"] and not silent
    assert len(lines) == 1 and "all_gather" not in lines[0]


def test_verbose_says_each_and_debug_who_asked(ranks):
    (names, lines), (_, silent) = ranks(WORLD, filtered, {"verbose": True, "debug": True})
    assert "reduce_scatter_tensor | [Caller Func: zero.gradient:_start_reduction]" in names and not silent
    assert "exchange | [Caller Func: zero.measure:_gather_facts]" in names
    each = re.compile(
        r"comm op: (\S+) \| \[Caller Func: \S+\] \| unit: (\S+) \| time \(ms\): [\d.]+ \| msg size: [\d.]+ K?B"
        r" \| algbw \(Gbps\): [\d.]+ \| busbw \(Gbps\): [\d.]+"
    )
    found = [m for line in lines if (m := each.fullmatch(line))]
    reduced = [m[2] for m in found if m[1] == "reduce_scatter_tensor"]
    assert reduced == ["blocks.2", "blocks.1", "blocks.0", "root"]  # as backward fills them


def test_the_table(ranks):
    (_, lines), _ = ranks(WORLD, filtered, {})
    (table,) = lines
    head, *rows = table.splitlines()
    bandwidth = ["tput_avg (Gbps)", "busbw_avg (Gbps)"]
    latency = ["Total Latency(ms)", "Avg Latency(ms)"]
    assert re.split(r"\s{2,}", head) == ["Comm. Op", "Message Size", "Count", *latency, *bandwidth]
    assert rows[0] == "all_gather_into_tensor" and rows[-1].startswith("all ")
    count, total, average = re.split(r"\s{2,}", rows[1].strip())[1:4]
    assert abs(float(total) / int(count) - float(average)) <= 0.01 + 0.01 / int(count)  # both rounded to 0.01


def stragglers() -> tuple[list[str], dict[str, Any]]:
    with said() as lines:
        engine = make(settings(1, **log()))
        train(engine, 1)
        summary = engine.comms_summary(show_straggler=True, return_dict=True)
        engine.destroy()
    return [line for line in lines if "Straggler(ms)" in line], summary["summary"]


def test_the_slowest_and_the_fastest_rank(ranks):
    (tables, mine), (silent, theirs) = ranks(WORLD, stragglers)
    assert not silent
    (table,) = tables
    size = next(iter(mine["exchange"]))
    lines = iter(table.splitlines())
    assert "exchange" in lines  # and what follows is its row
    row = next(lines)
    total = [each["exchange"][size]["total_latency_ms"] for each in (mine, theirs)]
    assert abs(float(row.split()[-1]) - (total[0] - min(total))) < 0.011


@pytest.mark.parametrize(
    ("name", "on_the_bus"),
    [("all_gather_into_tensor", 0.75), ("reduce_scatter_tensor", 0.75), ("all_reduce", 1.5), ("broadcast", 1.0)],
)
def test_bandwidths(name, on_the_bus):
    algorithmic, bus = bandwidths(name, 125_000_000, 0.5, 4)  # 1 Gbit in half a second, 4 ranks
    assert (algorithmic, bus) == (2.0, 2.0 * on_the_bus)


def test_sizes_in_words():
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 20)] == ["0 B", "1023 B", "1.50 KB", "3.00 MB"]


def test_one_rank_and_no_log_are_said():
    with said() as lines:
        assert log_summary(return_dict=True) == {"summary": {}}
        engine = make(settings(3, **log()))
        train(engine, 1)
        engine.comms_summary()
        engine.destroy()
    assert any("enable it in the config" in line for line in lines) and any(
        "one rank sends nothing" in s for s in lines
    )


def test_unknown_names_are_said():
    with said() as lines:
        record = CommsLog(Mesh(0, 2, torch.device("cpu"), "none"))
        record.configure(False, False, ["all_reduced"], False)
        record.configure(False, True, ["all_reduced"], False)  # everything is recorded: nothing is missed
    assert len(lines) == 1 and "all_reduced" in lines[0]
