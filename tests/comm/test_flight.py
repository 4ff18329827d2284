"""Ranks that part ways get an error that names both places; a rank that waits in vain says where everybody stands."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Net, batch
from ranks import World

import tritonspeed as ts
from tritonspeed import comm
from tritonspeed.comm.flight import KEPT_ENTRIES, FlightRecorder, first_difference


@pytest.fixture
def two_ranks() -> Iterator[World]:
    """A world for one test: what goes wrong in it stays in it."""
    world = World(2)
    yield world
    world.stop(kill=True)


def diverge_in_model(stage: int) -> str:
    """Rank 1 takes another block than rank 0, of the same size: no rank waits in vain, the contents are wrong."""
    torch.manual_seed(0)
    net = Net(depth=4)
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    net, optimizer = ts.zero.shard(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, options=options)
    tokens, _ = batch(0, 0)
    x = net.blocks[0](net.embed(tokens))
    net.blocks[1 + comm.mesh_of().rank](x).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_that_call_different_units_are_told_both_names(two_ranks: World) -> None:
    for told in two_ranks.run(diverge_in_model, 3):
        assert "the ranks have not issued the same collectives" in told
        assert "rank 0: #" in told and "all-gather of 'blocks.1'" in told
        assert "rank 1: #" in told and "all-gather of 'blocks.2'" in told
        assert "set_z3_leaf_modules" in told


def test_at_stage_2_they_may_differ(two_ranks: World) -> None:
    assert two_ranks.run(diverge_in_model, 2) == ["no error", "no error"]


def wait_in_vain(way: str, timeout_s: float) -> str:
    """Rank 1 computes for longer than rank 0 is willing to wait."""
    mesh = dataclasses.replace(comm.mesh_of(), timeout_s=timeout_s, _windows=[None] if way == "gloo" else [])
    whole = torch.zeros(128)
    comm.all_gather_(mesh, whole, "embed").wait()
    if mesh.rank == 1:
        time.sleep(timeout_s + 5)
        return "no error"
    try:
        comm.all_gather_(mesh, whole, "blocks.7").wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("way", ["shared", "gloo"])
def test_a_rank_that_waits_in_vain_says_where_everybody_stands(two_ranks: World, way: str) -> None:
    told, other = two_ranks.run(wait_in_vain, way, 2.0)
    assert other == "no error"
    assert "Where the ranks stand:" in told
    assert "rank 0: waiting for " in told and "#2 all-gather of 'blocks.7' (128 elements)" in told
    assert "rank 1: computing after #1 all-gather of 'embed' (128 elements)" in told


def end_early() -> str:
    import os

    mesh = dataclasses.replace(comm.mesh_of(), timeout_s=60.0, _windows=[])
    whole = torch.zeros(128)
    comm.all_gather_(mesh, whole, "embed").wait()
    if mesh.rank == 1:
        os._exit(3)
    try:
        comm.all_gather_(mesh, whole, "blocks.7").wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_rank_that_has_ended_is_noticed(two_ranks: World) -> None:
    for pipe in two_ranks.pipes:
        pipe.send((end_early.__code__.co_filename, "end_early", ()))
    two_ranks.processes[1].join(20)
    assert two_ranks.pipes[0].poll(20), "rank 0 still waits for a rank that is gone"
    good, told = two_ranks.pipes[0].recv()
    assert good and "rank 1 has ended" in told and "'blocks.7'" in told


def recorded(*entries: tuple[str, str, int]) -> FlightRecorder:
    flight = FlightRecorder()
    for entry in entries:
        flight.record(*entry)
    return flight


def test_the_hash_is_of_the_whole_history() -> None:
    a, b = ("all-gather", "x", 4), ("reduce-scatter", "y", 8)
    assert recorded(a, b).hash == recorded(a, b).hash
    others: list[Any] = [recorded(b, a), recorded(a), recorded(a, ("reduce-scatter", "y", 9)), recorded(a, a, b)]
    assert len({recorded(a, b).hash, *(flight.hash for flight in others)}) == 5
    assert recorded(a, b).hash < 2**64


def test_the_first_difference_is_named() -> None:
    same = [("all-gather", f"unit {i}", 4) for i in range(5)]
    one, two = recorded(*same, ("all-gather", "left", 4)), recorded(*same, ("reduce-scatter", "right", 8))
    told = first_difference([one.history_json(), two.history_json(), recorded(*same).history_json()])
    assert told.splitlines() == [
        "  rank 0: #6 all-gather of 'left' (4 elements)",
        "  rank 1: #6 reduce-scatter of 'right' (8 elements)",
        "  rank 2: nothing",
    ]


def test_a_difference_long_ago_is_said_to_be_long_ago() -> None:
    later = [("all-gather", f"unit {i}", 4) for i in range(KEPT_ENTRIES)]
    one, two = recorded(("all-gather", "left", 4), *later), recorded(("all-gather", "right", 4), *later)
    assert one.hash != two.hash
    assert f"before the last {KEPT_ENTRIES}" in first_difference([one.history_json(), two.history_json()])
