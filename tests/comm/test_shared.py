"""The windows that ranks of one host share: any sizes, waits in any order, wrap-around, and what does not fit."""

from __future__ import annotations

import glob
import os
import random

import pytest
import torch
import torch.distributed as dist

import tritonspeed as ts
from tritonspeed import comm
from tritonspeed.comm import shared

SIZES = [
    1,
    7,
    1000,
    1000,
    65_536,
    65_536,
    300_000,
    2_500_000,
]  # elements per rank; the last goes through in pieces


def storm(seed: int, num_operations: int) -> tuple[int, int]:
    """Random collectives, up to five under way, waited for in random order; every result is checked.

    Returns:
        (operations that went through the windows, operations that did not fit).
    """
    mesh = ts.comm.mesh_of()
    rank, world = mesh.rank, mesh.world
    windows, generator = mesh.windows(), random.Random(seed)  # the same choices on every rank
    assert windows is not None, "ranks on this machine share memory"
    before, pending = windows.num_streams, []
    for number in range(num_operations):
        n = generator.choice(SIZES)
        dtype = generator.choice([torch.bfloat16, torch.float32])
        values = [torch.arange(n * world).remainder(97).add(13 * r + number).to(dtype) for r in range(world)]
        if generator.random() < 0.5:
            whole = torch.full((n * world,), float("nan"), dtype=dtype)
            whole.view(world, n)[rank] = values[rank].view(world, n)[rank]
            want = torch.cat([values[r].view(world, n)[r] for r in range(world)])
            pending.append((comm.all_gather_(mesh, whole, "storm"), whole, want, values))
        else:
            out = torch.empty(n)
            want = values[0].view(world, n)[rank].float()
            for r in range(1, world):
                want = want + values[r].view(world, n)[rank].float()
            pending.append((comm.reduce_scatter(mesh, values[rank], out, False, "storm"), out, want, values))
        while len(pending) > 5 or (pending and generator.random() < 0.4):
            done, got, want, _ = pending.pop(generator.randrange(len(pending)))
            done.wait()
            assert got.equal(want), (number, n, dtype)
    for done, got, want, _ in pending:
        done.wait()
        assert got.equal(want)
    used = windows.num_streams - before
    return used, num_operations - used


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_storm_of_collectives_is_exact(ranks, world):
    counts = ranks(world, storm, world, 50)
    assert len(set(counts)) == 1  # every rank decided alike what fits
    assert counts[0][0] > 25


def leftovers() -> list[str]:
    ts.comm.mesh_of().windows()
    dist.barrier()
    return glob.glob(f"{shared.FOLDER}/tritonspeed-{os.getpid()}-*")


def test_nothing_is_left_in_the_folder(ranks):
    assert ranks(2, leftovers) == [[], []]


def without_room() -> bool:
    """One rank cannot make its window: nobody uses any."""
    mesh = ts.comm.mesh_of()
    folder, shared.FOLDER = shared.FOLDER, "/no such folder" if mesh.rank == 1 else shared.FOLDER
    try:
        return shared.open_windows(mesh.rank, mesh.world, mesh.group, 5.0) is None
    finally:
        shared.FOLDER = folder


def test_ranks_that_do_not_share_memory_agree_to_use_gloo(ranks):
    assert ranks(3, without_room) == [True] * 3


def waits_for_nobody() -> str:
    mesh = ts.comm.mesh_of()
    windows = shared.open_windows(mesh.rank, mesh.world, mesh.group, 1.5)
    assert windows is not None
    message = ""
    if mesh.rank == 0:
        stream = windows.open(128, 1)
        assert stream is not None
        try:
            windows.peek(stream, 0, 1, 0)
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_peer_that_does_not_come_is_named(ranks):
    assert "rank 0 has waited 2 s for rank 1" in ranks(2, waits_for_nobody)[0]
