"""What training beside a GPU holds and moves, to the byte, with the host's memory apart from the device's on a CPU."""

from __future__ import annotations

import pytest
import torch
from beside import host_apart
from models import Net, batch
from torch import Tensor

import tritonspeed as ts
from tritonspeed.estimation.memory import estimate
from tritonspeed.offload.crossing import Crossing
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.stages import stage_of

STEPS = 4


def model() -> Net:
    return Net(vocab=211, width=129, depth=4)


def config(stage: int, optimizer: str, params: str, accumulation: int, path: str, precision: str = "bf16") -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": True, "sub_group_size": 16_384}
    zero["offload_optimizer"] = {"device": optimizer, "nvme_path": path, "buffer_count": 3}
    zero["offload_param"] = {"device": params, "nvme_path": path, "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }


def host_storages(engine: ts.Engine) -> int:
    """Bytes of what the host's account should have, found where it is."""
    tensors: list[Tensor | None] = []
    for bucket in engine.sharded.buckets:
        tensors += [bucket.master, bucket.shard if bucket.shard_crosses else None]
    for state in engine.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor) and t.ndim and t.stride(0)]
    for buffer in engine.optimizer._ring._made:
        tensors += list(buffer._tensors.values())
    for free in engine.sharded.homes._pool._free.values():
        tensors += [buffer for buffer, _ in free]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def measure(settings: dict) -> dict:
    """The last step: at rest and at the peak by category, bytes over each way, and how much there was to move."""
    with host_apart():
        engine, *_ = ts.initialize(model=model(), config=settings)
    ledger, found = engine.sharded.ledger, {}
    for step in range(STEPS):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*batch(0, 10 * step + micro, vocab=211)))
            if engine.is_gradient_accumulation_boundary():
                found |= {"peak": dict(ledger.peak_of), "host peak": dict(ledger.host.peak_of)}
            engine.step()
    engine.optimizer.late.finish()
    assert engine.last_step is not None
    found |= {"rest": dict(ledger.bytes_of), "host rest": dict(ledger.host.bytes_of)}
    found["storages"] = host_storages(engine)
    homes = engine.sharded.homes  # of all steps: a late update may be under way when one is reported
    links = {**homes.crossings.traffic(), "host memory": homes._updates}
    found["links"] = {link: num_bytes / STEPS for link, (num_bytes, _) in links.items()}
    found["seconds"] = {link: seconds for link, (_, seconds) in links.items()}
    found["reported"] = sorted(engine.last_step.links)
    found["elems"] = sum(bucket.layout.numel for bucket in engine.sharded.buckets)
    found["trained"] = sum(chunk.end - chunk.start for chunk in engine.optimizer.chunks)
    engine.destroy()
    found["after"] = ledger.host.bytes_of["gradients"]
    return found


TIERS = [(1, "cpu", "none"), (2, "nvme", "none")]
TIERS += [(3, optimizer, params) for optimizer in ("cpu", "nvme") for params in ("none", "cpu", "nvme")]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("stage", "optimizer", "params"), TIERS)
def test_every_byte_is_in_the_equation(ranks, tmp_path, stage, optimizer, params, accumulation):
    settings = config(stage, optimizer, params, accumulation, str(tmp_path))
    want = estimate(model(), settings, 1, device="cuda")
    [got] = ranks(1, measure, settings)
    assert got["rest"] == want.rest_bytes
    assert got["host rest"] == want.host_rest_bytes
    assert got["storages"] == sum(want.host_rest_bytes.values())  # each buffer once
    assert got["peak"] == want.peak_bytes
    assert got["host peak"] == want.host_peak_bytes
    gradients = 2 * got["elems"]  # as they are reduced; what they are added up in is of 4 bytes
    assert got["host rest"]["gradients"] >= gradients if accumulation == 1 else 2 * gradients
    assert got["after"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("stage", "optimizer", "params"), [(1, "cpu", "none"), (3, "cpu", "none"), (3, "nvme", "none")]
)
def test_gradients_and_parameters_cross_once(ranks, tmp_path, stage, optimizer, params, precision):
    """In the model's dtype: 2 bytes each way for a parameter, 4 where it is fp32."""
    [got] = ranks(1, measure, config(stage, optimizer, params, 1, str(tmp_path), precision))
    itemsize = 2 if precision == "bf16" else 4
    assert got["links"]["to host"] == itemsize * got["elems"]
    assert got["links"]["to device"] == itemsize * got["trained"]
    # p, m, v in and out, gradient in, copy out, and the step's count in and out of every chunk
    assert got["links"]["host memory"] == pytest.approx((24 + 2 * itemsize) * got["trained"], rel=1e-3)
    assert all(got["seconds"][link] > 0 for link in ("to host", "to device", "host memory"))
    assert set(got["reported"]) >= {"to host", "to device", "host memory"}


def norm_reads(stage: int, accumulation: int) -> list[bool]:
    """Whether each bucket's squares are known while its sum is still on its way."""
    torch.manual_seed(0)
    with host_apart():
        net = model()
        net, stepper = ts.zero.shard(
            net, ts.optim.AdamW(net.parameters()), stage, "bf16", offload=ts.Offload(optimizer="cpu")
        )
    assert stepper is not None
    for micro in range(accumulation):
        net(*batch(0, micro, vocab=211)).backward()
    known = []
    for bucket in stepper.buckets:
        squares = bucket.squares()
        assert squares is not None
        known.append(bucket._landing is not None)
        grad = bucket.own_grad()
        assert grad is not None and squares.item() == pytest.approx(grad.double().square().sum().item(), rel=1e-6)
        bucket.squares()
    return known


@pytest.mark.parametrize("stage", [2, 3])
def test_the_norm_reads_no_host_memory(ranks, stage):
    assert all(ranks(1, norm_reads, stage, 1)[0])
    assert not any(ranks(1, norm_reads, stage, 2)[0])  # what was added up on the host is measured there


class Joined(Crossing):
    def __init__(self) -> None:
        super().__init__()
        self.was_joined = False

    def join(self) -> None:
        self.was_joined = True


def test_the_device_lets_go_of_a_sum_when_the_next_one_leaves():
    """Not at the step: 2 bytes a parameter would stay. And not before the stream was told to wait for the copy."""
    ledger = Ledger()
    homes = Homes(ts.Offload(optimizer="cpu"), ts.comm.mesh_of(), stage_of(2), ledger)
    started: list[Joined] = []

    def down(source: Tensor, target: Tensor) -> Joined:
        started.append(Joined())
        return started[-1]

    homes.crossings.down = down
    for number in range(3):
        homes.leave(torch.zeros(8), torch.zeros(8))
        assert [each.was_joined for each in started] == [True] * number + [False]
        assert ledger.bytes_of["communication"] == 32
    homes.let_go()
    assert all(each.was_joined for each in started) and ledger.bytes_of["communication"] == 0
