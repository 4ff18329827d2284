"""Checkpoints of what is on disk: the files that are there under a second name, whole after any kill."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make, settings
from kills import killing
from models import Net, batch
from torch import nn

import tritonspeed as ts
from tritonspeed.checkpoint import folder as checkpoints
from tritonspeed.checkpoint import stored
from tritonspeed.offload import disk

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2}}
KILLS = 14  # of each of four runs
LAST = 400  # steps that no run comes to


def config(stage: int, path: Path, **checkpoint: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(path)}
    if stage == 3:
        zero["offload_param"] = {"device": "nvme", "nvme_path": str(path), "max_in_cpu": 0}
    given = settings(stage, 1, "bf16", optimizer=ADAMW, zero_optimization=zero)
    return {**given, "checkpoint": checkpoint}


def step(engine: ts.Engine, number: int) -> float:
    loss = engine(*batch(engine.mesh.rank, number))
    engine.backward(loss)
    engine.step()
    return loss.item()


def links(folder: Path, rank: int, world: int) -> dict[str, int]:
    """{file of the checkpoint: its names}"""
    own = folder / f"rank-{rank}-of-{world}"
    return {path.name: path.stat().st_nlink for path in own.glob("*.safetensors") if path.name != "state.safetensors"}


def saved_by_name(root: str, stage: int, in_background: bool) -> None:
    """A save that copies nothing, and steps that leave it alone."""
    path = Path(root)
    engine = make(config(stage, path / "nvme", async_save=in_background))
    rank, world = engine.mesh.rank, engine.mesh.world
    for number in range(2):
        step(engine, number)
    engine.sharded.stepper.late.finish()
    before = [folder.traffic.written_bytes for folder in engine.sharded.homes.folders]
    engine.save_checkpoint(path / "kept")
    engine.wait_for_checkpoint()
    assert before == [folder.traffic.written_bytes for folder in engine.sharded.homes.folders]
    names = links(path / "kept" / "global_step2", rank, world)
    assert set(names.values()) == {2}, names
    kinds = {name.split(".")[-2] for name in names}
    assert {"master", "exp_avg", "exp_avg_sq"} <= kinds
    tier = {p.stat().st_ino for p in (path / "nvme").rglob(f"rank-{rank}-of-{world}/*.safetensors")}
    own = path / "kept" / "global_step2" / f"rank-{rank}-of-{world}"
    assert {p.stat().st_ino for p in own.glob("*.safetensors") if p.name in names} <= tier
    assert not list((path / "nvme").rglob(f"rank-{rank}-of-{world}/.held*"))
    wanted = step(engine, 2)
    step(engine, 3)
    engine.sharded.stepper.late.finish()
    names = links(path / "kept" / "global_step2", rank, world)
    assert set(names.values()) == {1}, "the second step writes to the slots that the checkpoint has"
    engine.destroy()
    engine = make(config(stage, path / "nvme"))
    assert engine.load_checkpoint(path / "kept")[0] == str(path / "kept" / "global_step2")
    assert step(engine, 2) == wanted
    engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_save_gives_names_to_files(ranks, tmp_path, stage, in_background, world):
    (tmp_path / "nvme").mkdir()
    ranks(world, saved_by_name, str(tmp_path), stage, in_background)
    assert stored.verify(tmp_path / "kept" / "global_step2") == 2


class Adapted(nn.Module):
    """A frozen net with one trained layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Net()
        for p in self.base.parameters():
            p.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.base(tokens, targets) * self.scale


def test_frozen_parameters_on_disk_are_not_copied(tmp_path):
    (tmp_path / "nvme").mkdir()
    engine = make(config(3, tmp_path / "nvme", async_save=True), Adapted)
    for number in range(2):
        step(engine, number)
        engine.save_checkpoint(tmp_path / "kept")
    engine.wait_for_checkpoint()
    names = links(tmp_path / "kept" / "global_step2", 0, 1)
    frozen = {name: number for name, number in names.items() if ".parameters." in name}
    assert len(frozen) > 3 and set(frozen.values()) == {3}, "two checkpoints and the run have one file"
    wanted = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    engine = make(config(3, tmp_path / "nvme"), Adapted)
    with torch.no_grad(), ts.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        for p in engine.module.parameters():
            p.add_(1)
    for tag in ("global_step1", "global_step2"):
        assert stored.verify(tmp_path / "kept" / tag) == int(tag[-1])
    engine.load_checkpoint(tmp_path / "kept")
    assert all(value.equal(wanted[name]) for name, value in engine.module_state_dict().items())
    engine.destroy()


@pytest.mark.parametrize("in_background", [False, True])
def test_what_cannot_be_linked_is_copied_under_the_next_steps(tmp_path, monkeypatch, in_background):
    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    (tmp_path / "nvme").mkdir()
    engine = make(config(3, tmp_path / "nvme", async_save=in_background))
    step(engine, 0)
    monkeypatch.setattr(os, "link", refuse)
    engine.save_checkpoint(tmp_path / "kept")
    wanted = [step(engine, number) for number in range(1, 5)]
    engine.destroy()
    assert stored.verify(tmp_path / "kept" / "global_step1") == 1
    assert set(links(tmp_path / "kept" / "global_step1", 0, 1).values()) == {1}
    engine = make(config(3, tmp_path / "nvme"))
    engine.load_checkpoint(tmp_path / "kept")
    assert [step(engine, number) for number in range(1, 5)] == wanted
    engine.destroy()


def train(path: str, acknowledge: Callable[[int], Any], last: int | None) -> None:
    """Go on from the newest checkpoint, save after every step, until killed; ``last`` kills itself there."""
    root = Path(path)
    run = json.loads((root / "run.json").read_text())
    acknowledge(0)
    engine = make(config(run["stage"], root / "nvme", async_save=run["in_background"], keep_last=2))
    torch.manual_seed(1)
    acknowledge(0)
    engine.load_checkpoint(root / "kept")
    losses = os.open(root / "losses", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    acknowledge(0)
    for number in range(engine.global_steps, LAST):
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(losses, f"{number} {step(engine, number).hex()}\n".encode())
        engine.save_checkpoint(root / "kept")  # where it goes on in a thread, the one before is committed
        acknowledge(max(0, engine.global_steps - run["in_background"]))


def prepare() -> None:
    """What is imported late: 2 s of every run."""
    make(settings(1, 1, "bf16", optimizer=ADAMW)).destroy()


def losses(root: Path) -> list[tuple[int, str]]:
    lines = (root / "losses").read_text().splitlines()
    return [(int(number), loss) for number, loss in (line.split() for line in lines)]


@pytest.fixture(scope="module")
def kill():
    with killing(train, prepare) as kill:
        yield kill


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_again_and_again_it_goes_on_with_the_same_bits(tmp_path, kill, stage, in_background):
    """Whole runs are killed at random moments; each goes on from the newest checkpoint, in the same folder on disk."""
    pick, acknowledged = random.Random(stage + in_background), 0
    killed_run, whole_run = tmp_path / "killed", tmp_path / "whole"
    for root in (killed_run, whole_run):
        (root / "nvme").mkdir(parents=True)
        (root / "run.json").write_text(json.dumps({"stage": stage, "in_background": in_background}))
    for _ in range(KILLS):
        told = kill(killed_run, None, pick.uniform(0, 0.1), num_told=pick.choice((1, 2, 3, 4, 5, 6)))
        acknowledged = max(acknowledged, told)
        found = checkpoints.committed(killed_run / "kept") if (killed_run / "kept").exists() else []
        assert acknowledged <= max([made.step for _, made in found], default=0)
        for path, made in found:
            assert stored.verify(path) == made.step
        own = killed_run / "nvme" / "tritonspeed" / "rank-0-of-1"
        if (own / "committed.json").exists():
            disk.verify(own)
    steps = losses(killed_run)
    last = max(number for number, _ in steps)
    kill(whole_run, last + 1)
    wanted = dict(losses(whole_run))
    assert len(wanted) == last + 1 > 3
    for number, loss in steps:
        assert loss == wanted[number], f"step {number}"
    assert len(steps) > len(wanted), "no step was taken twice: no kill came between a step and its save"
