"""What step() counts, where an accumulation ends, and who decides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import Weight, make, same, settings, weights
from lockstep import plain_training
from models import batch

STEPS = 2


def x(value: float) -> torch.Tensor:
    return torch.full((3,), value)


def counted() -> tuple:
    engine = make(settings(2, 3))
    seen = [(engine.was_step_applied(), engine.get_global_grad_norm(), engine.last_step)]
    for micro in range(7):
        engine.backward(engine(*batch(dist.get_rank(), micro)))
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        seen.append(
            (boundary, engine.micro_steps, engine.global_steps, engine.global_samples, engine.was_step_applied())
        )
    return seen, engine.skipped_steps, engine.train_batch_size(), engine.get_batch_info()


def test_counters(ranks):
    """Micro-steps count every call, steps and samples every boundary; a call between boundaries applies nothing."""
    for seen, skipped, size, info in ranks(2, counted):
        assert size == 2 * 3 * 2 and info == (12, 2, 3) and skipped == 0
        assert seen[0] == (False, None, None)
        assert seen[1:] == [
            (False, 1, 0, 0, False),
            (False, 2, 0, 0, False),
            (True, 3, 1, 12, True),
            (False, 4, 1, 12, False),
            (False, 5, 1, 12, False),
            (True, 6, 2, 24, True),
            (False, 7, 2, 24, False),
        ]


def by_count(engine: Any, step: int) -> None:
    for micro in range(3):
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)))
        engine.step()


def by_the_optimizer(engine: Any, step: int) -> None:
    """As Lightning's Fabric does."""
    for micro in range(3):
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)))
        engine.optimizer.step()
    assert (engine.global_steps, engine.micro_steps) == (step + 1, 3 * (step + 1))


def as_accelerate_does(engine: Any, step: int) -> None:
    """The boundary is said before each backward; step() is called on it alone."""
    for micro in range(3):
        engine.set_gradient_accumulation_boundary(is_boundary=micro == 2)
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)) / 3, scale_wrt_gas=False)
        if micro == 2:
            engine.step()
    assert engine.micro_steps == step + 1  # as DeepSpeed: calls of step()


def boundary_said_step_always(engine: Any, step: int) -> None:
    for micro in range(3):
        engine.set_gradient_accumulation_boundary(micro == 2)
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)))
        engine.step()


def no_sync(engine: Any, step: int) -> None:
    with engine.no_sync():
        for micro in range(2):
            engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)))
    engine.micro_steps += 2
    engine.backward(engine(*batch(dist.get_rank(), 3 * step + 2)))
    engine.set_gradient_accumulation_boundary(True)
    engine.step()


def step_inside_no_sync(engine: Any, step: int) -> None:
    with engine.no_sync():
        by_count(engine, step)


def unmanaged(engine: Any, step: int) -> None:
    """Three backwards, one step(): it is the boundary, whatever was counted."""
    for micro in range(3):
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)))
    assert engine.is_gradient_accumulation_boundary()
    engine.step()


def unsaid(engine: Any, step: int) -> None:
    """A config without accumulation, and a caller who says where it ends."""
    for micro in range(3):
        engine.set_gradient_accumulation_boundary(micro == 2)
        engine.backward(engine(*batch(dist.get_rank(), 3 * step + micro)) / 3)
    engine.step()


WAYS = {
    by_count: {},
    by_the_optimizer: {},
    as_accelerate_does: {},
    boundary_said_step_always: {},
    no_sync: {},
    step_inside_no_sync: {},
    unmanaged: {"managed_gradient_accumulation": False},
    unsaid: {"gradient_accumulation_steps": 1},
}


def every_way(stage: int, precision: str) -> dict[str, tuple]:
    found = {}
    for way, more in WAYS.items():
        if "no_sync" in way.__name__ and stage > 1:
            continue
        engine = make(settings(stage, 3, precision, **more))
        for step in range(STEPS):
            way(engine, step)
            assert engine.global_steps == step + 1 and engine.was_step_applied(), way.__name__
        samples = engine.global_samples
        assert samples == (STEPS * 3 if way is not unsaid else STEPS) * 2 * 2, (way.__name__, samples)
        found[way.__name__] = (engine.get_global_grad_norm(), weights(engine))
        engine.destroy()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_every_boundary_gives_the_same_training(ranks, stage, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    rtol = {"fp32": 1e-6, "bf16": 1e-3}[precision]
    _, norms, masters = plain_training(2, STEPS, 3, dtype, optimizer="sgd")
    for found in ranks(2, every_way, stage, precision):
        norm, first = found["by_count"]
        for name, want in masters.items():
            torch.testing.assert_close(first[name].float(), want, rtol=torch.finfo(dtype).eps, atol=2 * rtol, msg=name)
        for way, (got_norm, got) in found.items():
            assert got_norm == pytest.approx(norms[-1], rel=20 * rtol), way
            if way in ("boundary_said_step_always", "no_sync", "step_inside_no_sync"):
                assert got_norm == norm and same(first, got), way
            for name, want in first.items():
                torch.testing.assert_close(got[name], want, rtol=torch.finfo(dtype).eps, atol=2 * rtol, msg=way)


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sync_is_refused_where_gradients_are_sharded(stage):
    engine = make(settings(stage))
    with pytest.raises(ValueError, match=f"no_sync\\(\\) at ZeRO stage {stage}"), engine.no_sync():
        pass


def test_the_batch_grows_by_accumulation():
    """set_train_batch_size keeps the micro batch; what is being trained follows at once."""
    engine = make(settings(1, 1, gradient_clipping=0), Weight)
    engine.set_train_batch_size(6)
    assert engine.get_batch_info() == (6, 2, 3)
    for value in (1.0, 2.0, 6.0):
        engine.backward(engine(x(value)))
        engine.step()
    assert (engine.global_steps, engine.global_samples) == (1, 6)
    assert engine.get_global_grad_norm() == pytest.approx(3 * 3**0.5)
    engine.set_train_micro_batch_size(5)
    assert engine.get_batch_info() == (15, 5, 3)


def test_the_caller_who_decides_alone_is_counted_by_backwards():
    """managed_gradient_accumulation false: a step takes as many samples as there were backwards."""
    engine = make(settings(2, managed_gradient_accumulation=False, gradient_clipping=0), Weight)
    for num_backwards, samples in ((3, 6), (1, 8)):
        for _ in range(num_backwards):
            engine.backward(engine(x(1.0)))
        engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(num_backwards * 3**0.5)
        assert engine.global_samples == samples


def collectives(stage: int) -> list[int]:
    """How many each of two accumulating micro-steps, one under no_sync, and one at the boundary issue."""
    engine = make(settings(stage, 3))
    counts = []

    def count(micro: int) -> None:
        before = engine.mesh.flight.seq
        engine.backward(engine(*batch(dist.get_rank(), micro)))
        counts.append(engine.mesh.flight.seq - before)
        if len(counts) != 3:
            engine.step()

    count(0)
    count(1)
    if stage < 2:
        with engine.no_sync():
            count(2)
    count(3)
    return counts


@pytest.mark.parametrize("stage", range(3))
def test_stages_0_and_1_send_gradients_at_the_boundary_alone(ranks, stage):
    num_buckets = 4
    want = [0, 0, 0, num_buckets] if stage < 2 else [num_buckets] * 3
    assert ranks(2, collectives, stage) == [want, want]


@pytest.mark.parametrize("size", [0, 1, 3, -4])
def test_a_batch_that_does_not_divide_is_refused(size):
    engine = make(settings(0))
    with pytest.raises(ValueError, match=f"train_batch_size {size} .*micro batch 2 × world 1 = 2"):
        engine.set_train_batch_size(size)
    assert engine.train_batch_size() == 2


def test_step_without_a_backward_changes_nothing_but_the_count():
    engine = make(settings(3))
    before = weights(engine)
    engine.step()
    assert engine.global_steps == 1 and same(before, weights(engine))


def test_zero_grad_drops_what_was_accumulated():
    engine = make(settings(2, 2, gradient_clipping=0), Weight)
    engine.backward(engine(x(100.0)))
    engine.step()
    engine.zero_grad()
    engine.backward(engine(x(4.0)))
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(2 * 3**0.5)
    engine.zero_grad()  # Hugging Face's Trainer does, after the step: the norm must outlive it
    assert engine.get_global_grad_norm() == pytest.approx(2 * 3**0.5)


def test_the_schedule_moves_with_steps_not_with_micro_steps():
    engine = make(
        settings(0, 2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )
    lrs = []
    for micro in range(6):
        engine.backward(engine(*batch(0, micro)))
        engine.step()
        lrs += engine.get_lr()
    assert lrs == pytest.approx([0.1, 0.05, 0.05, 0.1 / 3, 0.1 / 3, 0.025])
    assert engine.last_step.lr == pytest.approx([0.1 / 3])  # of the step, not after it


def test_arguments_of_step_reach_the_schedule():
    seen: list[float] = []

    class Plateau:
        def step(self, metrics: float) -> None:
            seen.append(metrics)

    engine = make(settings(0), lr_scheduler=Plateau())
    engine.backward(engine(*batch(0, 0)))
    engine.step(lr_kwargs={"metrics": 0.5})
    assert seen == [0.5]
