"""Bytes of a checkpoint: the estimate, and the files."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "engine"))

from engines import make, settings
from models import Net, batch

import tritonspeed as ts

OPTIMIZERS = [
    ("AdamW", {"lr": 1e-2}),
    ("AdamW", {"lr": 1e-2, "state": "8bit"}),
    ("AdamW", {"lr": 1e-2, "state": "bf16", "stochastic_rounding": True}),
    ("Lion", {"lr": 1e-3}),
    ("SGD", {"lr": 0.1}),
]


def frozen() -> Net:
    net = Net(width=45)
    net.embed.weight.requires_grad_(False)
    return net


def saved(folder: str, given: dict) -> None:
    engine = make(given, frozen)
    engine.backward(engine(*batch(0, 0)))
    engine.step()
    engine.save_checkpoint(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_has_the_bytes_that_were_estimated(ranks, tmp_path, stage, world):
    for number, (name, params) in enumerate(OPTIMIZERS):
        given = settings(stage, 1, "bf16", optimizer={"type": name, "params": params})
        ranks(world, saved, str(tmp_path / str(number)), given)
        flats = []
        for index in (tmp_path / str(number) / "global_step1").glob("rank-*/index.json"):
            digests = [file["digests"][-1][1] for file in json.loads(index.read_text())["files"]]
            flats.append(sum(digests))
        found = ts.estimate(frozen(), given, world, device="cpu")
        assert (found.checkpoint_bytes, found.snapshot_bytes) == (sum(flats), max(flats)), name
        assert "a checkpoint:" in str(found)
