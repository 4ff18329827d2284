"""One GPU, NCCL: spans are events, told of later, on the host's clock; a traced run's numbers are the same."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from models import Net, batch
from profiled import DEPTH, heard, make, settings

from tritonspeed import comm
from tritonspeed.comm.spans import COMMUNICATION, Spans

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """A process group of this process alone."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = dist.FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield device
    comm.shutdown()


def train(engine, num_steps: int) -> None:
    for number in range(num_steps):
        tokens, targets = (t.to(engine.mesh.device) for t in batch(0, number))
        engine.backward(engine(tokens, targets))
        engine.step()


def test_spans_of_a_gpu_lie_on_the_hosts_clock(nccl):
    spans, found = Spans(), []
    spans.listen(found.append, nccl)
    matrix = torch.randn(4096, 4096, device=nccl)
    before = time.perf_counter()
    with spans.phase("forward", None):
        with spans.span("forward", "unit"):
            for _ in range(20):
                matrix = (matrix @ matrix).clamp_(-1, 1)
        with spans.span("fetch wait", "unit", on_host=True):
            pass
    spans.mark()
    with spans.span("norm", ""):
        matrix.sum()
    assert not found or all(span.end > 0 for span in found)  # nobody has waited for the GPU
    spans.collect(wait=True)
    after = time.perf_counter()
    assert [span.kind for span in found] == ["forward", "fetch wait", "phase", "norm"]
    unit, waited, phase, norm = found
    assert unit.duration_s > 0 and phase.duration_s >= unit.duration_s
    assert phase.own_s == pytest.approx(phase.duration_s - unit.duration_s - waited.duration_s)
    slack_s = 5e-3  # two clocks, read one after the other
    assert before - slack_s <= unit.begin <= unit.end <= norm.begin + slack_s
    assert norm.end <= after + slack_s


def test_a_collective_is_seen_to_end_by_another_stream(nccl):
    spans, found = Spans(), []
    spans.listen(found.append, nccl)
    mesh = comm.Mesh(0, 1, nccl, "nccl", dist.group.WORLD, spans=spans)
    whole = torch.ones(1 << 22, device=nccl)
    span = spans.collective("all-reduce", "unit", whole.nbytes)
    works = [dist.all_reduce(whole, async_op=True)]
    pending = comm.Pending(mesh, works).observed(span, whole)
    assert span.kept is not None  # NCCL has let go of it at the observer's wait: the span holds it
    pending.wait()
    spans.collect(wait=True)
    (seen,) = found
    assert seen.lane == COMMUNICATION and seen.duration_s >= 0 and seen.kept is None


@pytest.mark.parametrize("stage", [1, 3])
def test_a_trace_and_tables_change_no_bit(nccl, tmp_path, stage):
    plain = make(settings(stage))
    train(plain, 4)
    want = plain.module_state_dict()
    plain.destroy()
    engine = make(settings(stage, wall_clock_breakdown=True, steps_per_print=2))
    train(engine, 1)
    with engine.trace(steps=2, folder=tmp_path) as trace, heard(engine) as found:
        for number in range(1, 4):
            tokens, targets = (t.to(nccl) for t in batch(0, number))
            engine.backward(engine(tokens, targets))
            engine.step()
    assert all(value.equal(want[name]) for name, value in engine.module_state_dict().items())
    times = engine.last_times
    assert times is not None and times.wall_s > 0 and found
    events = json.loads(trace.json_path.read_text())["traceEvents"]
    counts = Counter((e["cat"], e["args"].get("unit")) for e in events if e["ph"] == "X")
    for unit in (f"blocks.{number}" for number in range(DEPTH)):
        assert counts["forward", unit] == counts["backward", unit] == 2
    allocated = [e["args"]["allocator"] for e in events if e["ph"] == "C" and e["name"] == "GPU allocator"]
    assert allocated and min(allocated) > 0
    engine.destroy()


def test_an_update_on_the_host_is_timed_by_the_host(nccl):
    engine = make(settings(3, tier="cpu"), Net())
    train(engine, 1)
    with heard(engine) as found:
        train(engine, 2)
        engine.mesh.spans.collect(wait=True)
    updates = [span for span in found if span.kind == "update"]
    assert updates and all(span.duration_s >= 0 for span in updates)
    engine.destroy()
