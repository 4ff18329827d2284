"""Memory is an equation in every tier: what `estimate` says of device, host and disk, what the ledger counts, what
storages hold and how long the files are, is one number each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Net, batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritonspeed as ts
from tritonspeed.estimation.memory import Estimate, estimate

WITHIN = 0.03  # as of tests/zero/test_memory.py: several ranks' units arrive in an order of their own
TILE_ELEMS = 16_384


def model() -> Net:
    return Net(vocab=211, width=129, depth=4)


def config(stage: int, accumulation: int = 1, **optimizer: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **optimizer}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": True,
            "sub_group_size": TILE_ELEMS,
        },
    }


def with_tiers(settings: dict, path: object, optimizer: str, params: str, ratio: float = 1.0) -> dict:
    """The config's own offload blocks."""
    zero = dict(settings["zero_optimization"])
    zero["offload_optimizer"] = {"device": optimizer, "ratio": ratio, "buffer_count": 3}
    zero["offload_param"] = {"device": params, "max_in_cpu": 0}
    for block in (zero["offload_optimizer"], zero["offload_param"]):
        if block["device"] == "nvme":
            block["nvme_path"] = str(path)
    return {**settings, "zero_optimization": zero}


class Storages(TorchDispatchMode):
    """After every operation: the bytes of the storages that belong to model state, and their highest sum."""

    def __init__(self, engine: ts.Engine) -> None:
        super().__init__()
        self.engine, self.peak_bytes = engine, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.peak_bytes = max(self.peak_bytes, storage_bytes(self.engine))
        return result


def storage_bytes(engine: ts.Engine) -> int:
    """Bytes of the distinct storages of parameters, masters, shards, gradients, states, buffers of the step and what
    parameters are read into; placeholders are one element."""
    tensors: list[Tensor | None] = []
    for bucket in engine.sharded.buckets:
        tensors += [bucket.whole, bucket.master, bucket.shard, bucket.grad, bucket.outbox]
        tensors += [] if bucket._arriving is None else [bucket._arriving[1]]
    for state in engine.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor) and t.ndim and (t.stride(0) or t.numel() <= 1)]
    for buffer in engine.optimizer._ring._made:
        tensors += list(buffer._tensors.values())
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def measure(settings: dict, path: str) -> dict:
    """The fourth step on this rank: at rest and at the peak by category, storages, files."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine, *_ = ts.initialize(model=model(), config=settings)
    ledger, watch = engine.sharded.ledger, Storages(engine)
    found: dict = {}
    for step in range(4):
        for micro in range(engine.gradient_accumulation_steps()):
            tokens = batch(rank, 10 * step + micro, vocab=211)
            with watch if step == 3 else torch.enable_grad():
                loss = engine(*tokens)
                engine.backward(loss)
            if step == 3 and engine.is_gradient_accumulation_boundary():
                found |= {"peak": dict(ledger.peak_of), "host peak": dict(ledger.host.peak_of)}
            engine.step()
    engine.optimizer.late.finish()
    found |= {"rest": dict(ledger.bytes_of), "host rest": dict(ledger.host.bytes_of)}
    found |= {"storages": storage_bytes(engine), "highest": watch.peak_bytes}
    mine = Path(path).glob(f"tritonspeed/rank-{rank}-of-*/*.safetensors")
    found["files"] = sum(file.stat().st_size for file in mine)
    engine.destroy()
    return found


def check(got: dict, want: Estimate, exact: bool) -> None:
    assert got["rest"] == want.rest_bytes
    assert got["host rest"] == want.host_rest_bytes
    assert got["storages"] == want.total_rest_bytes + sum(want.host_rest_bytes.values())
    assert got["files"] == pytest.approx(want.disk_bytes, rel=0 if exact else 1e-3)  # names of parts differ by rank
    device, host = sum(got["peak"].values()), sum(got["host peak"].values())
    assert device == pytest.approx(want.total_peak_bytes, rel=0 if exact else WITHIN)
    assert host == pytest.approx(want.total_host_peak_bytes, rel=0 if exact else WITHIN)
    assert got["storages"] < got["highest"] <= device + host


TIERS = [(stage, optimizer, "none") for stage in range(3) for optimizer in ("cpu", "nvme")]
TIERS += [(3, optimizer, params) for optimizer in ("none", "cpu", "nvme") for params in ("none", "cpu", "nvme")]


@pytest.mark.parametrize(("stage", "optimizer", "params"), TIERS)
def test_one_rank(ranks, tmp_path, stage, optimizer, params):
    for accumulation, ratio in ((1, 1.0), (2, 0.5)):
        settings = with_tiers(config(stage, accumulation), tmp_path, optimizer, params, ratio)
        [got] = ranks(1, measure, settings, str(tmp_path))
        check(got, estimate(model(), settings, 1), exact=True)


SOME = [(0, "nvme", "none"), (2, "nvme", "none"), (2, "cpu", "none"), (3, "nvme", "nvme"), (3, "cpu", "nvme")]


@pytest.mark.parametrize(("stage", "optimizer", "params"), SOME)
def test_two_ranks(ranks, tmp_path, stage, optimizer, params):
    settings = with_tiers(config(stage), tmp_path, optimizer, params)
    want = estimate(model(), settings, 2)
    for got in ranks(2, measure, settings, str(tmp_path)):
        check(got, want, exact=False)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_moments_in_fewer_bits_on_disk(ranks, tmp_path, state):
    settings = with_tiers(config(3, state=state), tmp_path, "nvme", "nvme")
    want = estimate(model(), settings, 1)
    [got] = ranks(1, measure, settings, str(tmp_path))
    check(got, want, exact=True)
    whole = estimate(model(), with_tiers(config(3), tmp_path, "nvme", "nvme"), 1)
    assert want.disk_bytes < whole.disk_bytes


def test_late_updates_keep_gradients_into_the_next_forward(tmp_path):
    settings = with_tiers(config(3), tmp_path, "nvme", "nvme")
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    offload = ts.Offload(optimizer="nvme", parameters="nvme", path=tmp_path, max_in_cpu=0, tile_elems=TILE_ELEMS)
    late, now = (estimate(model(), settings, 1, offload=replace(offload, overlap=o)) for o in (True, False))
    assert late.rest_bytes == now.rest_bytes
    assert late.host_rest_bytes == now.host_rest_bytes
    gradients = 2 * late.num_parameters  # bf16: of one rank and one micro-step
    kept = late.phase_peak_bytes["forward"] - now.phase_peak_bytes["forward"]
    assert 0.5 * gradients < kept <= 1.05 * gradients  # they go as the forward comes to their units


def test_on_a_gpu_what_is_offloaded_leaves_the_device(tmp_path):
    """No GPU is needed to say it: 12 bytes a parameter on the host, 2 of gradients beside them."""
    with torch.device("meta"):
        large = Net(vocab=4000, width=1024, depth=8)
    num = sum(p.numel() for p in large.parameters())
    settings = with_tiers(config(2), tmp_path, "cpu", "none")
    there = estimate(large, settings, 1, device="cuda")
    assert there.rest_bytes["optimizer"] == 0
    assert there.host_rest_bytes["optimizer"] / num == pytest.approx(12, rel=0.01)
    assert there.host_peak_bytes["gradients"] / num == pytest.approx(2, rel=0.01)
    assert there.total_rest_bytes / num == pytest.approx(2, rel=0.01)
    assert there.resident_bytes == 0
