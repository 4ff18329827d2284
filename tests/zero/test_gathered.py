"""GatheredParameters: whole inside, changed for all on leaving, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import SHARDINGS, assert_at_rest, one_pass, sgd
from models import Net, batch
from torch import nn

import tritonspeed as ts
from tritonspeed.zero import GatheredParameters, safe_get_full_fp32_param

PRECISIONS = [None, "bf16"]


def sharded_net(sharding: str, precision: str | None = None) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The sharded model, its optimizer, and the values it was built with, in the compute dtype."""
    stage, threshold = SHARDINGS[sharding]
    torch.manual_seed(0)
    net = Net(depth=2)
    net.blocks[0].mix.weight.requires_grad_(False)
    dtype = torch.bfloat16 if precision else torch.float32
    values = {name: p.detach().to(dtype, copy=True) for name, p in net.named_parameters()}
    options = ts.zero.ShardOptions(param_persistence_threshold=threshold)
    trainable = [p for p in net.parameters() if p.requires_grad]
    return *ts.zero.shard(net, sgd(trainable), stage=stage, precision=precision, options=options), values


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def look(sharding: str, precision: str | None) -> None:
    net, _, values = sharded_net(sharding, precision)
    named = dict(net.named_parameters())
    outsider = nn.Parameter(torch.ones(3))
    chosen = {
        "list": list(named.values()),
        "generator": (p for p in named.values()),
        "duplicates": [*named.values(), *named.values()],
        "a mix": [outsider, *named.values()],
    }
    for what in chosen.values():
        with GatheredParameters(what):
            for name, p in named.items():
                same(p.detach(), values[name])
        assert_at_rest(net._tritonspeed)
    with GatheredParameters(named["head.weight"]):
        same(named["head.weight"].detach(), values["head.weight"])
    with GatheredParameters([outsider]), GatheredParameters([]):
        pass
    with GatheredParameters(named.values(), enabled=False):
        assert named["blocks.1.up.weight"].isnan().all() == (sharding[0] == "3")
    assert_at_rest(net._tritonspeed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_looking(ranks: Any, sharding: str, precision: str | None) -> None:
    ranks(2, look, sharding, precision)


def change(sharding: str, precision: str | None, modifier: int) -> None:
    """Each rank writes its own number; the modifier's becomes everybody's value and master, and stays over a step."""
    net, optimizer, values = sharded_net(sharding, precision)
    named = dict(net.named_parameters())
    chosen = ["blocks.1.up.weight", "norm.bias", "blocks.0.mix.weight", "embed.weight"]
    with GatheredParameters([named[name] for name in chosen], modifier_rank=modifier):
        for i, name in enumerate(chosen):
            with torch.no_grad():
                named[name].fill_(i + 1.5 if dist.get_rank() == modifier else -100.0)
            values[name].fill_(i + 1.5)
    assert_at_rest(net._tritonspeed)
    for name, p in named.items():
        wanted = values[name].float()
        got = safe_get_full_fp32_param(p)
        if name in chosen or precision is None:
            same(got, wanted)
        else:  # masters of the untouched keep what bf16 does not have
            same(got.bfloat16().float(), wanted)
            assert name.endswith(("norm.weight", "bias")) or not p.requires_grad or (got != wanted).any()
    optimizer.param_groups[0]["lr"] = 0.0
    one_pass(net, dist.get_rank(), 0)
    optimizer.step()
    whole = net._tritonspeed.full_state_dict(rank0_only=False)
    for name, wanted in values.items():
        same(whole[name], wanted)


@pytest.mark.parametrize("modifier", [0, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_rank_changes_for_all(ranks: Any, sharding: str, precision: str | None, modifier: int) -> None:
    ranks(2, change, sharding, precision, modifier)


def replace_data(sharding: str, precision: str | None) -> None:
    """``p.data = values`` leaves the version of ``p`` as it was, and the flat buffer without the values."""
    net, optimizer, values = sharded_net(sharding, precision)
    p, wanted = net.blocks[1].up.weight, values["blocks.1.up.weight"]
    with GatheredParameters([p], modifier_rank=1):
        p.data = torch.full(p.shape, 2.5 + dist.get_rank())
    wanted.fill_(3.5)
    same(safe_get_full_fp32_param(p), wanted.float())
    with pytest.raises(ValueError, match="were changed inside"), GatheredParameters([p]):
        p.data = torch.zeros(p.shape)
    with pytest.raises(ValueError, match="was given data of shape"), GatheredParameters([p], modifier_rank=0):
        p.data = torch.zeros(3)
    assert_at_rest(net._tritonspeed)
    optimizer.param_groups[0]["lr"] = 0.0
    one_pass(net, dist.get_rank(), 0)
    optimizer.step()
    same(net._tritonspeed.full_state_dict(rank0_only=False)["blocks.1.up.weight"], wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_other_data_given_to_a_parameter_is_kept(ranks: Any, sharding: str, precision: str | None) -> None:
    ranks(2, replace_data, sharding, precision)


def change_in_any_order(sharding: str) -> None:
    net, _, values = sharded_net(sharding)
    named = dict(net.named_parameters())
    mine = list(named) if dist.get_rank() == 0 else list(named)[::-1]
    with GatheredParameters([None, *(named[name] for name in mine)], modifier_rank=0), torch.no_grad():
        for number, name in enumerate(named):
            named[name].add_(number + dist.get_rank())
    with GatheredParameters(named.values()):
        for number, (name, p) in enumerate(named.items()):
            same(p.detach(), values[name] + number)


@pytest.mark.parametrize("sharding", ["1", "3"])
def test_ranks_name_parameters_in_orders_of_their_own(ranks: Any, sharding: str) -> None:
    """transformers passes list({...}) of parameters, in the order of their addresses; and the bias that is None."""
    ranks(2, change_in_any_order, sharding)


def nested(sharding: str) -> None:
    net, _, values = sharded_net(sharding)
    p, q = net.blocks[0].up.weight, net.blocks[0].down.weight  # of one unit
    with GatheredParameters([p, q]):
        with GatheredParameters(p, modifier_rank=0), torch.no_grad():
            p.add_(1.0)
        same(p.detach(), values["blocks.0.up.weight"] + 1)
        same(q.detach(), values["blocks.0.down.weight"])
        net(*batch(0, 0))  # a forward inside does not take them away
        same(q.detach(), values["blocks.0.down.weight"])
    assert_at_rest(net._tritonspeed)
    with GatheredParameters(p):
        same(p.detach(), values["blocks.0.up.weight"] + 1)


@pytest.mark.parametrize("sharding", ["0", "2", "3", "3 persistent"])
def test_reentrant(ranks: Any, sharding: str) -> None:
    ranks(2, nested, sharding)


def unnamed_change(sharding: str) -> None:
    net, _, _ = sharded_net(sharding)
    with (
        pytest.raises(ValueError, match=r"1 parameter\(s\), the first of shape \(27, 13\), were changed"),
        GatheredParameters(net.parameters()),
        torch.no_grad(),
    ):
        net.blocks[0].up.weight.mul_(2.0)
    with pytest.raises(ZeroDivisionError), GatheredParameters(net.parameters()), torch.no_grad():
        net.blocks[0].up.weight.mul_(2.0)
        raise ZeroDivisionError  # the user's own error is the one that is seen
    assert_at_rest(net._tritonspeed)


@pytest.mark.parametrize("sharding", ["0", "2", "3"])
def test_a_change_that_would_be_lost_is_an_error(ranks: Any, sharding: str) -> None:
    ranks(2, unnamed_change, sharding)


def across_a_step(sharding: str, precision: str | None) -> None:
    """Held over forward, backward and step, the parameters are the updated ones, and what follows is unchanged."""
    apart, apart_optimizer, _ = sharded_net(sharding, precision)
    held, optimizer, values = sharded_net(sharding, precision)
    rank = dist.get_rank()
    with GatheredParameters(held.parameters()):
        one_pass(held, rank, 0)
        optimizer.step()
        one_pass(apart, rank, 0)
        apart_optimizer.step()
        want = apart._tritonspeed.full_state_dict(rank0_only=False)
        for name, p in held.named_parameters():
            same(p.detach(), want[name])
        assert (held.head.weight != values["head.weight"]).any()
    assert_at_rest(held._tritonspeed)
    for model, stepper in ((held, optimizer), (apart, apart_optimizer)):
        one_pass(model, rank, 1)
        stepper.step()
    got, want = (m._tritonspeed.full_state_dict(rank0_only=False) for m in (held, apart))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_across_a_step(ranks: Any, sharding: str, precision: str | None) -> None:
    ranks(2, across_a_step, sharding, precision)


def test_parameters_that_nobody_shards_are_passed_over() -> None:
    p = nn.Parameter(torch.ones(3))
    with GatheredParameters(p), torch.no_grad():
        p.add_(1.0)
    assert (p == 2).all()
