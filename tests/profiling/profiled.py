"""Small engines for these tests, a clock that tests turn by hand, and what the log says."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from models import Net, batch
from torch import Tensor, nn

import tritonspeed as ts
from tritonspeed.comm import Span, spans
from tritonspeed.profiling import watch

DEPTH = 3  # Net's blocks


def settings(stage: int, accumulation: int = 1, tier: str = "", folder: str = "", **more: Any) -> dict[str, Any]:
    """A config in which stage 3 gathers every unit twice per micro-step: nothing persists, nothing is kept."""
    zero: dict[str, Any] = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,
    }
    if tier:
        zero["offload_optimizer"] = {"device": tier, **({"nvme_path": folder} if folder else {})}
        if stage == 3:
            zero["offload_param"] = dict(zero["offload_optimizer"])
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        **more,
    }


def make(config: dict[str, Any], model: nn.Module | None = None) -> ts.Engine:
    torch.manual_seed(0)
    return ts.initialize(model=model or Net(), config=config)[0]


def train(engine: ts.Engine, num_steps: int, accumulation: int = 1, first: int = 0) -> list[Any]:
    """The steps' reports."""
    reports = []
    for number in range(first, first + num_steps):
        for micro in range(accumulation):
            loss = engine(*batch(engine.mesh.rank, accumulation * number + micro))
            engine.backward(loss)
            engine.step()
        reports.append(engine.last_step)
    return reports


@contextmanager
def heard(engine: ts.Engine) -> Iterator[list[Span]]:
    """Every span that ends meanwhile."""
    found: list[Span] = []
    listener = found.append
    engine.mesh.spans.listen(listener, engine.mesh.device)
    try:
        yield found
    finally:
        engine.mesh.spans.leave(listener)


@contextmanager
def said() -> Iterator[list[str]]:
    """What the package logs meanwhile, in ranks' processes too."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("tritonspeed")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class Clock:
    """A clock that only ``pass_`` moves."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = 100.0
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        for module in (spans, watch):
            monkeypatch.setattr(module, "time", fake)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Slow(nn.Module):
    """A linear layer whose forward and backward take a known time."""

    def __init__(self, clock: Clock, forward_s: float, backward_s: float, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.clock, self.forward_s, self.backward_s = clock, forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        self.clock.pass_(self.forward_s)
        y = self.linear(x)
        return _Late.apply(y, self.clock, self.backward_s)


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.pass_(ctx.seconds)
        return gradient, None, None


def counts(found: list[Span]) -> Counter[tuple[str, str]]:
    """(kind, name) → how many."""
    return Counter((span.kind, span.name) for span in found)
