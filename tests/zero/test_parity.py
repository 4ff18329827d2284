"""Losses, gradient norms and masters equal plain PyTorch's: stage × dtype × accumulation × overlap × recomputation."""

from __future__ import annotations

import functools

import pytest
import torch
from lockstep import plain_training, sharded_training
from models import Net

STEPS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The optimizer is linear (SGD with momentum), so that an error in a gradient shows as an error of its own size; AdamW,
# which divides by √v and may turn the sign of a rounding into a whole step, is held to losses alone below.
MASTER_ATOL = {"fp32": 2e-6, "bf16": 1e-3, "fp16": 1e-4}
LOSS_RTOL = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}


def net(recompute: str | None) -> Net:
    return Net(recompute=recompute)


def train(stage, accumulation, precision, given, recompute, optimizer="sgd"):
    make = functools.partial(net, recompute)
    return sharded_training(
        stage, STEPS, accumulation, None if precision == "fp32" else precision, given, make, optimizer
    )


@functools.cache
def reference(world: int, accumulation: int, precision: str, optimizer: str = "sgd"):
    return plain_training(world, STEPS, accumulation, DTYPES[precision], optimizer=optimizer)


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("stage", range(4))
def test_training_equals_plain_pytorch(ranks, stage, precision, accumulation, overlap, recompute):
    losses, norms, masters = reference(2, accumulation, precision)
    given = {"overlap": overlap, "max_reuse_distance": 0 if overlap else 10**9}
    for got_losses, got_norms, got_masters in ranks(2, train, stage, accumulation, precision, given, recompute):
        assert got_losses == pytest.approx(losses, rel=LOSS_RTOL[precision])
        assert got_norms == pytest.approx(norms, rel=20 * LOSS_RTOL[precision])
        for name, want in masters.items():
            torch.testing.assert_close(got_masters[name], want, rtol=0, atol=MASTER_ATOL[precision], msg=name)


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("stage", range(4))
def test_any_number_of_ranks(ranks, world, stage):
    losses, norms, masters = reference(world, 1, "fp32")
    for got_losses, got_norms, got_masters in ranks(world, train, stage, 1, "fp32", {}, None):
        assert got_losses == pytest.approx(losses, rel=LOSS_RTOL["fp32"])
        assert got_norms == pytest.approx(norms, rel=20 * LOSS_RTOL["fp32"])
        for name, want in masters.items():
            torch.testing.assert_close(got_masters[name], want, rtol=0, atol=MASTER_ATOL["fp32"], msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "ours"])
@pytest.mark.parametrize("stage", range(4))
def test_adamw_by_torch_and_by_us(ranks, stage, optimizer):
    losses, norms, _ = reference(2, 1, "fp32", "adamw")
    for got_losses, got_norms, _ in ranks(2, train, stage, 1, "fp32", {}, None, optimizer):
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert got_norms == pytest.approx(norms, rel=1e-4)
