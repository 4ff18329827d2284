"""``engine.trace``: valid JSON, every event there once, memory that is the ledger's, and numbers that do not change."""

from __future__ import annotations

import builtins
import json
import math
from collections import Counter
from typing import Any

import pytest
from models import batch
from profiled import DEPTH, make, said, settings, train

from tritonspeed.profiling.recorded import Recorded, StepMark, Stretch, aligned, in_rows

PNG = b"\x89PNG\r\n\x1a\n"
UNITS = ["root", *(f"blocks.{number}" for number in range(DEPTH))]
WATCHED = {"wall_clock_breakdown": True, "steps_per_print": 1, "comms_logger": {"enabled": True}}


def recorded(stage: int, tier: str, folder: str) -> tuple[Any, ...]:
    """Three steps, the middle two traced; and the same without anybody looking."""
    with said() as lines:
        plain = make(settings(stage, 2, tier, f"{folder}/plain"))
        train(plain, 3, 2)
        want = plain.module_state_dict()
        plain.destroy()
        engine = make(settings(stage, 2, tier, f"{folder}/tier", **WATCHED))
        train(engine, 1, 2)
        with engine.trace(steps=3, folder=f"{folder}/traces") as trace:
            reports = train(engine, 2, 2, first=1)
        same = all(value.equal(want[name]) for name, value in engine.module_state_dict().items())
        engine.destroy()
    peaks = [{"device": r.peak_bytes, "host": r.host_peak_bytes} for r in reports]
    said_where = [line for line in lines if line.startswith("trace: ")]
    return trace.json_path, trace.png_path, peaks, same, said_where, [r.disk_bytes for r in reports]


CASES = [(0, ""), (1, ""), (2, "cpu"), (3, ""), (3, "cpu"), (3, "nvme")]


@pytest.mark.parametrize(("stage", "tier"), CASES)
def test_a_trace_of_two_ranks(ranks, tmp_path, stage, tier):
    first, second = ranks(2, recorded, stage, tier, str(tmp_path))
    assert first[3] and second[3], "weights differ from those of a run that nobody watched"
    assert (second[0], second[1], second[4]) == (None, None, []) and len(first[4]) == 1
    assert first[1].read_bytes().startswith(PNG) and first[0].name == "trace-steps-2-3.json"
    document = json.loads(first[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    events = document["traceEvents"]
    for rank, (_, _, peaks, _, _, disk) in enumerate((first, second)):
        mine = [event for event in events if event["pid"] == rank]
        check_rows(mine)
        check_counts(mine, stage)
        check_memory(mine, document["otherData"]["peak_bytes_by_step"][f"rank {rank}"], peaks, disk)
        if tier == "nvme":
            assert {"fetch", "store"} <= {event["cat"] for event in mine if event["ph"] == "X"}
    assert {event["pid"] for event in events} == {0, 1}


def check_rows(events: list[dict[str, Any]]) -> None:
    """What a viewer needs: names of rows, and in a row spans that nest or follow each other."""
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["tid"] in named and event["dur"] >= 0 and math.isfinite(event["ts"])
            rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in rows.values():
        open_ends: list[float] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-3, "spans of one row overlap"  # microseconds
            open_ends.append(end)


def check_counts(events: list[dict[str, Any]], stage: int) -> None:
    """Two steps of two micro-steps each."""
    found = Counter((event["cat"], event["args"].get("unit")) for event in events if event["ph"] == "X")
    reductions = 4 if stage >= 2 else 2
    for unit in UNITS:
        assert found["forward", unit] == found["backward", unit] == 4, unit
        assert found["reduce send", unit] == found["reduce wait", unit] == reductions
        assert found["gather send", unit] == found["gather wait", unit] == (8 if stage == 3 else 0)
    phases = Counter(event["name"] for event in events if event["ph"] == "X" and event["cat"] == "phase")
    assert phases == {"forward": 4, "backward": 4, "step": 2}
    steps = [event["name"] for event in events if event["ph"] == "X" and event["cat"] == "step"]
    assert steps == ["step 2", "step 3"] and found["norm", ""] == 2


def check_memory(
    events: list[dict[str, Any]], peaks: list[dict[str, int]], wanted: list[dict[str, int]], disk: list[int]
) -> None:
    assert [{tier: step[tier] for tier in ("device", "host")} for step in peaks] == wanted
    counters = [event["args"] for event in events if event["ph"] == "C"]
    owners = {"parameters", "gradients", "optimizer", "communication", "host", "disk"}
    assert all(set(values) == owners and min(values.values()) >= 0 for values in counters)
    assert max(values["disk"] for values in counters) == disk[-1]  # a state's file is made with the state


def test_it_ends_by_itself_and_can_begin_again(tmp_path):
    engine = make(settings(3))
    trace = engine.trace(steps=2, folder=tmp_path)
    with pytest.raises(ValueError, match="recorded already"):
        engine.trace()
    train(engine, 4)
    assert not trace.is_open and trace.json_path == tmp_path / "trace-steps-1-2.json"
    assert not engine.mesh.spans.on and engine.sharded.ledger.changes is None
    with engine.trace(folder=tmp_path) as again:
        train(engine, 1, first=4)
    assert again.json_path == tmp_path / "trace-steps-5-5.json"
    engine.destroy()


def test_a_block_that_fails_writes_nothing(tmp_path):
    engine = make(settings(1))
    with pytest.raises(KeyError), engine.trace(folder=tmp_path):
        train(engine, 1)
        raise KeyError("the caller's")
    assert not list(tmp_path.iterdir()) and not engine.mesh.spans.on
    with pytest.raises(ValueError, match="one step at least"):
        engine.trace(steps=0)
    train(engine, 1, first=1)
    engine.destroy()


def test_an_interrupted_backward_is_closed(tmp_path):
    engine = make(settings(3))
    with engine.trace(folder=tmp_path) as trace:
        loss = engine(*batch(0, 0))
        handle = engine.module.get_parameter("blocks.0.mix.weight").register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.backward(loss)
        handle.remove()
        train(engine, 1)
    backwards = Counter(s.name for s in trace.ranks[0].spans if s.kind == "backward")
    assert backwards["blocks.2"] == 2 and backwards["root"] == 2
    engine.destroy()


def test_without_matplotlib_there_is_a_line(monkeypatch, tmp_path):
    import sys

    monkeypatch.delitem(sys.modules, "tritonspeed.profiling.timeline", raising=False)
    really = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    engine = make(settings(0))
    with said() as lines, engine.trace(steps=1, folder=tmp_path) as trace:
        train(engine, 1)
    assert trace.png_path is None and trace.json_path is not None
    assert any("pip install matplotlib" in line for line in lines)
    engine.destroy()


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    engine = make(settings(0))
    with said() as lines, engine.trace(steps=1, folder=blocked / "traces") as trace:
        train(engine, 2)
    assert trace.json_path is None and any("cannot be written" in line for line in lines)
    engine.destroy()


def rank_on(host: str, number: int, shows_more: float) -> Recorded:
    """A rank whose clock shows ``shows_more`` seconds more than the true time."""
    jitter = [0.0, 1e-4, -1e-4, 2e-4, 0.0]
    return Recorded(
        rank=number,
        device="cpu",
        host=host,
        begin=10 + shows_more,
        end=12 + shows_more,
        moments=[20 + i + shows_more + number * late for i, late in enumerate(jitter)],
        spans=[Stretch("forward", "root", "", 0, "main", 11 + shows_more, 11.5 + shows_more)],
        steps=[StepMark(1, 10 + shows_more, 12 + shows_more)],
        before={"device": {}, "host": {}, "disk": {}},
        changes={"device": [(11 + shows_more, "gradients", 4)], "host": [], "disk": []},
    )


def test_clocks_of_several_machines_are_aligned():
    here, beside, far = rank_on("a", 0, 0.0), rank_on("a", 1, 0.0), rank_on("b", 2, 5000.0)
    for each in aligned([here, beside, far]):
        assert abs(each.spans[0].begin - 1.0) < 1e-3 and abs(each.steps[0].end - 2.0) < 1e-3
        assert abs(list(each.curve())[-1][0] - 1.0) < 1e-3


def test_a_record_survives_its_journey():
    record = rank_on("a", 3, 1.0)
    again = Recorded.from_text(record.to_text())
    assert again == record and isinstance(again.spans[0], Stretch)


def test_rows_hold_what_does_not_overlap():
    spans = [Stretch("fetch", "x", "", 0, "offload", a, b) for a, b in ((0, 4), (1, 2), (2, 3), (4, 5))]
    assert [[(s.begin, s.end) for s in row] for row in in_rows(spans)] == [[(0, 4), (4, 5)], [(1, 2), (2, 3)]]


def test_nothing_listens_unless_it_is_asked_for():
    engine = make(settings(3))
    train(engine, 1)
    assert not engine.mesh.spans.on and engine.last_times is None
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules())
    with engine.trace() as trace:
        more = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules())
        trace.drop()
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules())
    assert more == hooks + 2 * len(UNITS) and after == hooks
    engine.destroy()
