"""LAMB and Muon over shards: whole tensors' norms and whole matrices, to the bit where the sums have one order."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lockstep import CLIP, options, plain_training, sharded_training
from models import Net, batch
from tolerances import tolerance
from torch import Tensor

import tritonspeed as ts
from tritonspeed.optim import Lamb, Muon
from tritonspeed.zero import whole
from tritonspeed.zero.layout import lay_out

STEPS = 4
NAMES = ["lamb", "muon"]


def over_slices(tied: bool = False) -> Net:
    """Blocks of ten pages, so that a slice of two or three ranks begins within a matrix."""
    return Net(width=45, tied=tied)


def odd_net(dtype: torch.dtype = torch.float32) -> Net:
    """A tied head, a frozen matrix and a frozen bias; weights that bf16 holds exactly."""
    torch.manual_seed(0)
    net = over_slices(tied=True)
    net.blocks[0].mix.weight.requires_grad_(False)
    net.blocks[1].up.bias.requires_grad_(False)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.bfloat16())
    return net.to(dtype)


def grouped(net: Net, name: str) -> torch.optim.Optimizer:
    """Vectors without decay and with a rate of their own."""
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return Lamb(groups, lr=1e-2, weight_decay=0.1) if name == "lamb" else Muon(groups, lr=0.02)


def unsharded(name: str, precision: str, clip: float) -> dict[str, Tensor]:
    """Masters after plain steps, without any of the engine."""
    net = odd_net(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = grouped(net, name)
    for step in range(STEPS):
        net(*batch(0, step)).backward()
        if clip:
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            norm = torch.cat([g.double().flatten() for g in grads]).norm().item()
            for g in grads if norm > clip else ():
                g.mul_(clip / norm)
        optimizer.step()
        optimizer.zero_grad()
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    return {n: optimizer.state[p].get("master", p).detach().float() for n, p in named}


def sharded(name: str, precision: str, stage: int, clip: float = 0.0, round_elems: int = 0) -> dict[str, Tensor]:
    """The same over shards: every rank has the same data, so that two ranks' mean gradient is one's to the bit."""
    net = odd_net()
    with patch.object(whole, "ROUND_ELEMS", round_elems or whole.ROUND_ELEMS):
        net, stepper = ts.zero.shard(net, grouped(net, name), stage, precision, clip, options(reduce_bucket_size=1))
    assert stepper is not None
    for step in range(STEPS):
        net(*batch(0, step)).backward()
        stepper.step()
    held = {n: ts.zero.safe_get_full_fp32_param(p) for n, p in net.named_parameters() if p.requires_grad}
    assert net._tritonspeed.ledger.bytes_of["communication"] == 0
    return {n: p for n, p in held.items() if p is not None}


@pytest.mark.parametrize("world", [2, 3])
def test_the_model_is_one_whose_tensors_lie_across_slices(world: int) -> None:
    """Or nothing below would have to be exchanged."""
    for itemsize in (2, 4):
        layout = lay_out([(n, p.shape) for n, p in over_slices().blocks[2].named_parameters()], itemsize, world)
        pieces = [piece for rank in range(world) for piece in layout.pieces(*layout.interval(rank))]
        assert len({p.span.name for p in pieces if p.numel < p.span.numel and len(p.span.shape) == 2}) >= world - 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_one_rank_equals_the_unsharded_run_to_the_bit(name: str, precision: str) -> None:
    want = unsharded(name, precision, 0.0)
    for stage in range(4):
        got = sharded(name, precision, stage)
        assert got.keys() == want.keys()
        for n, master in want.items():
            assert torch.equal(got[n], master), (stage, n)


def test_clipping_is_the_unsharded_runs() -> None:
    want, free = unsharded("lamb", "fp32", 0.1), unsharded("lamb", "fp32", 0.0)
    got = sharded("lamb", "fp32", 2, clip=0.1)
    for n, master in want.items():
        torch.testing.assert_close(got[n], master, **tolerance(torch.float32, 4096))
    assert any((master - free[n]).abs().max() > 1e-6 for n, master in want.items())


def all_stages(name: str, precision: str, round_elems: int) -> list[dict[str, Tensor]]:
    return [sharded(name, precision, stage, round_elems=round_elems) for stage in range(4)]


@pytest.mark.parametrize(("precision", "round_elems"), [("fp32", 0), ("bf16", 1)], ids=["one round", "many rounds"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_the_unsharded_run_to_the_bit(ranks: Any, name: str, precision: str, round_elems: int) -> None:
    want = unsharded(name, precision, 0.0)
    for by_stage in ranks(2, all_stages, name, precision, round_elems):
        for stage, got in enumerate(by_stage):
            for n, master in want.items():
                assert torch.equal(got[n], master), (stage, n)


def curves(name: str, precision: str | None, accumulation: int, stages: tuple[int, ...]) -> list[Any]:
    return [sharded_training(stage, STEPS, accumulation, precision, {}, over_slices, name) for stage in stages]


@pytest.mark.parametrize(("precision", "world"), [(None, 3), ("bf16", 2)])
@pytest.mark.parametrize("name", NAMES)
def test_stages_agree_to_the_bit_whatever_the_data(ranks: Any, name: str, precision: str | None, world: int) -> None:
    by_rank = ranks(world, curves, name, precision, 1, (0, 1, 2, 3))
    losses, norms, masters = by_rank[0][0]
    assert max(norms) > CLIP
    for got in by_rank:
        for got_losses, got_norms, got_masters in got:
            assert got_losses == losses and got_norms == norms
            assert all(got_masters[n].equal(masters[n]) for n in masters)


@pytest.mark.parametrize("name", ["lamb", "muon in fp32"])
def test_three_ranks_follow_the_unsharded_run(ranks: Any, name: str) -> None:
    """Ranks with data of their own, accumulation and clipping: the plain run's sums have another order."""
    losses, norms, masters = plain_training(3, STEPS, 2, make=over_slices, optimizer=name)
    got_losses, got_norms, got_masters = ranks(3, curves, name, None, 2, (2,))[0][0]
    # the iteration for matrices multiplies what differs by up to 3.4445⁵ = 485 where a singular value is small
    close = tolerance(torch.float32, 4096 if name == "lamb" else 4096 * 25)
    assert got_losses == pytest.approx(losses, rel=1e-4) and got_norms == pytest.approx(norms, rel=1e-3)
    for n, master in masters.items():
        torch.testing.assert_close(got_masters[n], master, **close)


def resume(name: str) -> bool:
    """A run that is saved and loaded in the middle ends as one that is not; states are found by name."""
    ends = []
    for interrupted in (False, True):
        net = odd_net()
        net, stepper = ts.zero.shard(net, grouped(net, name), 3, None, 0.0, options())
        assert stepper is not None
        for step in range(3):
            net(*batch(dist.get_rank(), step)).backward()
            stepper.step()
            if interrupted and step == 1:
                saved = stepper.state_dict()
                stepper.load_state_dict(saved)
        p = net.blocks[0].up.weight
        key = "exp_avg" if name == "lamb" else "momentum_buffer"
        state = ts.zero.safe_get_full_optimizer_state(p, key)
        assert state is not None and state.shape == p.shape and state.any()
        ends.append(ts.zero.safe_get_full_fp32_param(p))
    return torch.equal(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_saved_and_found(ranks: Any, name: str) -> None:
    assert all(ranks(2, resume, name))


def test_matrices_are_shared_out_by_their_work() -> None:
    shapes = [(8, 8), (64, 64), (8, 8), (64, 32), (8, 8), (64, 64)]
    loads = [0, 0]
    owners = whole.assign(shapes, loads)
    by_rank = [sum(whole.matrix_flops(s) for s, o in zip(shapes, owners, strict=True) if o == r) for r in (0, 1)]
    assert by_rank == loads and max(by_rank) - min(by_rank) <= whole.matrix_flops((64, 32))
    assert {owners[1], owners[5]} == {0, 1}
    assert whole.assign([(4, 4)], [5, 0, 0]) == [1]  # whoever had least before


def test_rounds_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "ROUND_ELEMS", 3000)
    layouts = [lay_out([("a", (50, 60)), ("b", (7,))], 4, 2), lay_out([("c", (3,))], 4, 2)]
    layouts += [lay_out([("d", (70, 60)), ("e", (10, 10))], 4, 2)]
    spans = [[(s, 0) for s in layout.spans if len(s.shape) == 2] for layout in layouts]
    first, second = whole.plan_rounds(spans, layouts, 2)
    assert [m.span.name for m in first.matrices] == ["a"] and [m.span.name for m in second.matrices] == ["d", "e"]
    assert (first.buckets, second.buckets) == (slice(0, 2), slice(2, 3))
    a = first.matrices[0]
    assert a.numel_in(0) + a.numel_in(1) == 3000 and a.in_slice(1)[1] == 3000
    assert first.held_elems(1 - a.owner, True) == a.numel_in(1 - a.owner) + layouts[0].slice_numel
    assert first.held_elems(a.owner, True) == a.numel_in(a.owner) + 6000
    assert first.held_elems(0, False) == layouts[0].numel


def by_name(kind: str, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": kind, "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def wide_net() -> Net:
    return Net(vocab=211, width=129, depth=4)


def measure(kind: str, stage: int) -> tuple[dict[str, int], int, list[bool]]:
    """Bytes between two steps, the most in one, and what went to Muon, of an engine that is built by name."""
    engine, *_ = ts.initialize(model=wide_net(), config=by_name(kind, stage))
    before = [p.detach().clone() for p in engine.module.parameters()] if stage < 3 else []
    for step in range(3):
        engine.backward(engine(*batch(dist.get_rank() if dist.is_initialized() else 0, step, vocab=211)))
        engine.step()
    assert all((p != was).any() for p, was in zip(engine.module.parameters(), before, strict=False))
    peak = engine.last_step.peak_bytes
    found = engine.memory(), peak, [getattr(p, "use_muon", False) for p in engine.module.parameters()]
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 3), (2, 2), (3, 3)])
@pytest.mark.parametrize("kind", ["Lamb", "Muon"])
def test_memory_is_what_the_estimate_says(ranks: Any, kind: str, stage: int, world: int) -> None:
    net = wide_net()
    want = ts.estimate(net, by_name(kind, stage), world)
    by_rank = ranks(world, measure, kind, stage)
    rest = {key: max(found[key] for found, _, _ in by_rank) for key in by_rank[0][0]}
    assert rest == want.rest_bytes
    assert max(peak for _, peak, _ in by_rank) == pytest.approx(want.total_peak_bytes, rel=0.03)
    hidden = [name.startswith("blocks.") and p.ndim == 2 for name, p in net.named_parameters()]
    hidden[-1] = True  # the head, which is not called lm_head
    assert by_rank[0][2] == (hidden if kind == "Muon" else [False] * len(hidden))
    assert not any(hasattr(p, "use_muon") for p in net.parameters())  # an estimate leaves no marks
    adam = ts.estimate(net, by_name("AdamW", stage), world)
    assert (want.rest_bytes["optimizer"] < adam.rest_bytes["optimizer"]) == (kind == "Muon")
