"""Every elementwise optimizer of ours on shards: the same bits at every stage, and the plain run's numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lockstep import OPTIMIZERS, plain_training, sharded_training
from models import Net
from tolerances import tolerance

import tritonspeed as ts

STEPS = 12
OURS = {
    "lion": partial(ts.optim.Lion, lr=5e-3, weight_decay=0.1),
    "lion, rounded": partial(ts.optim.Lion, lr=5e-3, stochastic_rounding=True),
    "adagrad": partial(ts.optim.Adagrad, lr=5e-2, lr_decay=0.01, initial_accumulator_value=0.01),
    "adagrad, rounded": partial(ts.optim.Adagrad, lr=5e-2, stochastic_rounding=True),
    "bf16 moments": partial(ts.optim.AdamW, lr=1e-2, state="bf16"),
    "8-bit moments": partial(ts.optim.AdamW, lr=1e-2, state="8bit", stochastic_rounding=True),
}
OPTIMIZERS.update(OURS)


def wide() -> Net:
    """Slices of more than 8,192 elements: moments are in 8 bits, and a small ``sub_group_size`` cuts."""
    return Net(vocab=211, width=128, depth=2)


def curves(name, precision):
    variants = [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"sub_group_size": 1001}), (1, {"sub_group_size": 5000})]
    return [sharded_training(stage, STEPS, 1, precision, given, wide, optimizer=name) for stage, given in variants]


CASES = [(name, precision) for name in OURS for precision in ("bf16", None)]  # fp32 has nothing to round at random


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_stage_gives_the_same_bits(ranks, name, precision):
    by_rank = ranks(3, curves, name, precision)
    losses, norms, masters = by_rank[0][0]
    assert losses[-1] < losses[0]
    for got in by_rank:
        for got_losses, got_norms, got_masters in got:
            assert got_losses == losses and got_norms == norms
            assert all(got_masters[n].equal(masters[n]) for n in masters)


def plain(name):
    return sharded_training(2, 3, optimizer=name)


def test_adagrad_follows_the_plain_run(ranks):
    """Lion cannot be held to it: a gradient's last bit may turn a sign, and a weight by twice the learning rate."""
    losses, norms, masters = ranks(2, plain, "adagrad")[0]
    want_losses, want_norms, want_masters = plain_training(2, 3, optimizer="adagrad")
    assert losses == pytest.approx(want_losses, rel=1e-5) and norms == pytest.approx(want_norms, rel=1e-4)
    for name, master in want_masters.items():
        torch.testing.assert_close(masters[name], master, **tolerance(torch.float32, 4096))
