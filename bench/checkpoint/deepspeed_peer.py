"""DeepSpeed's `save_checkpoint`: ZeRO-2 in bf16, its default writer, torch.save.

Its FastPersist writer needs an accelerator: in 0.19.8 without one, pinning its buffer fails ("Cannot access accelerator
device"), and with its native way to pin the next step does ("This op had not been implemented on CPU backend").
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from bench.checkpoint.state import Size, Stack

TAG = "step"
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


class DeepSpeed:
    """An engine."""

    synced, is_durable = "no", False

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG)

    def finish(self) -> None: ...

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing of {folder}")

    def _tensors(self) -> list[Tensor]:
        found = [p.data for p in self.engine.module.parameters()]
        for group in self.engine.optimizer.optimizer.param_groups:
            for master in group["params"]:
                state = self.engine.optimizer.optimizer.state[master]
                found += [master.data, state["exp_avg"], state["exp_avg_sq"]]
        return found

    def fill(self, value: float) -> None:
        for tensor in self._tensors():
            tensor.fill_(value)

    def held(self) -> tuple[float, float]:
        bounds = [tensor.aminmax() for tensor in self._tensors()]
        return min(low.item() for low, _ in bounds), max(high.item() for _, high in bounds)


def make(size: Size, folder: Path) -> dict[str, DeepSpeed]:
    """The system, after one step, which makes the moments."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.manual_seed(0)
    model = Stack(size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    engine.backward(engine(torch.randn(2, size.width).bfloat16()))
    engine.step()
    return {"DeepSpeed": DeepSpeed(engine)}
