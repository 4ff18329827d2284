"""safe_get/set_*: one parameter's master, gradient and state, whole or this rank's part, equal plain PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import SHARDINGS, Case, Plain, assert_at_rest, one_pass
from models import Net, batch
from test_cases import MixtureNet
from tolerances import tolerance
from torch import nn

import tritonspeed as ts
from tritonspeed.zero import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)

CLOSE = tolerance(torch.float32, 4096)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=0.1)  # a large eps: Adam without its taste for tiny gradients


def ours(parameters: Any) -> torch.optim.Optimizer:
    return ts.optim.AdamW(parameters, lr=0.01, eps=0.1)


OPTIMIZERS = {"torch": adamw, "ours": ours}


def frozen_bias() -> Net:
    net = Net(depth=2)
    net.blocks[1].up.bias.requires_grad_(False)
    return net


def setup(sharding: str, optimizer: str) -> tuple[Any, Any, Plain]:
    stage, threshold = SHARDINGS[sharding]
    plain = Plain(Case(frozen_bias, optimizer=adamw), dist.get_world_size())
    torch.manual_seed(0)
    net = frozen_bias()
    trainable = [p for p in net.parameters() if p.requires_grad]
    options = ts.zero.ShardOptions(param_persistence_threshold=threshold, sub_group_size=500)
    return *ts.zero.shard(net, OPTIMIZERS[optimizer](trainable), stage=stage, options=options), plain


def joined(local: torch.Tensor | None, p: nn.Parameter) -> torch.Tensor:
    """The ranks' parts, one after another."""
    assert local is not None and local.ndim == 1
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local.detach().clone())
    return torch.cat(parts).view(p.shape)


def get(sharding: str, optimizer: str) -> None:
    rank = dist.get_rank()
    net, stepper, plain = setup(sharding, optimizer)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    for _, p in trained:
        assert safe_get_full_grad(p) is None and safe_get_local_grad(p) is None
        assert safe_get_full_optimizer_state(p, "exp_avg") is None
    for step in range(2):
        one_pass(net, rank, step)
        gradients = {n: safe_get_full_grad(p) for n, p in trained}
        parts = {n: joined(safe_get_local_grad(p), p) for n, p in trained}
        stepper.step()
        plain.step(step)
        for (name, p), master in zip(trained, plain.masters, strict=True):
            state = plain.optimizer.state[master]
            found = {
                "gradient": (gradients[name], parts[name], master.grad),
                "master": (safe_get_full_fp32_param(p), joined(safe_get_local_fp32_param(p), p), master.detach()),
            }
            for key in ("exp_avg", "exp_avg_sq"):
                local = joined(safe_get_local_optimizer_state(p, key), p)
                found[key] = (safe_get_full_optimizer_state(p, key), local, state[key])
            for kind, (full, local, want) in found.items():
                torch.testing.assert_close(full, want, **CLOSE, msg=lambda t, w=f"{name}, {kind}": f"{w}: {t}")
                torch.testing.assert_close(local, full, rtol=0, atol=0)
            assert safe_get_full_grad(p) is None, "the step has used it up"
    fixed = net.blocks[1].up.bias
    torch.testing.assert_close(
        safe_get_full_fp32_param(fixed), plain.model.get_parameter("blocks.1.up.bias").detach(), **CLOSE
    )
    assert_at_rest(net._tritonspeed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_get(ranks: Any, sharding: str, optimizer: str) -> None:
    ranks(2, get, sharding, optimizer)


def set_all(sharding: str, optimizer: str) -> None:
    """Values and moments set by hand on both models; the next steps agree."""
    rank = dist.get_rank()
    net, stepper, plain = setup(sharding, optimizer)
    with pytest.raises(ValueError, match="the optimizer has no 'exp_avg' to set yet"):
        safe_set_full_optimizer_state(net.norm.weight, torch.ones(13), "exp_avg")
    one_pass(net, rank, 0)
    stepper.step()
    plain.step(0)
    trained = [p for p in net.parameters() if p.requires_grad]
    for p, master in zip(trained, plain.masters, strict=True):
        value, moment = torch.randn(p.shape), torch.rand(p.shape)
        safe_set_full_fp32_param(p, value)
        safe_set_full_optimizer_state(p, moment, "exp_avg_sq")
        master.data.copy_(value)
        plain.optimizer.state[master]["exp_avg_sq"].copy_(moment)
        torch.testing.assert_close(safe_get_full_fp32_param(p), value, rtol=0, atol=0)
        torch.testing.assert_close(safe_get_full_optimizer_state(p, "exp_avg_sq"), moment, rtol=0, atol=0)
    fixed = torch.randn(27)
    safe_set_full_fp32_param(net.blocks[1].up.bias, fixed)
    with torch.no_grad():
        plain.model.get_parameter("blocks.1.up.bias").copy_(fixed)
        for p, master in zip(plain.parameters, plain.masters, strict=True):
            p.copy_(master)
    for step in (1, 2):
        loss = one_pass(net, rank, step)
        stepper.step()
        torch.testing.assert_close(loss, plain.step(step)[rank], **CLOSE)
    got = net._tritonspeed.full_state_dict(rank0_only=False)
    torch.testing.assert_close(got, dict(plain.model.state_dict()), **CLOSE)
    with pytest.raises(ValueError, match=r"a value of shape \(3,\) cannot be set on a parameter of \(13,\)"):
        safe_set_full_fp32_param(net.norm.weight, torch.ones(3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_set(ranks: Any, sharding: str, optimizer: str) -> None:
    ranks(2, set_all, sharding, optimizer)


def low_precision(sharding: str) -> None:
    """bf16 parameters have fp32 masters: reading gives all their bits, writing reaches the modules too."""
    stage, threshold = SHARDINGS[sharding]
    torch.manual_seed(0)
    net = Net(depth=2)
    want = {n: p.detach().clone() for n, p in net.named_parameters()}
    options = ts.zero.ShardOptions(param_persistence_threshold=threshold)
    net, _ = ts.zero.shard(net, adamw(net.parameters()), stage=stage, precision="bf16", options=options)
    for name, p in net.named_parameters():
        torch.testing.assert_close(safe_get_full_fp32_param(p), want[name], rtol=0, atol=0)
        safe_set_full_fp32_param(p, want[name] + 1 / 3)
        torch.testing.assert_close(safe_get_full_fp32_param(p), want[name] + 1 / 3, rtol=0, atol=0)
    for name, value in net._tritonspeed.full_state_dict(rank0_only=False).items():
        torch.testing.assert_close(value, (want[name] + 1 / 3).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_masters_of_bf16(ranks: Any, sharding: str) -> None:
    ranks(2, low_precision, sharding)


def few_bits(state: str, sharding: str) -> None:
    """Moments in fewer bits read as fp32 values near those that are kept whole, and are set as finely."""
    rank, found = dist.get_rank(), []
    stage, threshold = SHARDINGS[sharding]
    options = ts.zero.ShardOptions(param_persistence_threshold=threshold, sub_group_size=5000)
    for kind in ("fp32", state):
        torch.manual_seed(0)
        net = Net(width=96, depth=1)
        net, stepper = ts.zero.shard(net, ts.optim.AdamW(net.parameters(), state=kind), stage=stage, options=options)
        for _ in range(2):
            net(*batch(rank, 0)).backward()
            stepper.step()
        found.append(net)
    half_cell = 0.9 / 64 / 2 if state == "8bit" else 0  # of the widest codes, as a part of a block's largest value
    for key in ("exp_avg", "exp_avg_sq"):
        for want_p, p in zip(found[0].parameters(), found[1].parameters(), strict=True):
            want, got = safe_get_full_optimizer_state(want_p, key), safe_get_full_optimizer_state(p, key)
            assert want is not None and got is not None and got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=2**-6, atol=want.abs().max().item() / 64)
            torch.testing.assert_close(joined(safe_get_local_optimizer_state(p, key), p), got, rtol=0, atol=0)
        for p in found[1].parameters():
            value = torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) + 0.5
            safe_set_full_optimizer_state(p, value, key)
            again = safe_get_full_optimizer_state(p, key)
            assert again is not None
            torch.testing.assert_close(again, value, rtol=2**-8, atol=1.5 * half_cell)
    kept = {name for s in stepper.state.values() for name in s}
    assert state != "8bit" or {"exp_avg_code", "exp_avg_sq_scale"} <= kept


@pytest.mark.parametrize("state", ["bf16", "8bit"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_moments_in_fewer_bits(ranks: Any, sharding: str, state: str) -> None:
    ranks(2, few_bits, state, sharding)


def set_gradients(sharding: str, optimizer: str) -> None:
    """Gradients set by hand, whole, by a function, and by each rank its part: the step applies them."""
    rank = dist.get_rank()
    net, stepper, plain = setup(sharding, optimizer)
    trained = [p for p in net.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"has no gradient to set yet: a backward makes it"):
        safe_set_full_grad(trained[0], torch.ones(trained[0].shape))
    one_pass(net, rank, 0)
    chosen = [torch.randn(p.shape) for p in trained]
    for p, value in zip(trained, chosen, strict=True):
        safe_set_full_grad(p, value)
        torch.testing.assert_close(safe_get_full_grad(p), value, **CLOSE)
    with pytest.raises(ValueError, match=r"a value of shape \(3,\) cannot be set on"):
        safe_set_local_grad(trained[0], torch.ones(3))
    for p in trained[::2]:
        local = safe_get_local_grad(p)
        assert local is not None
        safe_set_local_grad(p, 3 * local)
    safe_update_full_grad_vectorized(net.parameters(), lambda gradient, p: gradient + p.ndim)
    chosen = [(value * (1 if n % 2 else 3)) + p.ndim for n, (p, value) in enumerate(zip(trained, chosen, strict=True))]

    def replace(*_: Any) -> None:
        for master, value in zip(plain.masters, chosen, strict=True):
            master.grad = value.clone()

    plain.optimizer.register_step_pre_hook(replace)
    plain.step(0)
    stepper.step()
    for (name, value), p in zip(plain.model.state_dict().items(), net.parameters(), strict=True):
        told = f"{name} after gradients that were set"
        torch.testing.assert_close(safe_get_full_fp32_param(p), value, **CLOSE, msg=lambda t, w=told: f"{w}: {t}")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_set_gradients(ranks: Any, sharding: str) -> None:
    ranks(2, set_gradients, sharding, "ours")


def set_parts(sharding: str) -> None:
    """Each rank sets its part; where every rank has the whole, one rank's part is not enough."""
    net, stepper, _ = setup(sharding, "ours")
    one_pass(net, dist.get_rank(), 0)
    p = net.blocks[0].up.weight
    part = safe_get_local_fp32_param(p)
    with pytest.raises(
        ValueError, match="the optimizer has no 'exp_avg' to set yet|every rank has the whole 'exp_avg'"
    ):
        safe_set_local_optimizer_state(p, part, "exp_avg")
    stepper.step()
    if SHARDINGS[sharding][0]:
        safe_set_local_optimizer_state(p, 2 + part, "exp_avg")
        torch.testing.assert_close(safe_get_local_optimizer_state(p, "exp_avg"), 2 + part, rtol=0, atol=0)
    if not p.isnan().all():
        with pytest.raises(ValueError, match="is whole on every rank: set all of it, with safe_set_full_fp32_param"):
            safe_set_local_fp32_param(p, part)
        return
    want = safe_get_full_fp32_param(p) + 1
    safe_set_local_fp32_param(p, safe_get_local_fp32_param(p) + 1)
    torch.testing.assert_close(safe_get_full_fp32_param(p), want, rtol=0, atol=0)
    with ts.zero.GatheredParameters([p]):
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=0)


@pytest.mark.parametrize("sharding", ["0", "2", "3"])
def test_set_parts(ranks: Any, sharding: str) -> None:
    ranks(2, set_parts, sharding)


def test_a_parameter_that_is_not_managed_is_named() -> None:
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is not managed by ZeRO"):
        safe_get_full_fp32_param(nn.Parameter(torch.ones(3)))


def test_leaf_modules_are_one_unit() -> None:
    def units(net: Net) -> list[str]:
        options = ts.zero.ShardOptions(param_persistence_threshold=0)
        ts.zero.shard(net, stage=3, options=options)
        names = [group.name for group in net._tritonspeed.groups]  # type: ignore[attr-defined]
        assert not net(*batch(0, 0)).isnan()
        return names

    split = MixtureNet(leaf=True)
    for module in split.modules():
        module.__dict__.pop("_z3_leaf", None)
    assert "mixture.experts.1" in units(split)
    assert "mixture" in units(MixtureNet(leaf=True))
    by_name = MixtureNet(leaf=True)
    by_name.mixture.__dict__.pop("_z3_leaf")
    assert ts.zero.set_z3_leaf_modules(by_name, ["Mixture"]) == [by_name.mixture]
    names = units(by_name)
    assert "mixture" in names and not any("experts" in name for name in names)
    with pytest.raises(ValueError, match=r"no module of \['Attention'\] in the model: it has Block,"):
        ts.zero.set_z3_leaf_modules(Net(), ["Attention"])
