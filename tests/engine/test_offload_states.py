"""offload_states and reload_states: the device is free in between, and training goes on as if nothing had been."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from engines import make, same, settings, weights
from models import Net, batch

import tritonspeed as ts
from tritonspeed.zero import OffloadDeviceEnum, OffloadStateTypeEnum

KINDS = [kind.value for kind in OffloadStateTypeEnum]
ADAMW = {"type": "AdamW", "params": {"lr": 0.01}}


def engine_of(stage: int, precision: str | None = None, **more):
    return make(settings(stage, 2, precision, optimizer=ADAMW, **more), Net())


def micro(engine, number: int) -> None:
    engine.backward(engine(*batch(dist.get_rank(), number)))
    engine.step()


def storages(engine) -> dict[int, int]:
    """Bytes of every storage that belongs to the model or the optimizer, by its identity."""
    found = []
    for bucket in engine.sharded.buckets:
        found += [bucket.whole, bucket.master, bucket.shard, bucket.grad, bucket.outbox, *bucket.parameters]
    for state in engine.optimizer.state.values():
        found += [t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found if t is not None}


def identities(engine) -> list[int]:
    """Of every tensor that somebody may hold."""
    groups = [p for group in engine.optimizer.param_groups for p in group["params"]]
    states = [t for state in engine.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [id(t) for t in [*engine.module.parameters(), *groups, *states]]


def trained(stage: int, precision: str | None, include, times: int) -> tuple:
    """Five micro-steps of two to a step, put away ``times`` times after each: between steps and inside one."""
    engine = engine_of(stage, precision)
    report = []
    for number in range(5):
        micro(engine, number)
        before, known = dict(engine.sharded.ledger.bytes_of), identities(engine)
        for _ in range(times):
            engine.offload_states(include)
            report.append((dict(engine.sharded.ledger.bytes_of), sum(storages(engine).values()), engine.away.kinds))
            engine.reload_states()
        assert engine.sharded.ledger.bytes_of == before
        assert engine.sharded.ledger.host.total_bytes == 0
        assert identities(engine) == known, "a tensor that somebody holds was replaced"
    micro(engine, 5)
    found = weights(engine), engine.get_global_grad_norm(), report
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_training_goes_on_with_the_same_bits(ranks, stage, precision):
    away, here = ranks(2, trained, stage, precision, None, 2), ranks(2, trained, stage, precision, None, 0)
    for moved, kept in zip(away, here, strict=True):
        assert same(moved[0], kept[0])
        assert moved[1] == kept[1]
        for bytes_of, real_bytes, _ in moved[2]:
            assert bytes_of == dict.fromkeys(bytes_of, 0), "everything that the ledger knows has left"
            assert real_bytes <= 4 * 200, "what is left are placeholders of one element each"


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone(ranks, kind):
    """Its bytes, and no others, have left; at stage 1 in bf16 the kinds share no memory."""
    (moved,), (kept,) = ranks(1, trained, 1, "bf16", [kind], 1), ranks(1, trained, 1, "bf16", None, 0)
    assert same(moved[0], kept[0])
    bytes_of, _, _ = moved[2][-1]
    left = [name for name, held in bytes_of.items() if name in ("optimizer", "parameters") and held == 0]
    assert left == (["parameters"] if kind == "lp_params" else [])
    held = [gone == [kind] for _, _, gone in moved[2]]
    assert held == {
        "optim_states": [False, True, True, True, True],  # the first step makes them
        "lp_grads": [False] * 5,  # stage 1 sums over the ranks at a boundary, and the step drops the sum
        "contiguous_grad_buffer": [True, False, True, False, True],  # inside an accumulation
    }.get(kind, [True] * 5)


def put_away_bytes() -> dict[str, int]:
    engine = engine_of(1, "bf16")
    micro(engine, 0)
    micro(engine, 1)
    micro(engine, 2)
    ledger, found = engine.sharded.ledger, {}
    for kind in KINDS:
        before = ledger.total_bytes
        engine.offload_states([OffloadStateTypeEnum(kind)], device=OffloadDeviceEnum.cpu)
        found[kind] = before - ledger.total_bytes
    assert engine.away.kinds == [kind for kind, num_bytes in found.items() if num_bytes]
    assert sum(found.values()) == ledger.host.total_bytes
    found["numel"] = sum(bucket.layout.numel for bucket in engine.sharded.buckets)
    engine.destroy()
    return found


def test_bytes_of_each_kind(ranks):
    """P parameters on one rank in bf16: moments 2 × 4·P, masters 4·P, parameters 2·P, half an accumulation 4·P."""
    (found,) = ranks(1, put_away_bytes)
    numel = found.pop("numel")
    expected = {"optim_states": 8, "hp_params": 4, "lp_params": 2, "lp_grads": 0, "contiguous_grad_buffer": 4}
    assert found == {kind: each * numel for kind, each in expected.items()}


def refused(stage: int) -> None:
    engine = engine_of(stage)
    micro(engine, 0)
    loss = engine(*batch(dist.get_rank(), 1))
    (parameter, *_) = engine.module.parameters()
    if stage == 3:
        with ts.zero.GatheredParameters([parameter]), pytest.raises(ValueError, match="outside GatheredParameters"):
            engine.offload_states()
    engine.offload_states(include=["lp_params", "optim_states", "hp_params"])
    calls = {
        "engine.backward": lambda: engine.backward(loss),
        "backward": lambda: (loss * 2).backward(),
        "forward": lambda: engine(*batch(dist.get_rank(), 2)),
        "engine.step": engine.step,
        "step": lambda: engine.optimizer.step(),
        "zero_grad": engine.zero_grad,
        "reading or changing parameters": engine.module_state_dict,
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="are in host memory: call reload_states") as caught:
            call()
        assert str(caught.value).startswith(name), str(caught.value)
    for call in (
        lambda: ts.zero.safe_get_full_fp32_param(parameter),
        ts.zero.GatheredParameters([parameter]).__enter__,
    ):
        with pytest.raises(ValueError, match="reading or changing parameters while"):
            call()
    assert parameter.isnan().all(), "what is read all the same is loud"
    engine.offload_states()  # the rest of it
    engine.reload_states()
    engine.reload_states()  # nothing to do
    engine.backward(loss)
    engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_whoever_needs_what_is_away_is_told_to_reload(ranks, stage):
    ranks(1, refused, stage)


def arguments() -> None:
    engine = engine_of(0)
    with pytest.raises(ValueError, match="'moments' is none of optim_states, hp_params"):
        engine.offload_states(include=["moments"])
    with pytest.raises(ValueError, match="host memory alone, device='cpu'"):
        engine.offload_states(device=OffloadDeviceEnum.nvme)
    engine.offload_states(device="none")
    assert engine.away.kinds == []
    engine.offload_states(include="lp_params", device=torch.device("cpu"), pin_memory=False, non_blocking=True)
    assert engine.away.kinds == ["lp_params"]
    engine.destroy()
    assert not any(p.isnan().any() for p in engine.module.parameters()), "destroy brings everything back"


def test_kinds_and_places_are_checked(ranks):
    ranks(1, arguments)


def offloaded_already(device: str, path: str) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero |= {"offload_optimizer": {"device": device, "nvme_path": path}}
    engine = engine_of(3, "bf16", zero_optimization=zero)
    plain = engine_of(3, "bf16")
    for number in range(4):
        micro(engine, number)
        micro(plain, number)
        engine.optimizer.late.finish()  # its buffers come and go
        held = engine.sharded.ledger.host.total_bytes
        engine.offload_states()
        assert "hp_params" not in engine.away.kinds, "masters that are off the device stay where they are"
        engine.reload_states()
        assert engine.sharded.ledger.host.total_bytes == held
    assert same(weights(engine), weights(plain))
    engine.destroy()
    plain.destroy()


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_what_is_offloaded_anyway_stays_there(ranks, device, tmp_path):
    ranks(1, offloaded_already, device, str(tmp_path))
