"""What a sharded model shows to those who look, copy, save and load, and what is left when it goes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import SHARDINGS, Case, Plain, one_pass, sgd
from models import Net, batch
from tolerances import tolerance

import tritonspeed as ts

CLOSE = tolerance(torch.float32, 4096)


def sharded_net(sharding: str, precision: str | None = None, **kind: Any) -> tuple[Any, Any]:
    stage, threshold = SHARDINGS[sharding]
    torch.manual_seed(0)
    net = Net(**kind)
    options = ts.zero.ShardOptions(param_persistence_threshold=threshold)
    return ts.zero.shard(net, sgd(net.parameters()), stage=stage, precision=precision, options=options)


def plain_net(**kind: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kind)


def look_at_sharded() -> None:
    net, _ = sharded_net("3")
    weight = net.blocks[0].up.weight
    assert weight.shape == (27, 13) and weight.dtype == torch.float32 and weight.requires_grad
    assert weight.isnan().all() and weight.untyped_storage().nbytes() == 4
    for write in (
        weight.data.normal_,
        lambda: weight.data.copy_(torch.ones(27, 13)),
        lambda: torch.nn.init.xavier_uniform_(weight),
    ):
        with pytest.raises(RuntimeError, match="single memory location"):
            write()
    torch.nn.init.zeros_(weight)  # writes the one element there is, and torch lets it: seen at the next use
    with pytest.raises(ValueError, match="a parameter of 'blocks.0' was written to"):
        net(*batch(0, 0))
    assert not net(*batch(0, 0)).isnan()


def test_a_sharded_parameter_reads_as_nan_and_refuses_writes(ranks: Any) -> None:
    ranks(2, look_at_sharded)


def copies(sharding: str) -> None:
    net, optimizer = sharded_net(sharding)
    one_pass(net, 0, 0)
    optimizer.step()
    want = net._tritonspeed.full_state_dict(rank0_only=False)
    makers = (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load)
    for make in makers:
        if sharding == "3":
            with pytest.raises(ValueError, match="sharded over the ranks cannot be copied or pickled"):
                make(net)
            with pytest.raises(ValueError, match="blocks|sharded over the ranks"):
                make(net.blocks[0])
        with ts.zero.GatheredParameters(net.parameters()):
            twin = make(net)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(value, want[name], rtol=0, atol=0)
        twin_trains_alone(twin)
    torch.testing.assert_close(net._tritonspeed.full_state_dict(rank0_only=False), want, rtol=0, atol=0)
    one_pass(net, 0, 1)  # and the original is as it was
    optimizer.step()


def save_and_load(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def twin_trains_alone(twin: Any) -> None:
    """An ordinary model: it has gradients, and steps with them."""
    optimizer = sgd(twin.parameters())
    before = twin.blocks[1].up.weight.detach().clone()
    one_pass(twin, 0, 0)
    assert all(p.grad is not None for p in twin.parameters())
    optimizer.step()
    assert (twin.blocks[1].up.weight != before).any()


@pytest.mark.parametrize("sharding", ["0", "2", "3"])
def test_copies_are_ordinary_models_or_refused(ranks: Any, sharding: str) -> None:
    ranks(2, copies, sharding)


def state_dicts(sharding: str) -> None:
    net, _ = sharded_net(sharding, tied=True)
    plain = plain_net(tied=True).state_dict()
    shown, whole = net.state_dict(), net._tritonspeed.full_state_dict(rank0_only=False)
    assert list(shown) == list(plain) == list(whole)
    for name, want in plain.items():
        torch.testing.assert_close(whole[name], want, rtol=0, atol=0)
        assert shown[name].shape == want.shape and shown[name].dtype == want.dtype
        if sharding == "3":
            assert shown[name].is_meta
        elif sharding == "3 persistent":
            assert shown[name].is_meta == (want.numel() >= SHARDINGS[sharding][1])
        if not shown[name].is_meta:
            torch.testing.assert_close(shown[name], want, rtol=0, atol=0)
    assert net._tritonspeed.full_state_dict() == {} or dist.get_rank() == 0
    with ts.zero.GatheredParameters(net.parameters()):
        torch.testing.assert_close(dict(net.state_dict()), dict(plain), rtol=0, atol=0)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_state_dict_never_holds_placeholders(ranks: Any, sharding: str) -> None:
    ranks(2, state_dicts, sharding)


def load(sharding: str, precision: str | None) -> None:
    """Load other values in the middle of a training, and go on: as if it had begun with them."""
    net, optimizer = sharded_net(sharding, precision)
    torch.manual_seed(7)
    other = Net().state_dict()
    if sharding.startswith("3"):
        with pytest.raises(ValueError, match="cannot be loaded into as it is"):
            net.load_state_dict(other)
        with ts.zero.GatheredParameters(net.parameters(), modifier_rank=0):
            if dist.get_rank() == 0:
                net.load_state_dict(other)
    else:
        with pytest.raises(ValueError, match="leave assign out"):
            net.load_state_dict(dict(other), assign=True)  # a copy: torch notes the assign in what it is given
        net.load_state_dict(other)
    for name, p in net.named_parameters():
        want = other[name] if precision is None else other[name].bfloat16().float()
        torch.testing.assert_close(ts.zero.safe_get_full_fp32_param(p), want, rtol=0, atol=0)
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.0
    one_pass(net, 0, 0)
    optimizer.step()  # a step of length 0 writes the masters out: what was loaded is still there
    for name, value in net._tritonspeed.full_state_dict(rank0_only=False).items():
        torch.testing.assert_close(value, other[name].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_loaded_values_reach_the_masters(ranks: Any, sharding: str, precision: str | None) -> None:
    ranks(2, load, sharding, precision)


def destroy(sharding: str) -> None:
    """After two sharded steps and a destroy, the model trains on by itself, and then sharded anew."""
    rank, world = dist.get_rank(), dist.get_world_size()
    case = Case(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    plain = Plain(case, world)
    net, _ = sharded_net(sharding)
    for again in ("destroyed", "0", "3"):
        net._tritonspeed.destroy()
        assert not hasattr(net, "_tritonspeed") and not net._forward_hooks and not net._forward_pre_hooks
        assert all(type(m._parameters) is dict for m in net.modules())
        torch.testing.assert_close(dict(net.state_dict()), dict(plain.model.state_dict()), **CLOSE)
        one_pass(net, 0, 0)  # an ordinary backward leaves ordinary gradients
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
        net.zero_grad()
        stage = int(again) if again != "destroyed" else 1
        net, optimizer = ts.zero.shard(net, case.optimizer(net.parameters()), stage=stage)
        one_pass(net, rank, 3)
        optimizer.step()
        plain.step(3)
        got = net._tritonspeed.full_state_dict(rank0_only=False)
        torch.testing.assert_close(got, dict(plain.model.state_dict()), **CLOSE)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_destroy_gives_the_plain_model_back(ranks: Any, sharding: str) -> None:
    ranks(2, destroy, sharding)


def engine_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def cycle(stage: int, destroy: bool) -> list[weakref.ref]:
    net = plain_net()
    engine, optimizer, _, _ = ts.initialize(model=net, config=engine_config(stage))
    for step in range(2):
        engine.backward(engine(*batch(0, step)))
        engine.step()
    if destroy:
        engine.destroy()
    things = (engine, net, optimizer, engine.sharded, engine.sharded.buckets[0].whole, net.blocks[0].up.weight)
    return [weakref.ref(thing) for thing in things]


def cycles(stage: int, destroy: bool) -> None:
    for _ in range(20 if destroy and stage == 3 else 3):
        left = cycle(stage, destroy)
        gc.collect()
        assert not (alive := [type(r()) for r in left if r() is not None]), alive


@pytest.mark.parametrize("destroy", [True, False], ids=["destroyed", "dropped"])
@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_left_of_an_engine(ranks: Any, stage: int, destroy: bool) -> None:
    ranks(2, cycles, stage, destroy)


def copy_engine() -> None:
    engine, *_ = ts.initialize(model=plain_net(), config=engine_config(2))
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="an engine cannot be copied or pickled"):
            make(engine)


def test_an_engine_is_not_copied(ranks: Any) -> None:
    ranks(2, copy_engine)
