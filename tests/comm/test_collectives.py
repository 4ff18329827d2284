"""All-gather, reduce-scatter, broadcast, exchange: through shared memory and through gloo, on one to four ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tolerances import tolerance

from tritonspeed import comm

WAYS = ["shared", "gloo"]
WORLDS = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mesh_by(way: str) -> comm.Mesh:
    """Everyone's mesh, exchanging through windows or through gloo's sends and receives."""
    mesh = comm.mesh_of()
    if way == "gloo":
        return dataclasses.replace(mesh, _windows=[None])
    assert mesh.world == 1 or mesh.windows() is not None, "the ranks of a test share memory"
    return mesh


def values(rank: int, num_elems: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(num_elems, generator=generator).to(dtype)


def gather(way: str, dtype: torch.dtype, num_elems: int) -> None:
    mesh = mesh_by(way)
    whole = torch.zeros(mesh.world, num_elems, dtype=dtype)
    whole[mesh.rank] = values(mesh.rank, num_elems, dtype)
    pending = comm.all_gather_(mesh, whole.view(-1), "test")
    pending.wait()
    pending.wait()
    for rank in range(mesh.world):
        torch.testing.assert_close(whole[rank], values(rank, num_elems, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_all_gather_in_place(ranks: Any, world: int, way: str, dtype: torch.dtype) -> None:
    ranks(world, gather, way, dtype, 64 * 37)


def scatter(way: str, dtype: torch.dtype, num_elems: int) -> None:
    """Accumulated twice, and the first time into memory that holds NaN."""
    mesh = mesh_by(way)
    world, rank = mesh.world, mesh.rank
    everyone = [values(r, world * num_elems, dtype).view(world, num_elems)[rank] for r in range(world)]
    want = everyone[0].float()
    for part in everyone[1:]:
        want = want + part.float()  # in rank order: to the last bit
    out = torch.full((num_elems,), float("nan"))
    mine = values(rank, world * num_elems, dtype)
    comm.reduce_scatter(mesh, mine, out, False, "test").wait()
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    comm.reduce_scatter(mesh, mine, out, True, "test").wait()
    torch.testing.assert_close(out, want + want, rtol=0, atol=0)
    torch.testing.assert_close(mine, values(rank, world * num_elems, dtype), rtol=0, atol=0)
    low = torch.zeros(num_elems, dtype=torch.bfloat16)
    comm.reduce_scatter(mesh, mine, low, True, "test").wait()
    torch.testing.assert_close(low.float(), want, **tolerance(torch.bfloat16, world))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter_adds_in_fp32_in_rank_order(ranks: Any, world: int, way: str, dtype: torch.dtype) -> None:
    ranks(world, scatter, way, dtype, 64 * 37)


def exact(way: str) -> None:
    """256 + 1 + 1 is 256 in bf16 and 258 in fp32; 2²⁴ + 1 − 2²⁴ is 0 in rank order and 1 in another."""
    mesh = mesh_by(way)
    out = torch.empty(64)
    number = 256.0 if mesh.rank == 0 else 1.0
    comm.reduce_scatter(mesh, torch.full((192,), number, dtype=torch.bfloat16), out, False, "exact").wait()
    assert (out == 258).all()
    order = [2.0**24, 1.0, -(2.0**24)]
    comm.reduce_scatter(mesh, torch.full((192,), order[mesh.rank]), out, False, "order").wait()
    assert (out == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_added_exactly(ranks: Any, way: str) -> None:
    ranks(3, exact, way)


def several(way: str) -> None:
    """Gathers and reductions under way together, waited for in another order."""
    mesh, n = mesh_by(way), 128
    wholes = [torch.full((mesh.world, n), -1.0) for _ in range(4)]
    outs = [torch.empty(n) for _ in range(4)]
    pending = []
    for i in range(4):
        wholes[i][mesh.rank] = 10.0 * i + mesh.rank
        pending.append(comm.all_gather_(mesh, wholes[i].view(-1), f"gather {i}"))
        pending.append(comm.reduce_scatter(mesh, torch.full((mesh.world * n,), i + 1.0), outs[i], False, f"sum {i}"))
    for i in (1, 0, 5, 7, 2, 3, 6, 4):
        pending[i].wait()
    for i in range(4):
        assert (wholes[i] == 10.0 * i + torch.arange(mesh.world).view(-1, 1)).all()
        assert (outs[i] == (i + 1) * mesh.world).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 3])
def test_several_under_way(ranks: Any, world: int, way: str) -> None:
    ranks(world, several, way)


def many_small() -> int:
    """More operations than there are counters, far fewer bytes than there is room."""
    mesh = mesh_by("shared")
    windows = mesh.windows()
    assert windows is not None
    before = windows.num_streams
    for number in range(600):
        whole = torch.full((mesh.world,), -1.0)
        whole[mesh.rank] = number + mesh.rank
        comm.all_gather_(mesh, whole, "small").wait()
        assert whole.tolist() == [number + r for r in range(mesh.world)]
    return windows.num_streams - before


def test_any_number_of_small_operations_goes_through_shared_memory(ranks: Any) -> None:
    assert ranks(2, many_small) == [600, 600]


def broadcast(source: int) -> None:
    mesh = comm.mesh_of()
    for dtype in (*DTYPES, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn):
        want = torch.arange(12).view(3, 4).remainder(2 if dtype == torch.bool else 100).to(dtype)
        for make in (torch.clone, lambda t: t.t().contiguous().t()):  # contiguous, and not
            got = make(want if mesh.rank == source else torch.zeros_like(want))
            comm.broadcast_(mesh, got, source, "test")
            assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("world", WORLDS)
def test_broadcast(ranks: Any, world: int) -> None:
    ranks(world, broadcast, world - 1)


def small_numbers() -> None:
    mesh = comm.mesh_of()
    table = comm.exchange(mesh, torch.tensor([mesh.rank + 0.25, float("inf"), -1e300], dtype=torch.float64))
    assert table.shape == (mesh.world, 3)
    assert comm.read_scalars(mesh, table[:, 0]) == [r + 0.25 for r in range(mesh.world)]
    assert (table[:, 1] == float("inf")).all() and (table[:, 2] == -1e300).all()
    total = torch.tensor([1.0, mesh.rank])
    comm.sum_(mesh, total, "test")
    assert total.tolist() == [mesh.world, sum(range(mesh.world))]


@pytest.mark.parametrize("world", WORLDS)
def test_exchange_and_sum(ranks: Any, world: int) -> None:
    ranks(world, small_numbers)
