"""Every elementwise optimizer of ours on shards: the same bits at every stage, and the plain run's numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lockstep import OPTIMIZERS, plain_training, sharded_training
from tolerances import tolerance

import tritonspeed as ts

STEPS = 12
OURS = {
    "lion": partial(ts.optim.Lion, lr=5e-3, weight_decay=0.1),
    "lion, rounded": partial(ts.optim.Lion, lr=5e-3, stochastic_rounding=True),
    "adagrad": partial(ts.optim.Adagrad, lr=5e-2, lr_decay=0.01, initial_accumulator_value=0.01),
    "adagrad, rounded": partial(ts.optim.Adagrad, lr=5e-2, stochastic_rounding=True),
}
OPTIMIZERS.update(OURS)


def curves(name, precision):
    small = {"sub_group_size": 1000}
    return [
        sharded_training(stage, STEPS, 1, precision, given, optimizer=name)
        for stage, given in ((0, {}), (1, {}), (2, {}), (3, {}), (3, small))
    ]


CASES = [(name, precision) for name in OURS for precision in (None, "bf16") if precision or "rounded" not in name]


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
