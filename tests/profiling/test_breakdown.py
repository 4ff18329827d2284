"""``wall_clock_breakdown``: the cells add up to the wall time, and each moment stands in the right one."""

from __future__ import annotations

import re

import pytest
import torch
from models import Net
from profiled import DEPTH, Clock, Slow, make, said, settings, train
from torch import nn

from tritonspeed.profiling.breakdown import COLUMNS, OUTSIDE_UNITS, STEP, StepTimes, table_of


class Stack(nn.Module):
    def __init__(self, clock: Clock, times: list[tuple[float, float]]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Slow(clock, *each) for each in times])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.sum()


@pytest.mark.parametrize("stage", [0, 3])
def test_every_second_stands_in_its_cell(monkeypatch, stage):
    clock = Clock(monkeypatch)
    config = settings(stage, wall_clock_breakdown=True, steps_per_print=2, bf16={"enabled": False})
    engine = make(config, Stack(clock, [(1, 2), (10, 20), (100, 200)]))
    began = clock.now
    for _ in range(2):
        loss = engine(torch.ones(2, 4))
        clock.pass_(1000)  # the caller's own
        engine.backward(loss)
        engine.step()
        clock.pass_(5000)  # the data loader
    times = engine.last_times
    assert times is not None and times.num_steps == 2
    # the last wait is the next step's
    assert times.wall_s == times.total_s == clock.now - began - 5000 == 2 * (333 + 1000) + 5000
    for number, forward, backward in ((0, 1, 2), (1, 10, 20), (2, 100, 200)):
        assert times.seconds[f"blocks.{number}", "forward"] == 2 * forward
        assert times.seconds[f"blocks.{number}", "backward"] == 2 * backward
        assert times.counts[f"blocks.{number}", "forward"] == times.counts[f"blocks.{number}", "backward"] == 2
    assert times.outside_s == 2 * 1000 + 5000
    assert sum(times.seconds.values()) == 2 * 333
    engine.destroy()
    assert not engine.mesh.spans.on


def test_recomputing_stands_in_a_column_of_its_own(monkeypatch):
    Clock(monkeypatch)
    engine = make(settings(3, wall_clock_breakdown=True, steps_per_print=1), Net(recompute="plain"))
    train(engine, 2)
    times = engine.last_times
    assert times is not None
    for unit in (f"blocks.{number}" for number in range(DEPTH)):
        assert [times.counts[unit, kind] for kind in ("forward", "recompute", "backward")] == [1, 1, 1], unit
    assert "recompute" in table_of(times, 2)
    engine.destroy()


def test_a_backward_that_is_not_the_engines_counts_too(monkeypatch):
    clock = Clock(monkeypatch)
    engine = make(settings(1, wall_clock_breakdown=True, steps_per_print=1), Stack(clock, [(1, 2), (3, 4)]))
    loss = engine(torch.ones(2, 4).bfloat16())
    loss.backward()
    engine.step()
    times = engine.last_times
    assert times is not None and times.outside_s == 0 and times.wall_s == 10
    assert times.counts[OUTSIDE_UNITS, "backward"] == 1
    engine.destroy()


def real(stage: int, accumulation: int) -> tuple[StepTimes, list[str]]:
    with said() as lines:
        engine = make(settings(stage, accumulation, wall_clock_breakdown=True, steps_per_print=3))
        train(engine, 6, accumulation)
        times = engine.last_times
        engine.destroy()
    assert times is not None
    return times, [line for line in lines if "outside the engine" in line]


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (2, 2), (3, 2)])
def test_tables_on_two_ranks(ranks, stage, accumulation):
    (times, tables), (other, silent) = ranks(2, real, stage, accumulation)
    assert len(tables) == 2 and not silent  # after steps 3 and 6, on rank 0
    for each in (times, other):
        assert each.num_steps == 3
        assert abs(each.total_s - each.wall_s) <= 1e-9 * each.wall_s  # the table's sum, of the wall time
        assert 0 <= each.outside_s <= each.wall_s and min(each.seconds.values()) >= 0
        passes, reductions = 3 * accumulation, 3 * (accumulation if stage > 1 else 1)
        for unit in each.units:
            gathers = 2 * passes if stage == 3 else 0
            wanted = {"forward": passes, "backward": passes, "reduce send": reductions, "reduce wait": reductions}
            wanted |= {"gather send": gathers, "gather wait": gathers}
            assert {c: each.counts[unit, c] for c in COLUMNS if each.counts[unit, c]} == {
                c: n for c, n in wanted.items() if n
            }
        assert each.counts[STEP, "norm"] == 3 and each.counts[STEP, "update"] == 3 * len(each.units)
    assert [len(row) for row in times.by_rank] == [len(times.cells)] * 2 and times.by_rank == other.by_rank
    check_text(tables[1], times)


def check_text(table: str, times: StepTimes) -> None:
    assert table.startswith("step 6 · ") and "mean of 3 steps" in table and f"blocks.* ×{DEPTH}" in table
    shares = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(\S.*?)  .* ([\d.]+) %$", table, re.MULTILINE)}
    assert shares["all"] == 100.0
    assert abs(shares["all units"] + shares["step"] + shares["outside the engine"] - 100) < 0.2  # rounded to 0.1 each
    assert "computing: " in table and "waiting: " in table
    per_step = 1e3 * sum(times.seconds[f"blocks.{i}", "forward"] for i in range(DEPTH)) / 3
    assert f"{per_step:.2f}" in next(line for line in table.splitlines() if line.startswith("blocks.*"))


def test_a_listener_goes_with_its_engine():
    import gc

    engine = make(settings(0, wall_clock_breakdown=True))
    spans = engine.mesh.spans
    assert spans.on
    del engine
    gc.collect()
    assert not spans.on


def test_a_model_that_is_sharded_anew_is_told_of_once():
    config = settings(3, wall_clock_breakdown=True, steps_per_print=1)
    model = Net()
    first = make(config, model)
    train(first, 1)
    again = make(config, model)
    train(again, 2, first=1)
    times = again.last_times
    assert times is not None
    for unit in times.units:
        assert (times.counts[unit, "forward"], times.counts[unit, "backward"]) == (1, 1), unit
    assert first.last_times is not None and first.last_times.counts["root", "forward"] == 1
    for engine in (again, first):
        engine._watch.close()
    assert not again.mesh.spans.on
    again.destroy()
