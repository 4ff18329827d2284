"""A gradient that is not finite on one rank: every rank skips, says so with the first parameter, and goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import Weight, make, said, same, settings, weights
from models import batch

CULPRIT = "blocks.1.up.weight"
FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 4}
# step by step: (does it overflow, the scale after it) as DeepSpeed's automaton has it from these settings
COURSE = [(False, 16), (True, 16), (True, 8), (True, 4), (True, 4), (False, 4), (False, 4), (False, 8), (False, 8)]


def poisoned(engine: Any, rank: int, value: float = math.inf) -> dict[str, bool]:
    """A switch that makes one gradient of ``rank`` not finite."""
    switch = {"on": False}
    parameter = dict(engine.module.named_parameters())[CULPRIT]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * value if switch["on"] and dist.get_rank() == rank else gradient

    parameter.register_hook(poison)
    return switch


def course(stage: int, accumulation: int) -> list[dict[str, Any]]:
    calls: list[int] = []

    class Schedule:
        def step(self) -> None:
            calls.append(1)

    engine = make(settings(stage, accumulation, fp16=FP16), lr_scheduler=Schedule())
    switch, seen = poisoned(engine, rank=1), []
    micro = 0
    for overflows, _ in COURSE:
        before = weights(engine)
        with said() as lines:
            for last in range(accumulation):
                switch["on"] = overflows and last == 0  # an accumulation is lost by its first micro-step too
                engine.backward(engine(*batch(dist.get_rank(), micro)))
                engine.step()
                micro += 1
        report = engine.last_step
        assert report is not None
        seen.append(
            {
                "scale used": report.loss_scale,
                "scale": engine.loss_scale(),
                "skipped": report.skipped,
                "overflow": engine.optimizer.overflow,
                "applied": engine.was_step_applied(),
                "reason": report.skipped_reason,
                "norm": report.grad_norm,
                "moved": not same(before, weights(engine)),
                "counts": (engine.global_steps, engine.skipped_steps, len(calls)),
                "said": lines,
            }
        )
    return seen


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 1)])
def test_fp16_follows_deepspeeds_automaton(ranks, stage, accumulation):
    by_rank = ranks(2, course, stage, accumulation)
    for rank, seen in enumerate(by_rank):
        skipped = 0
        scale_before = 16
        for number, (facts, (overflows, scale)) in enumerate(zip(seen, COURSE, strict=True), 1):
            told = f"rank {rank}, step {number}"
            skipped += overflows
            assert (facts["scale used"], facts["scale"]) == (scale_before, scale), told
            assert facts["skipped"] == facts["overflow"] == overflows, told
            assert facts["applied"] == facts["moved"] == (not overflows), told
            assert facts["counts"] == (number, skipped, number - skipped), told
            assert math.isfinite(facts["norm"]) == (not overflows), told
            assert (facts["reason"] is not None) == overflows, told
            if overflows:
                assert CULPRIT in facts["reason"], told
            warned = [line for line in facts["said"] if "not finite" in line]
            assert len(warned) == (overflows and rank == 0), (told, facts["said"])
            scale_before = scale
    reasons = [facts["reason"] for facts in by_rank[0]]
    assert "loss scale 16 kept" in reasons[1]
    assert "loss scale 16 → 8" in reasons[2]
    assert "already fp16.min_loss_scale" in reasons[4] and "4 step(s) in a row" in reasons[4] and "bf16" in reasons[4]
    assert reasons == [facts["reason"] for facts in by_rank[1]]


def two_steps(more: dict[str, Any], value: float) -> list[Any]:
    engine = make(settings(2, **more))
    switch, seen = poisoned(engine, 0, value), []
    with said() as lines:
        for step in range(2):
            switch["on"] = step == 0
            engine.backward(engine(*batch(dist.get_rank(), step)))
            engine.step()
            finite = {name: bool(value.isfinite().all()) for name, value in weights(engine).items()}
            assert engine.last_step is not None
            seen.append((engine.was_step_applied(), engine.last_step.skipped_reason, finite, engine.loss_scale()))
    return [seen, lines]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_fixed_loss_scale_stays(ranks, value):
    for seen, _ in ranks(2, two_steps, {"fp16": {"enabled": True, "loss_scale": 128}}, value):
        (applied, reason, finite, scale), (next_applied, _, next_finite, _) = seen
        assert not applied and all(finite.values()) and scale == 128
        assert CULPRIT in reason and "loss scale 128 is fixed" in reason
        assert next_applied and all(next_finite.values())


@pytest.mark.parametrize("more", [{"bf16": {"enabled": True}}, {}], ids=["bf16", "fp32"])
def test_bf16_and_fp32_skip_and_say_why(ranks, more):
    for rank, (seen, lines) in enumerate(ranks(2, two_steps, more, math.nan)):
        (applied, reason, finite, scale), (next_applied, next_reason, next_finite, _) = seen
        assert not applied and all(finite.values()) and scale == 1.0
        assert f"first in '{CULPRIT}'" in reason and "loss scale" not in reason
        assert next_applied and next_reason is None and all(next_finite.values())
        assert len([line for line in lines if CULPRIT in line]) == (rank == 0)


def test_bf16_unchecked_updates_anyway_and_says_so(ranks):
    """DeepSpeed's meaning of check_grad_overflow false: the update happens; here it is told, not silent."""
    more = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    for rank, (seen, lines) in enumerate(ranks(2, two_steps, more, math.inf)):
        applied, reason, finite, _ = seen[0]
        assert applied and not finite[CULPRIT]
        assert sum(not good for good in finite.values()) == 1  # only what the gradient was of
        assert CULPRIT in reason and "check_grad_overflow" in reason
        assert len([line for line in lines if CULPRIT in line]) >= (rank == 0)


def test_the_scale_does_not_show_in_what_is_reported():
    """Gradient norm, clipping and full gradients are of the unscaled loss."""
    import tritonspeed as ts

    engine = make(settings(0, fp16={"enabled": True, "loss_scale": 64}, gradient_clipping=1.0), Weight)
    engine.backward(engine(torch.tensor([2.0, 3.0, 6.0]).half()))
    assert ts.zero.safe_get_full_grad(engine.module.weight).tolist() == [2.0, 3.0, 6.0]
    assert engine.get_full_grad(engine.module.weight).tolist() == [2.0, 3.0, 6.0]
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(7.0)
    assert engine.last_step.loss == pytest.approx(11.0)
    assert engine.last_step.loss_scale == engine.cur_scale == 64 and not engine.dynamic_loss_scale()
