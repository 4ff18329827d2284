"""Where training state lives changes no number: device, host and disk, tiles, buffers, ratio, overlap, accumulation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from beside import host_apart
from lockstep import options, sharded_training
from models import Net, batch

import tritonspeed as ts
from tritonspeed.kernels import host_step

STEPS = 10
TILE = 16384  # the least: several tiles to a bucket of the wide model


def wide() -> Net:
    return Net(vocab=211, width=129, depth=2)


def offloads(folder: str) -> dict[str, ts.Offload]:
    """Every way to keep the optimizer's part; each has a folder of its own."""
    path = Path(folder)
    return {
        "host": ts.Offload(optimizer="cpu"),
        "disk": ts.Offload(optimizer="nvme", path=path / "a"),
        "disk, small tiles": ts.Offload(optimizer="nvme", path=path / "b", tile_elems=TILE),
        "disk, one buffer": ts.Offload(optimizer="nvme", path=path / "c", tile_elems=TILE, buffers=1),
        "disk, two buffers": ts.Offload(optimizer="nvme", path=path / "d", tile_elems=TILE, buffers=2),
        "disk, at once": ts.Offload(optimizer="nvme", path=path / "e", tile_elems=TILE, overlap=False),
        "disk, half": ts.Offload(optimizer="nvme", path=path / "f", ratio=0.5),
    }


def with_parameters(folder: str) -> dict[str, ts.Offload]:
    """Every way to keep the parameter shards of stage 3 too."""
    path = Path(folder)
    nothing = {"max_in_cpu": 0}
    return {
        "parameters on the host": ts.Offload(optimizer="nvme", parameters="cpu", path=path / "g"),
        "parameters on disk": ts.Offload(optimizer="nvme", parameters="nvme", path=path / "h", **nothing),
        "only parameters on disk": ts.Offload(parameters="nvme", path=path / "i", **nothing),
        "parameters on disk, host masters": ts.Offload(optimizer="cpu", parameters="nvme", path=path / "j", **nothing),
        "some on disk": ts.Offload(optimizer="nvme", parameters="nvme", path=path / "k", max_in_cpu=40_000),
        "little room": ts.Offload(
            optimizer="nvme", parameters="nvme", path=path / "l", parameter_buffer_elems=1, **nothing
        ),
        "folders apart": ts.Offload(
            optimizer="nvme", parameters="nvme", path=path / "m", parameters_path=path / "n", tile_elems=TILE, **nothing
        ),
    }


def curves(
    stage: int, precision: str | None, accumulation: int, folder: str, optimizer: str, given: dict | None = None
) -> dict:
    ways = {"device": ts.Offload(), **offloads(folder)} | (with_parameters(folder) if stage == 3 else {})
    return {
        name: sharded_training(
            stage, STEPS, accumulation, precision, {**(given or {}), "offload": way}, wide, optimizer
        )
        for name, way in ways.items()
    }


def assert_same(got: dict) -> None:
    losses, norms, masters = got["device"]
    assert losses[-1] < losses[0]
    for name, (other_losses, other_norms, other_masters) in got.items():
        assert other_losses == losses, name
        assert other_norms == norms, name
        assert all(other_masters[n].equal(masters[n]) for n in masters), name


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_every_tier_gives_the_same_bits(ranks, tmp_path, world, stage, precision):
    for got in ranks(world, curves, stage, precision, 1, str(tmp_path), "ours"):
        assert_same(got)


@pytest.mark.parametrize(
    "given", [{}, {"overlap": False}, {"reduce_bucket_size": 1}], ids=["overlap", "no overlap", "small buckets"]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_gradients_are_neither_lost_nor_doubled(ranks, tmp_path, world, stage, given):
    for got in ranks(world, curves, stage, "bf16", 3, str(tmp_path), "ours", given):
        assert_same(got)


def uneven(way: ts.Offload) -> list[torch.Tensor | None]:
    """Masters after steps of 1, 3, 2 and 1 backwards: what was 16 bits alone must not be when more is added."""
    torch.manual_seed(0)
    model = wide()
    inner = ts.optim.AdamW(model.parameters(), lr=1e-2)
    model, stepper = ts.zero.shard(model, inner, 3, "bf16", 0.5, options(offload=way))
    assert stepper is not None
    number = 0
    for num_backwards in (1, 3, 2, 1):
        for _ in range(num_backwards):
            model(*batch(0, number)).backward()
            number += 1
        stepper.step()
    return [ts.zero.safe_get_full_fp32_param(p) for p in model.parameters()]


def uneven_everywhere(folder: str) -> dict[str, list[torch.Tensor | None]]:
    return {name: uneven(way) for name, way in {"device": ts.Offload(), **offloads(folder)}.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_any_number_of_backwards(ranks, tmp_path, world):
    for got in ranks(world, uneven_everywhere, str(tmp_path)):
        for name, masters in got.items():
            assert all(a.equal(b) for a, b in zip(masters, got["device"], strict=True)), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rounded", "8bit", "lion", "adagrad"])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_elementwise_optimizer_runs_offloaded(ranks, tmp_path, stage, optimizer):
    for got in ranks(2, curves, stage, "bf16", 1, str(tmp_path), optimizer):
        assert_same(got)


def apart(stage: int, precision: str | None, accumulation: int, folder: str, late: bool, optimizer: str) -> dict:
    """The same with host memory that is not the device's, as beside a GPU: everything is copied."""
    plain = sharded_training(stage, STEPS, accumulation, precision, {}, wide, optimizer)
    with host_apart(late):
        return {"device": plain, **curves(stage, precision, accumulation, folder, optimizer)}


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 1), (3, 3)])
def test_host_memory_apart_gives_the_same_bits(ranks, tmp_path, stage, accumulation, precision):
    for got in ranks(2, apart, stage, precision, accumulation, str(tmp_path), False, "ours"):
        assert_same(got)


@pytest.mark.parametrize(
    ("world", "stage", "accumulation"), [(1, 1, 1), (1, 2, 2), (1, 3, 1), (1, 3, 3), (2, 0, 1), (2, 3, 2)]
)
def test_copies_at_the_last_moment_give_the_same_bits(ranks, tmp_path, world, stage, accumulation):
    """Nothing is read before it has been waited for, and no source is written to, lent or freed before that."""
    for got in ranks(world, apart, stage, "bf16", accumulation, str(tmp_path), True, "ours"):
        assert_same(got)


def test_another_optimizer_takes_gradients_from_their_buffer(ranks, tmp_path):
    for got in ranks(2, apart, 0, "bf16", 1, str(tmp_path), True, "sgd"):
        assert_same(got)


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
def test_whole_tensor_optimizers_are_refused(optimizer, tmp_path, ranks):
    with pytest.raises(Exception, match="needs whole tensors"):
        ranks(1, sharded_training, 2, 1, 1, "bf16", {"offload": ts.Offload(optimizer="cpu")}, wide, optimizer)


def states(folder: str) -> tuple[list, list]:
    """Exp_avg of every parameter after five steps: on the device and on disk; and read, changed and read on disk."""
    found = []
    for way in (ts.Offload(), ts.Offload(optimizer="nvme", path=Path(folder), tile_elems=TILE)):
        torch.manual_seed(0)
        model = wide()
        inner = ts.optim.AdamW(model.parameters(), lr=1e-2)
        model, stepper = ts.zero.shard(model, inner, 3, "bf16", offload=way)
        assert stepper is not None
        for step in range(5):
            model(*batch(0, step)).backward()
            stepper.step()
        found.append([ts.zero.safe_get_full_optimizer_state(p, "exp_avg") for p in model.parameters()])
    changed = []
    for p, before in zip(model.parameters(), found[1], strict=True):
        ts.zero.safe_set_full_optimizer_state(p, before + 1, "exp_avg")
        ts.zero.safe_set_full_fp32_param(p, torch.ones(p.shape))
        assert ts.zero.safe_get_full_fp32_param(p).eq(1).all()
        changed.append(ts.zero.safe_get_full_optimizer_state(p, "exp_avg") - 1 - before)
    with ts.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for p in model.parameters():
            assert p.eq(1).all()
            p.data.fill_(2)
    assert all(ts.zero.safe_get_full_fp32_param(p).eq(2).all() for p in model.parameters())
    kept = stepper.state_dict()
    stepper.load_state_dict(kept)
    again = stepper.state_dict()["optimizer"]["state"]
    for number, state in kept["optimizer"]["state"].items():
        assert all(again[number][name].equal(state[name]) for name in ("exp_avg", "exp_avg_sq"))
    return found, changed


def test_states_on_disk_are_read_set_saved_and_loaded(ranks, tmp_path):
    for (device, disk), changed in ranks(2, states, str(tmp_path)):
        assert all(a.equal(b) for a, b in zip(device, disk, strict=True))
        assert all(c.abs().max() < 1e-6 for c in changed)


def one_rank_without_compiler() -> str:
    """What the ranks take where the last of them cannot compile, of a model that is worth it."""
    shard = sys.modules["tritonspeed.zero.shard"]  # the package has a function of that name
    lacks, num_elems = host_step._lacks_compiler, shard.COMPILED_FROM_ELEMS
    host_step.use_host_step("auto")
    host_step.COMPILED_FROM_ELEMS = shard.COMPILED_FROM_ELEMS = 1
    host_step._lacks_compiler = lambda: "no compiler" if dist.get_rank() == dist.get_world_size() - 1 else None
    try:
        sharded_training(1, 1, make=wide)
        return host_step.host_step()
    finally:
        host_step._lacks_compiler = lacks
        host_step.COMPILED_FROM_ELEMS = shard.COMPILED_FROM_ELEMS = num_elems
        host_step.use_host_step("auto")


def test_ranks_take_one_form_of_the_host_step(ranks):
    assert ranks(2, one_rank_without_compiler) == ["chunked", "chunked"]
