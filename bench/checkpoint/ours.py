"""Ours: `save_checkpoint` blocking and behind training's back, and from the disk tier, whose files are linked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tritonspeed as ts
from bench.checkpoint.state import Size, Stack
from tritonspeed.checkpoint.collect import collect
from tritonspeed.checkpoint.restore import Wanted, fill, fit, publish

TAG = "step"
NAMES = {"ours": "ours", "ours-async": "ours async", "ours-disk": "ours, disk tier (links)"}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "zero_optimization": {"stage": 2},
}


class Everywhere:
    """A source that has one number for every parameter and every tensor of the optimizer."""

    path, facts = Path("everywhere"), SimpleNamespace(optimizer="AdamW")

    def __init__(self, parameters: Mapping[str, Any], value: float) -> None:
        self.parameters, self.value = parameters, value

    def kinds(self, name: str) -> frozenset[str]:
        return frozenset(("master", "exp_avg", "exp_avg_sq"))

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        return torch.full((hi - lo,), self.value)

    def scalars(self, name: str) -> dict[str, float]:
        return {"step": 1.0}


class Ours:
    """An engine."""

    synced, is_durable = "files and folders, then one rename", True

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(folder, tag=TAG)

    def finish(self) -> None:
        self.engine.wait_for_checkpoint()

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(folder, tag=TAG)
        if path is None:
            raise RuntimeError(f"nothing was loaded of {folder}")

    def fill(self, value: float) -> None:
        sharded, wanted = self.engine.sharded, Wanted()
        source: Any = Everywhere(collect(sharded).parameters, value)
        fill(sharded, source, fit(sharded, source, wanted), wanted)
        publish(sharded)

    def held(self) -> tuple[float, float]:
        lows, highs = [], []
        for record in collect(self.engine.sharded).records:
            for piece in record.file.pieces:  # what lies between them is nobody's
                low, high = record.read(piece.start, piece.start + piece.numel).aminmax()
                lows.append(low.item())
                highs.append(high.item())
        return min(lows), max(highs)


def make(size: Size, folder: Path) -> dict[str, Ours]:
    """The system that the folder is named after, after one step, which makes the moments."""
    torch.manual_seed(0)
    config = CONFIG
    if folder.name == "ours-disk":
        offload = {"device": "nvme", "nvme_path": str(folder)}
        config = CONFIG | {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}
    if folder.name == "ours-async":
        config = CONFIG | {"checkpoint": {"async_save": True}}
    engine, *_ = ts.initialize(model=Stack(size), config=config)
    engine.backward(engine(torch.randn(2, size.width).bfloat16()))
    engine.step()
    return {NAMES[folder.name]: Ours(engine)}
