"""Spans of time: off they are nothing; on, every moment belongs to the innermost one."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from profiled import Clock, counts, heard, make, settings, train

from tritonspeed.comm.spans import COMMUNICATION, MAIN, UPDATE, Span, Spans

CPU = torch.device("cpu")


def test_nobody_listens_and_nothing_is_made():
    spans = Spans()
    assert spans.collective("all-gather", "unit", 8) is None and spans.start("fetch", "unit") is None
    assert spans.span("norm", "") is spans.span("update", "unit") is spans.phase("step", object())


def test_own_times_add_up_to_the_whole(monkeypatch):
    clock, spans, found = Clock(monkeypatch), Spans(), []
    spans.listen(found.append, CPU)
    owner = object()
    with spans.phase("forward", owner):
        clock.pass_(1)
        with spans.span("forward", "unit"):
            clock.pass_(2)
            with spans.span("gather wait", "unit", 64):
                clock.pass_(4)
            clock.pass_(8)
        clock.pass_(16)
    assert [(s.kind, s.duration_s, s.own_s) for s in found] == [
        ("gather wait", 4, 4),
        ("forward", 14, 10),
        ("phase", 31, 17),
    ]
    assert sum(s.own_s for s in found) == 31
    assert all(s.owner is owner and s.lane == MAIN for s in found) and found[0].num_bytes == 64


def test_a_collective_goes_on_beside_and_ends_once(monkeypatch):
    clock, spans, found = Clock(monkeypatch), Spans(), []
    spans.listen(found.append, CPU)
    under_way = spans.collective("reduce-scatter", "unit", 8)
    with spans.span("backward", "unit"):
        clock.pass_(3)
        under_way.close()
        under_way.close()
    assert [(s.kind, s.lane, s.own_s) for s in found] == [("collective", COMMUNICATION, 3), ("backward", MAIN, 3)]


def test_what_was_left_open_ends_with_what_is_around_it():
    spans, found = Spans(), []
    spans.listen(found.append, CPU)
    with spans.phase("backward", None):
        spans.open("backward", "unit")  # a backward that raises never leaves its unit
    with spans.span("norm", ""):
        pass
    assert [s.kind for s in found] == ["phase", "norm"] and found[1].parent is None


def test_a_thread_beside_the_step_has_a_lane_of_its_own():
    spans, found = Spans(), []
    spans.listen(found.append, CPU)
    with spans.phase("forward", None), spans.beside(), spans.span("update", "unit"):
        pass
    assert [(s.lane, s.parent) for s in found] == [(UPDATE, None), (MAIN, None)]
    with spans.span("norm", ""):
        pass
    assert found[-1].lane == MAIN


def test_who_leaves_hears_no_more():
    spans, one, other = Spans(), [], []
    first, second = one.append, other.append
    spans.listen(first, CPU)
    spans.listen(second, CPU)
    spans.leave(first)
    with spans.span("norm", ""):
        pass
    spans.leave(second)
    with spans.span("norm", ""):
        pass
    assert (len(one), len(other), spans.on) == (0, 1, False)


class Gpu:
    """A GPU's clock and what it has passed, turned by hand: events are what ``torch.cuda.Event`` is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms, self.passed_ms = 5.0, 5.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.at_ms = gpu.now_ms

            def query(self) -> bool:
                return self.at_ms <= gpu.passed_ms

            def synchronize(self) -> None:
                gpu.passed_ms = max(gpu.passed_ms, self.at_ms)

            def elapsed_time(self, end: Event) -> float:
                assert self.query() and end.query(), "an event that the GPU has not passed has no time"
                return end.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "observer")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "compute")
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.pass_to(self.now_ms))

    def pass_to(self, at_ms: float) -> None:
        self.passed_ms = max(self.passed_ms, at_ms)


def test_a_gpu_is_asked_and_not_waited_for(monkeypatch):
    clock, gpu, spans, found = Clock(monkeypatch), Gpu(monkeypatch), Spans(), []
    spans.listen(found.append, torch.device("cuda", 0))
    with spans.phase("forward", None):
        gpu.now_ms += 1000
        with spans.span("forward", "unit"):
            gpu.now_ms += 2000
        spans.mark()
        with spans.span("backward", "unit"):
            gpu.now_ms += 4000
    spans.collect()
    assert not found, "it has passed none of these yet"
    gpu.pass_to(3005)
    spans.collect()
    assert [s.kind for s in found] == ["forward"]
    spans.collect(wait=True)
    assert [(s.begin, s.end, s.own_s) for s in found] == [(101, 103, 2), (103, 107, 4), (100, 107, 1)]
    assert clock.now == 100, "the host went on at once"


def test_what_the_host_does_beside_a_gpu_has_its_own_time(monkeypatch):
    clock, gpu, spans, found = Clock(monkeypatch), Gpu(monkeypatch), Spans(), []
    spans.listen(found.append, torch.device("cuda", 0))
    with spans.span("fetch wait", "unit", on_host=True):
        clock.pass_(3)
    under_way = spans.start("store", "unit", 8)
    assert under_way is not None
    clock.pass_(4)
    under_way.close()
    spans.collect()
    assert [(s.kind, s.begin, s.duration_s) for s in found] == [("fetch wait", 100, 3), ("store", 103, 4)]
    assert gpu.passed_ms == 5


def test_nccl_s_end_is_seen_by_the_observer_and_its_tensors_are_held(monkeypatch):
    gpu, spans, found = Gpu(monkeypatch), Spans(), []
    Clock(monkeypatch)
    spans.listen(found.append, torch.device("cuda", 0))
    span = spans.collective("all-gather", "unit", 8)
    whole, work = torch.ones(2), SimpleNamespace(wait=lambda: setattr(gpu, "now_ms", gpu.now_ms + 500))
    assert span is not None
    spans.watch(span, [work], whole)
    assert span.kept[0] is whole
    gpu.now_ms += 9000  # who waits for it comes late
    span.close()
    spans.collect(wait=True)
    assert [s.duration_s for s in found] == [0.5] and span.kept is None


def collectives_of_a_step(stage: int) -> list[tuple[tuple[str, str], int]]:
    engine = make(settings(stage))
    train(engine, 1)
    with heard(engine) as found:
        train(engine, 1, first=1)
    engine.destroy()
    assert all(isinstance(span, Span) and span.end >= span.begin > 0 for span in found)
    return sorted(counts([span for span in found if span.lane == COMMUNICATION]).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_collective_of_a_step_is_a_span(ranks, stage):
    num_units = 1 + 3
    gathers = 2 * num_units if stage == 3 else num_units  # stage 0 gathers sums, 1 and 2 parameters
    wanted = {"all-gather": gathers, "reduce-scatter": num_units, "exchange": 1}
    for found in ranks(2, collectives_of_a_step, stage):
        assert found == sorted((("collective", name), number) for name, number in wanted.items())
