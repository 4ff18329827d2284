"""Engines of small models for these tests, what their logger says, and what they are held to."""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import Net
from torch import Tensor, nn
from torch.nn import functional as F

import tritonspeed as ts

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "zero"))  # lockstep, in a rank's process too

# lockstep's "sgd", linear in the gradient: an error of a gradient shows as an error of its own size
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}}
CLIP = 0.5  # lockstep's


def settings(stage: int = 0, accumulation: int = 1, precision: str | None = None, **more: Any) -> dict[str, Any]:
    """A config: SGD, clipping, everything sharded that the stage shards; keywords add to it or replace blocks."""
    given = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "optimizer": SGD,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if precision in ("bf16", "fp16"):
        given[precision] = {"enabled": True}
    return {**given, **more}


def make(config: dict[str, Any], model: nn.Module | Callable[[], nn.Module] = Net, **given: Any) -> ts.Engine:
    """The engine of ``config``, of a model or of a fresh one, made from the seed that the references use."""
    torch.manual_seed(0)
    return ts.initialize(model=model if isinstance(model, nn.Module) else model(), config=config, **given)[0]


def weights(engine: ts.Engine) -> dict[str, Tensor]:
    """Whole parameters, on every rank."""
    return engine.module_state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return all(one[name].equal(other[name]) for name in one) and list(one) == list(other)


@contextmanager
def said(level: int = logging.INFO) -> Iterator[list[str]]:
    """What the package logs meanwhile (pytest's ``caplog`` does not reach other ranks' processes)."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("tritonspeed")
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class Weight(nn.Module):
    """The loss is weight · input, so the gradient of every micro-step is its input: 3 numbers of the test's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class Both(Net):
    """Returns the loss and the logits it was made of, as Hugging Face's models do."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.hidden(tokens))
        assert targets is not None
        return {"loss": F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten()), "logits": logits}
