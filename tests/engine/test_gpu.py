"""One GPU, one rank, NCCL: every stage trains to the same bits, and a trace shows where the time goes."""

from __future__ import annotations

import gc
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import said, same
from models import Net, batch
from tolerances import tolerance
from torch import Tensor, nn

import tritonspeed as ts
from tritonspeed import comm

pytestmark = pytest.mark.gpu

STEPS = 8
NUM_SUMMED = 4096  # terms of the longest chain of sums behind a parameter after these steps of the small model
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}}


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """A process group of this process alone."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = dist.FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield device
    comm.shutdown()


def config(stage: int, precision: str, **more: Any) -> dict[str, Any]:
    given = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": ADAMW,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
    }
    return {**given, **({precision: {"enabled": True}} if precision != "fp32" else {}), **more}


def train(device: torch.device, settings: dict[str, Any], steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    engine = ts.initialize(model=Net(width=64, depth=4), config=settings)[0]
    assert engine.device == device and {p.device for p in engine.module.parameters()} == {device}
    losses = []
    for _ in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            tokens = batch(0, micro)
            engine.backward(engine(*(t.to(device) for t in tokens)))
            engine.step()
        assert engine.last_step is not None and engine.last_step.loss is not None
        losses.append(engine.last_step.loss)
        assert engine.last_step.peak_bytes >= sum(engine.memory().values()) > 0
    found = engine.module_state_dict()
    engine.destroy()
    return losses, found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_to_the_same_bits(nccl, precision, accumulation):
    more = {"gradient_accumulation_steps": accumulation}
    found = {stage: train(nccl, config(stage, precision, **more)) for stage in range(4)}
    losses = found[0][0]
    assert losses[-1] < losses[0]
    # micro-steps are added in fp32 at stages 0 and 1, and rounded to the model's type before that at 2 and 3
    pairs = [(0, 1), (2, 3)] if accumulation > 1 else [(0, 1), (0, 2), (0, 3)]
    for one, other in pairs:
        assert found[other][0] == found[one][0], (one, other)
        assert same(found[one][1], found[other][1]), (one, other)


def test_fp32_is_plain_pytorch(nccl):
    """The same losses as torch's AdamW on the same GPU; a step of Adam may turn the last bit of a gradient around."""
    losses, _ = train(nccl, config(3, "fp32"))
    torch.manual_seed(0)
    plain = Net(width=64, depth=4).to(nccl)
    optimizer = torch.optim.AdamW(plain.parameters(), **ADAMW["params"])
    want = []
    for _ in range(STEPS):
        loss = plain(*(t.to(nccl) for t in batch(0, 0)))
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), **tolerance(torch.float32, NUM_SUMMED))


def test_fp16_overflows_skips_and_trains(nccl):
    """A scale of 2³⁰ overflows at once, is halved, and training goes on below it."""
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    torch.manual_seed(0)
    engine = ts.initialize(model=Net(width=64), config=config(2, "fp16", fp16=fp16))[0]
    with said() as lines:
        for step in range(40):
            engine.backward(engine(*(t.to(nccl) for t in batch(0, step))))
            engine.step()
    assert 0 < engine.skipped_steps < 40 and engine.was_step_applied()
    assert engine.loss_scale() == 2.0 ** (30 - engine.skipped_steps)
    assert sum("not finite, first in" in line for line in lines) == engine.skipped_steps
    assert all(p.isfinite().all() for p in engine.module_state_dict().values())
    engine.destroy()


def test_memory_comes_and_goes(nccl):
    """After the engine's end nothing of it is left: no master, moment, gradient or slot."""
    left = []
    for _ in range(3):  # the first round leaves what libraries keep: workspaces, compiled kernels
        train(nccl, config(3, "bf16"), steps=2)
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated(nccl))
    assert left[2] == left[1]


def test_a_trace_shows_the_step(nccl, tmp_path):
    """Chrome's format, with the kernels of forward, backward and the fused optimizer in it."""
    torch.manual_seed(0)
    engine = ts.initialize(model=Net(width=256, depth=4), config=config(3, "bf16"))[0]

    def step(number: int) -> None:
        engine.backward(engine(*(t.to(nccl) for t in batch(0, number))))
        engine.step()

    step(0)  # compiles, learns the order of units, makes the optimizer's state
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(1, 4):
            step(number)
        torch.cuda.synchronize()
    path = pathlib.Path(tmp_path) / "stage3.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert len(kernels) > 3 * 4
    assert any("adamw" in name for name in kernels), sorted(set(kernels))
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_offload_states_frees_the_gpu(nccl, stage):
    """Everything the ledger knows leaves, training goes on with the same bits, and the second time locks no memory."""
    found = []
    for moves in (False, True):
        torch.manual_seed(0)
        engine = ts.initialize(model=Net(width=512, depth=4), config=config(stage, "bf16"))[0]
        for step in range(4):
            engine.backward(engine(*(t.to(nccl) for t in batch(0, step))))
            engine.step()
            if moves:
                torch.cuda.synchronize()
                before, held = torch.cuda.memory_allocated(nccl), engine.sharded.ledger.total_bytes
                engine.offload_states(non_blocking=step % 2 == 0)
                assert engine.sharded.ledger.total_bytes == 0
                assert before - torch.cuda.memory_allocated(nccl) > 0.9 * held
                engine.reload_states(non_blocking=step % 2 == 0)
        found.append(engine.module_state_dict())
        engine.destroy()
    assert same(*found)


def resumed(device: torch.device, settings: dict[str, Any], folder: pathlib.Path) -> None:
    """Save after three micro-steps, train on meanwhile; load into a fresh engine: the same bits from there on."""

    def run(engine: ts.Engine, first: int, last: int) -> list[float]:
        losses = []
        for i in range(first, last):
            loss = engine(*(t.to(device) for t in batch(0, i))) * (1 + 0.1 * torch.rand((), device=device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    engine = ts.initialize(model=Net(width=64, depth=4), config=settings)[0]
    run(engine, 0, 3)
    engine.save_checkpoint(folder)
    expected = run(engine, 3, 7), engine.module_state_dict()
    engine.wait_for_checkpoint()
    engine.destroy()
    other = ts.initialize(model=Net(width=64, depth=4), config=settings)[0]
    run(other, 5, 7)
    assert other.load_checkpoint(folder)[0] is not None
    got = run(other, 3, 7), other.module_state_dict()
    assert got[0] == expected[0] and same(got[1], expected[1])
    other.destroy()


@pytest.mark.parametrize("where", ["device", "cpu", "nvme"])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_resumes_with_the_same_bits(nccl, tmp_path, where, in_background):
    for stage in (1, 3):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        if where != "device":
            zero["offload_optimizer"] = {"device": where, "nvme_path": str(tmp_path)}
        more = {"zero_optimization": zero, "checkpoint": {"async_save": in_background}}
        more["gradient_accumulation_steps"] = 2
        resumed(nccl, config(stage, "bf16", **more), tmp_path / f"saved{stage}")


def test_a_background_save_stalls_for_the_copy_alone(nccl, tmp_path):
    """What the GPU writes right after ``start`` is not in the checkpoint."""
    torch.manual_seed(0)
    given = config(1, "fp32", checkpoint={"async_save": True})
    engine = ts.initialize(model=Net(width=512, depth=4), config=given)[0]
    engine.save_checkpoint(tmp_path)
    before = engine.module_state_dict()
    with torch.no_grad():
        for bucket in engine.sharded.buckets:
            bucket.whole.zero_()
    engine.wait_for_checkpoint()
    engine.load_checkpoint(tmp_path)
    assert same(engine.module_state_dict(), before)
    engine.destroy()
