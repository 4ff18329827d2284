"""Saved at any world size, stage, tier and dtype, loaded at any other: the same state, and at the same world size the
same bits from there on."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import make, said, settings
from models import Net, batch

import tritonspeed as ts
from tritonspeed.checkpoint import MismatchedCheckpoint

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 1e-2}}
OPTIMIZERS = {
    "adamw": ADAMW,
    "8bit": {"type": "AdamW", "params": {"lr": 1e-2, "state": "8bit"}},
    "bf16 states": {"type": "AdamW", "params": {"lr": 1e-2, "state": "bf16"}},
    "rounded": {"type": "AdamW", "params": {"lr": 1e-2, "stochastic_rounding": True}},
    "lion": {"type": "Lion", "params": {"lr": 1e-3}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2}},
    "lamb": {"type": "Lamb", "params": {"lr": 1e-2}},
    "muon": {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-2}},
    "sgd": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
}


def config(stage: int, accumulation: int = 1, precision: str | None = None, optimizer: str = "adamw", **more: Any):
    return settings(stage, accumulation, precision, optimizer=OPTIMIZERS[optimizer], scheduler=WARMUP, **more)


def disk(stage: int, path: str, **more: Any) -> dict[str, Any]:
    """zero_optimization with everything on disk that can be."""
    block: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    block["offload_optimizer"] = {"device": "nvme", "nvme_path": path}
    if stage == 3:
        block["offload_param"] = {"device": "nvme", "nvme_path": path, "max_in_cpu": 0}
    return {**block, **more}


def train(engine: ts.Engine, first: int, last: int) -> list[float]:
    """Micro-steps [first, last) with dropout's random numbers; losses of this rank."""
    losses = []
    for i in range(first, last):
        tokens, targets = batch(engine.mesh.rank, i)
        loss = engine(tokens, targets) * (1 + 0.1 * torch.rand(()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine: ts.Engine) -> dict[str, Any]:
    """Everything that training follows from, whole, on every rank."""
    kinds = ("exp_avg", "exp_avg_sq", "sum", "momentum_buffer")
    found: dict[str, Any] = {"steps": engine.global_steps, "lr": engine.get_lr(), "samples": engine.global_samples}
    for name, p in engine.module.named_parameters():
        found[name] = ts.zero.safe_get_full_fp32_param(p)
        if not p.requires_grad:
            continue
        for kind in kinds:
            value = ts.zero.safe_get_full_optimizer_state(p, kind)
            if value is not None:
                found[f"{kind} of {name}"] = value
    return {**found, **{f"seen {n}": v for n, v in engine.module_state_dict().items()}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = value.equal(other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def resumed(folder: str, given: dict[str, Any], micro: int, more: int, fresh: dict[str, Any] | None = None) -> None:
    """Train, save, train on; load into a fresh engine and train on: the same bits."""
    engine = make(given)
    torch.manual_seed(dist.get_rank())
    train(engine, 0, micro)
    engine.save_checkpoint(folder, client_state={"note": [1, dist.get_rank()]})
    expected = train(engine, micro, micro + more), state(engine)
    engine.destroy()
    other = make(fresh or given, Net)
    train(other, 7, 7 + micro)  # what it was does not matter
    path, client = other.load_checkpoint(folder)
    assert path is not None and pathlib.Path(path).name == f"global_step{other.global_steps}"
    assert client == {"note": [1, dist.get_rank()]}
    got = train(other, micro, micro + more), state(other)
    assert got[0] == expected[0]
    assert_same(got[1], expected[1])
    other.destroy()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_with_the_same_bits(ranks, tmp_path, stage, precision, world):
    ranks(world, resumed, str(tmp_path), config(stage, 1, precision), 3, 3)


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_in_the_middle_of_an_accumulation(ranks, tmp_path, stage, precision):
    ranks(2, resumed, str(tmp_path), config(stage, 3, precision), 5, 5)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("stage", [1, 3])
def test_every_optimizer_resumes_with_the_same_bits(ranks, tmp_path, stage, optimizer):
    ranks(2, resumed, str(tmp_path), config(stage, 1, "bf16", optimizer), 3, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_from_disk_and_onto_it(ranks, tmp_path, stage):
    on_disk = config(stage, 2, "bf16", zero_optimization=disk(stage, str(tmp_path)))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ranks(2, resumed, str(tmp_path / "a"), on_disk, 5, 3)
    ranks(2, resumed, str(tmp_path / "b"), on_disk, 4, 4, config(stage, 2, "bf16"))
    ranks(2, resumed, str(tmp_path / "b"), config(stage, 2, "bf16"), 4, 4, on_disk)


def test_masters_on_disk_are_replaced_where_steps_have_been_committed(ranks, tmp_path):
    given = config(2, 1, "bf16", zero_optimization=disk(2, str(tmp_path)))
    ranks(1, resumed, str(tmp_path / "saved"), given, 4, 4)


def saved(folder: str, given: dict[str, Any], micro: int) -> dict[str, Any]:
    engine = make(given)
    train(engine, 0, micro)
    engine.save_checkpoint(folder)
    found = state(engine)
    engine.destroy()
    return found


def loaded(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    engine = make(given)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    found = state(engine)
    engine.destroy()
    return found


WORLDS = [(1, 2), (2, 1), (2, 3), (3, 4), (4, 1), (8, 3), (3, 8)]


@pytest.mark.parametrize(("one", "other"), WORLDS)
def test_any_world_and_stage_to_any_other(ranks, tmp_path, one, other):
    for i, (from_stage, to_stage) in enumerate([(3, 0), (2, 3), (0, 1), (1, 2)]):
        folder = str(tmp_path / str(i))
        expected = ranks(one, saved, folder, config(from_stage, 1, "bf16"), 3)[0]
        expected.pop("samples")
        for got in ranks(other, loaded, folder, config(to_stage, 1, "bf16")):
            got.pop("samples")
            assert_same(got, expected)


def test_masters_and_states_go_between_dtypes(ranks, tmp_path):
    expected = ranks(2, saved, str(tmp_path), config(2, 1, "bf16"), 3)[0]
    got = ranks(1, loaded, str(tmp_path), config(3))[0]
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and not name.startswith("seen"):
            assert got[name].equal(value), name


def mismatched(folder: str) -> None:
    engine = make(config(2))
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    other = make(config(2, optimizer="sgd"))
    before = state(other)
    with pytest.raises(MismatchedCheckpoint, match="SGD keeps momentum_buffer.*AdamW there has exp_avg"):
        other.load_checkpoint(folder)
    assert_same(state(other), before)
    with said() as lines:
        other.load_checkpoint(folder, load_module_strict=False)
    assert any("loaded what fits" in line for line in lines)
    masters = {n: v for n, v in state(engine).items() if n in dict(engine.module.named_parameters())}
    assert all(state(other)[n].equal(v) for n, v in masters.items())


def test_another_optimizer_is_refused_or_loaded_as_far_as_it_fits(ranks, tmp_path):
    ranks(2, mismatched, str(tmp_path))
