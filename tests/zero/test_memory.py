"""Memory is an equation: what `estimate` says, what the ledger counts and what storages hold are one number."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import Net, batch
from torch.utils._python_dispatch import TorchDispatchMode

import tritonspeed as ts

WITHIN = 0.03  # the bound; the ledger itself is held to the equation exactly


def config(stage: int, accumulation: int = 1, **zero: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": True, **zero},
    }


def model() -> Net:
    return Net(vocab=211, width=129, depth=4)


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
    """Bytes of the distinct storages of parameters, masters, shards, gradients, outboxes and optimizer states."""
    tensors = []
    for bucket in engine.sharded.buckets:
        tensors += [bucket.whole, bucket.master, bucket.shard, bucket.grad, bucket.outbox]
    for state in engine.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def measure(settings: dict) -> tuple[dict, dict, int, int]:
    """(rest, peak by category, storages at rest, storages at their highest) of the fourth step on this rank."""
    engine, *_ = ts.initialize(model=model(), config=settings)
    watch = Storages(engine)
    peak: dict[str, int] = {}
    for step in range(4):
        for micro in range(engine.gradient_accumulation_steps()):
            tokens = batch(dist.get_rank(), 10 * step + micro, vocab=211)
            with watch if step == 3 else torch.enable_grad():
                loss = engine(*tokens)
                engine.backward(loss)
            if step == 3 and engine.is_gradient_accumulation_boundary():
                peak = dict(engine.sharded.ledger.peak_of)
            engine.step()
    rest, at_rest = engine.memory(), storage_bytes(engine)
    engine.destroy()
    return rest, peak, at_rest, watch.peak_bytes


TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
AHEAD = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 200_000}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("stage", "accumulation", "zero"),
    [(0, 1, {}), (1, 1, {}), (1, 2, {}), (2, 1, {}), (2, 2, {}), (3, 1, {}), (3, 1, TIGHT), (3, 2, AHEAD),
     (3, 1, {"stage3_param_persistence_threshold": 1000}), (3, 1, {"overlap_comm": False})],
)  # fmt: skip
def test_allocation_is_what_the_equation_says(ranks, world, stage, accumulation, zero):
    settings = config(stage, accumulation, **zero)
    want = ts.estimate(model(), settings, world)
    for rest, peak, at_rest, highest in ranks(world, measure, settings):
        assert rest == want.rest_bytes
        assert at_rest == want.total_rest_bytes  # real storages, not what somebody entered
        assert sum(peak.values()) == pytest.approx(want.total_peak_bytes, rel=WITHIN)
        # storages do not include what the peers' slices are received into: the ledger's peak is above them
        assert want.total_rest_bytes <= highest <= sum(peak.values())


@pytest.mark.parametrize("state", ["bf16", "8bit"])
@pytest.mark.parametrize(
    ("stage", "zero"), [(0, {}), (1, {}), (2, {"sub_group_size": 5000}), (3, {}), (3, {"sub_group_size": 4996})]
)
def test_moments_in_fewer_bits_are_in_the_equation(ranks, stage, zero, state):
    settings = config(stage, **zero)
    settings["optimizer"]["params"]["state"] = state
    want = ts.estimate(model(), settings, 2)
    assert want.rest_bytes["optimizer"] < ts.estimate(model(), config(stage, **zero), 2).rest_bytes["optimizer"]
    for rest, peak, at_rest, _ in ranks(2, measure, settings):
        assert rest == want.rest_bytes
        assert at_rest == want.total_rest_bytes
        assert sum(peak.values()) == pytest.approx(want.total_peak_bytes, rel=WITHIN)


def test_the_stages_save_what_the_paper_says():
    """Bytes per parameter between steps, bf16 and AdamW: 2 + 12, and 4 of gradients before them, one after another."""
    with torch.device("meta"):
        world, m = 8, Net(vocab=4000, width=1024, depth=8)
    num = sum(p.numel() for p in m.parameters())
    got = [ts.estimate(m, config(stage), world).total_rest_bytes / num for stage in range(4)]
    want = [14, 2 + 12 / world, 2 + 12 / world, 12 / world]
    assert got == pytest.approx(want, rel=0.02)  # padding of pages and boundaries


def test_shapes_alone_are_enough():
    with torch.device("meta"):
        on_paper = model()
    assert ts.estimate(on_paper, config(3), 4) == ts.estimate(model(), config(3), 4)
