"""Memory is a choice, numbers are not: thirty steps, every stage, prefetch and bucket sizes, to the last bit."""

from __future__ import annotations

import pytest
from lockstep import sharded_training

STEPS = 30
VARIANTS = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "stage 3, nothing ahead, nothing kept": (3, {"prefetch_bucket_size": 0, "max_reuse_distance": 0}),
    "stage 3, nothing live": (3, {"max_live_parameters": 0}),
    "stage 2, small buckets": (2, {"reduce_bucket_size": 1}),
    "stage 1, no overlap": (1, {"overlap": False}),
    "stage 3, small chunks": (3, {"sub_group_size": 1000}),
    "stage 2, one chunk": (2, {"sub_group_size": 0}),
}


def curves(precision, accumulation, names):
    return {
        name: sharded_training(VARIANTS[name][0], STEPS, accumulation, precision, VARIANTS[name][1]) for name in names
    }


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("world", [2, 3])
def test_every_memory_choice_gives_the_same_bits(ranks, world, precision):
    by_rank = ranks(world, curves, precision, 1, list(VARIANTS))
    losses, norms, masters = by_rank[0]["stage 0"]
    assert losses[-1] < losses[0]
    for got in by_rank:
        for name, (got_losses, got_norms, got_masters) in got.items():
            assert got_losses == losses, name
            assert got_norms == norms, name
            assert all(got_masters[n].equal(masters[n]) for n in masters), name


@pytest.mark.parametrize("pair", [("stage 0", "stage 1"), ("stage 2", "stage 3")], ids=" and ".join)
def test_accumulation_is_bitwise_where_the_sum_has_one_order(ranks, pair):
    """Stages 0 and 1 add micro-steps before ranks, stages 2 and 3 ranks before micro-steps: each pair agrees."""
    for got in ranks(2, curves, "bf16", 3, list(pair)):
        (losses, norms, masters), (other_losses, other_norms, other_masters) = got[pair[0]], got[pair[1]]
        assert losses == other_losses and norms == other_norms
        assert all(masters[n].equal(other_masters[n]) for n in masters)


def rounded(stage):
    return sharded_training(stage, 10, 1, "bf16", {}, optimizer="rounded")


def test_stochastic_rounding_draws_the_same_bits_at_every_stage(ranks):
    results = [ranks(2, rounded, stage)[0] for stage in range(4)]
    plain = ranks(2, curves, "bf16", 1, ["stage 0"])[0]["stage 0"]
    assert all(losses == results[0][0] for losses, _, _ in results)
    assert results[0][0] != plain[0][:10]  # it does round differently
