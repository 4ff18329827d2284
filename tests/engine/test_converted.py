"""A checkpoint that was converted is the checkpoint: training goes on from it with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from engines import make, settings
from test_checkpoint import OPTIMIZERS, assert_same, config, state, train

from tritonspeed.checkpoint.convert import convert


def resumed(folder: str, given: dict[str, Any], micro: int) -> None:
    """Train, save, train on; convert, load into a fresh engine, train on: the same bits."""
    engine = make(given)
    train(engine, 0, micro)
    engine.save_checkpoint(f"{folder}/a")
    expected = train(engine, micro, micro + 3), state(engine)
    engine.destroy()
    convert(f"{folder}/a", f"{folder}/b/t")
    other = make(given)
    path, _ = other.load_checkpoint(f"{folder}/b")
    assert path == f"{folder}/b/t"
    got = train(other, micro, micro + 3), state(other)
    assert got[0] == expected[0]
    assert_same(got[1], expected[1])
    other.destroy()


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(1, "adamw"), (3, "8bit"), (1, "bf16 states"), (3, "rounded"), (3, "muon"), (2, "sgd")]
)
def test_ours_of_one_rank(ranks: Any, tmp_path: Path, stage: int, optimizer: str) -> None:
    ranks(1, resumed, str(tmp_path), config(stage, 1, "bf16", optimizer), 3)


@pytest.mark.parametrize(("stage", "precision"), [(0, None), (2, "fp16")])
def test_in_the_middle_of_an_accumulation(ranks: Any, tmp_path: Path, stage: int, precision: str | None) -> None:
    ranks(1, resumed, str(tmp_path), config(stage, 3, precision), 5)


def of_two(folder: str, given: dict[str, Any]) -> None:
    """Two ranks' checkpoint, converted by rank 0, loaded by both."""
    engine = make(given)
    train(engine, 0, 5)
    engine.save_checkpoint(f"{folder}/a")
    expected = state(engine)
    engine.destroy()
    if dist.get_rank() == 0:
        convert(f"{folder}/a", f"{folder}/b/t")
        convert(f"{folder}/a", f"{folder}/u/t", to="universal")
        convert(f"{folder}/u", f"{folder}/c/t")
    dist.barrier()
    for place in ("b", "c"):
        other = make(given)
        train(other, 7, 9)
        other.load_checkpoint(f"{folder}/{place}")
        assert_same(state(other), expected)
        other.destroy()


@pytest.mark.parametrize(("stage", "precision"), [(1, None), (3, "bf16"), (2, "fp16")])
def test_ours_of_two_ranks_through_universal_too(ranks: Any, tmp_path: Path, stage: int, precision: str | None) -> None:
    ranks(2, of_two, str(tmp_path), config(stage, 1, precision))


def test_weights_alone(tmp_path: Path) -> None:
    """To plain weights and back: parameters, in the dtype that modules compute with, and none of the rest."""
    given = settings(3, 1, "bf16", optimizer=OPTIMIZERS["adamw"])
    engine = make(given)
    train(engine, 0, 3)
    engine.save_checkpoint(tmp_path / "a")
    wanted = engine.module_state_dict()
    engine.destroy()
    convert(tmp_path / "a", tmp_path / "w", to="huggingface")
    convert(tmp_path / "w", tmp_path / "b" / "t")
    other = make(given)
    other.load_checkpoint(tmp_path / "b", load_optimizer_states=False)
    found = other.module_state_dict()
    assert all(found[name].equal(value) for name, value in wanted.items()) and other.global_steps == 0
    other.destroy()
