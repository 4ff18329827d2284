"""Offload beside a real GPU: host and disk are one to the bit, copies lie under kernels, memory is what was said.

What of this can be played on a CPU stands in test_offload_apart.py and test_bitwise_offload.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Net, batch
from tolerances import tolerance
from torch import Tensor

import tritonspeed as ts
from tritonspeed.estimation.memory import estimate
from tritonspeed.offload.memory import host_empty

pytestmark = pytest.mark.gpu

STEPS = 5
NUM_SUMMED = 4096  # terms of the longest chain of sums behind a parameter after these steps of the small model


def config(stage: int, precision: str, accumulation: int, optimizer: str, params: str, path: Path) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": True}
    zero["sub_group_size"] = 16_384  # several tiles to a bucket
    zero["offload_optimizer"] = {"device": optimizer, "nvme_path": str(path)}
    zero["offload_param"] = {"device": params, "nvme_path": str(path), "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "zero_optimization": zero,
        **({precision: {"enabled": True}} if precision != "fp32" else {}),
    }


def build(settings: dict[str, Any], **size: int) -> ts.Engine:
    torch.manual_seed(0)
    return ts.initialize(model=Net(**(size or {"width": 64, "depth": 4})), config=settings)[0]


def train(settings: dict[str, Any], steps: int = STEPS) -> tuple[list[float], list[float], dict[str, Tensor | None]]:
    """(losses, norms, final masters)."""
    engine = build(settings)
    assert engine.device.type == "cuda"
    losses, norms = [], []
    for _ in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*(t.to(engine.device) for t in batch(0, micro))))
            engine.step()
        assert engine.last_step is not None and engine.last_step.loss is not None
        losses.append(engine.last_step.loss)
        norms.append(engine.last_step.grad_norm)
    masters = {n: ts.zero.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    engine.destroy()
    return losses, norms, masters


PLACES = [("cpu", "none"), ("nvme", "none"), ("cpu", "cpu"), ("nvme", "cpu"), ("cpu", "nvme"), ("nvme", "nvme")]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_tier_trains_alike(tmp_path, stage, precision, accumulation):
    """Host and disk to the bit, parameters wherever they wait; the device's own kernel differs by an ulp a step."""
    places = PLACES if stage == 3 else PLACES[:2]
    found = {
        (optimizer, params): train(
            config(stage, precision, accumulation, optimizer, params, tmp_path / f"{optimizer}-{params}")
        )
        for optimizer, params in places
    }
    losses, norms, masters = found["cpu", "none"]
    assert losses[-1] < losses[0]
    for place, (other_losses, other_norms, others) in found.items():
        assert other_losses == losses and other_norms == norms, place
        assert all(torch.equal(others[name], masters[name]) for name in masters), place
    device_losses, device_norms, _ = train(config(stage, precision, accumulation, "none", "none", tmp_path))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(device_losses), **tolerance(dtype, NUM_SUMMED))
    if accumulation == 1:  # the squares are added up on the device before the sum leaves, in the device tier's order
        assert norms[0] == device_norms[0]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_overlap_loses_no_gradient_and_doubles_none(tmp_path, accumulation):
    """The update under the next forward, whose backward brings the next gradients, against one that is waited for."""
    found = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model = Net(width=64, depth=4)
        inner = ts.optim.AdamW(model.parameters(), lr=1e-2)
        model, stepper = ts.zero.shard(
            model, inner, 3, "bf16", 0.5, offload=ts.Offload(optimizer="cpu", overlap=overlap, tile_elems=16_384)
        )
        assert stepper is not None
        for step in range(6):
            for micro in range(accumulation):
                (model(*(t.cuda() for t in batch(0, 10 * step + micro))) / accumulation).backward()
            stepper.step()
        found.append({n: ts.zero.safe_get_full_fp32_param(p) for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_locked_memory_has_exactly_its_size():
    tensor = host_empty(1_000_003, torch.bfloat16, pin=True)
    assert tensor.is_pinned() and tensor.untyped_storage().nbytes() == 2_000_006
    assert not host_empty(1_000_003, torch.bfloat16).is_pinned()


@pytest.mark.parametrize(("stage", "params"), [(1, "none"), (3, "none"), (3, "cpu")])
def test_memory_is_what_was_said(tmp_path, stage, params):
    """The ledger against `estimate`; gradients do not stay on the device; what crosses is locked, and only that."""
    settings = config(stage, "bf16", 1, "cpu", params, tmp_path)
    settings["zero_optimization"]["sub_group_size"] = 1_000_000
    size = {"vocab": 2048, "width": 512, "depth": 6}
    with torch.device("meta"):
        want = estimate(Net(**size), settings, 1, device="cuda")
    engine = build(settings, **size)
    units = [bucket.layout.numel for bucket in engine.sharded.buckets]
    for step in range(3):
        tokens = [t.to(engine.device) for t in batch(0, step, vocab=2048)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        engine.backward(engine(*tokens))
        engine.optimizer.homes.let_go()
        torch.cuda.synchronize()
        left = torch.cuda.memory_allocated() - before
        engine.step()
    engine.optimizer.late.finish()
    assert left < 2 * sum(units) / 2, "gradients stayed on the device"
    assert engine.sharded.ledger.bytes_of == want.rest_bytes
    assert engine.sharded.ledger.host.bytes_of == want.host_rest_bytes
    free = [b for buffers in engine.sharded.homes._pool._free.values() for b, _ in buffers]
    assert free and all(buffer.is_pinned() for buffer in free)
    gradients = sum(b.nbytes for b in free if b.dtype == torch.bfloat16)
    assert gradients == 2 * sum(b.layout.numel for b in engine.sharded.buckets if b.trainable)
    for bucket in engine.sharded.buckets:
        assert bucket.master is not None and not bucket.master.is_pinned()
        assert bucket.shard is None or bucket.shard.is_pinned() == (params == "cpu")
    engine.destroy()


def _under(copies: list[tuple[float, float]], kernels: list[tuple[float, float]]) -> float:
    """The share of the copies' time in which some kernel runs; spans (start, end), each list of one GPU."""
    merged: list[list[float]] = []
    for start, end in sorted(kernels):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copies for c, d in merged)
    return covered / sum(b - a for a, b in copies)


@pytest.mark.parametrize("params", ["none", "cpu"])
def test_copies_lie_under_kernels_and_the_update_under_the_next_forward(tmp_path, params):
    settings = config(3, "bf16", 1, "cpu", params, tmp_path)
    settings["zero_optimization"] |= {"sub_group_size": 4 * 2**20, "stage3_max_live_parameters": 60_000_000}
    engine = build(settings, vocab=4096, width=2048, depth=8)
    moments: list[tuple[str, float]] = []
    count = engine.sharded.homes.count_update

    def counted(num_bytes: int, seconds: float) -> None:
        moments.append(("updated", time.perf_counter()))
        count(num_bytes, seconds)

    engine.sharded.homes.count_update = counted
    blocks = [module for group in engine.sharded.groups[1:] for module in group.modules]
    blocks[0].register_forward_pre_hook(lambda *_: moments.append(("forward", time.perf_counter())))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(4096, (16, 1025), generator=generator).to(engine.device)
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    moments.clear()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    engine.optimizer.late.finish()
    path = tmp_path / f"offload_{params}.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]

    def spans(kind: str, name: str = "") -> list[tuple[float, float]]:
        return [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == kind and name in e["name"]]

    kernels = spans("kernel")
    # where parameters stay on the device, they come as fast as the host updates them, which may be slower than forward
    for way, least in (("DtoH", 0.5), ("HtoD", 0.3 if params == "cpu" else 0.0)):
        large = [(a, b) for a, b in spans("gpu_memcpy", way) if b - a > 50]  # microseconds: not the odd scalar
        assert large, f"nothing was copied {way}"
        assert _under(large, kernels) > least, way
    names = [name for name, _ in moments]
    first = names.index("forward", names.index("updated"))  # a forward that begins after an update has begun
    assert "updated" in names[first:], "the update had ended before the next forward began"
    engine.destroy()
