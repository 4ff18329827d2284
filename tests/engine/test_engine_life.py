"""Engines without an optimizer, several at once, after a failure, and after their end."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import make, said, same, settings, weights
from models import Net, batch
from torch import Tensor

import tritonspeed as ts


def for_inference(stage: int, precision: str | None = None) -> dict[str, Any]:
    return {k: v for k, v in settings(stage, precision=precision).items() if k != "optimizer"}


def train(engine: ts.Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(*batch(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


# without an optimizer


def infer(stage: int) -> tuple[bool, list[str], bool, bool]:
    """(outputs are the plain model's, errors of training calls, freed afterwards, outputs in eval are again)."""
    torch.manual_seed(0)
    plain = Net()
    engine = ts.initialize(model=make_net(), model_parameters=[], config=for_inference(stage))[0]
    tokens, targets = batch(dist.get_rank(), 0)
    equal = engine(tokens).equal(plain(tokens))
    engine.eval()
    with torch.no_grad():
        equal_in_eval = engine(tokens).equal(plain(tokens)) and engine(tokens, targets).equal(plain(tokens, targets))
    errors = []
    for call in (lambda: engine.backward(engine(tokens, targets)), engine.step):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    freed = all(b.state.value == "sharded" for b in engine.sharded.buckets) if stage == 3 else True
    return equal, errors, freed, equal_in_eval


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_optimizer_infers(ranks, stage):
    for equal, errors, freed, equal_in_eval in ranks(2, infer, stage):
        assert equal and equal_in_eval and freed
        assert len(errors) == 2
        for call, text in zip(("backward", "step"), errors, strict=True):
            assert f"engine.{call}() needs an optimizer" in text and '"optimizer" block' in text


def test_what_an_engine_without_optimizer_answers():
    engine = make(for_inference(3, "fp16"), lr_scheduler=lambda optimizer: optimizer.param_groups)
    assert isinstance(engine.optimizer, ts.zero.ParameterOffload) and engine.lr_scheduler is None
    assert engine.get_lr() == engine.get_mom() == engine.get_type() == []
    assert engine.loss_scale() == 1.0 and not engine.dynamic_loss_scale()
    assert engine.get_global_grad_norm() is None and not engine.was_step_applied()
    assert engine.memory()["optimizer"] == engine.memory()["gradients"] == 0
    engine.zero_grad()


# several in one process

CONFIGS = (("bf16", 2), (None, 0), ("bf16", 3), (None, 3))


def alone() -> list[tuple[list[float], dict[str, Tensor]]]:
    found = []
    for precision, stage in CONFIGS:
        engine = make(settings(stage, precision=precision), lambda w=11 + stage: Net(width=w))
        found.append((train(engine, range(4)), weights(engine)))
    return found


def alternately() -> list[tuple[list[float], dict[str, Tensor]]]:
    """Every engine takes a step in turn; one more infers in between; then all backwards after all forwards."""
    engines = [make(settings(s, precision=p), lambda w=11 + s: Net(width=w)) for p, s in CONFIGS]
    judge = make(for_inference(3))
    losses: list[list[float]] = [[] for _ in engines]
    for step in range(3):
        for engine, found in zip(engines, losses, strict=True):
            found += train(engine, range(step, step + 1))
            with torch.no_grad():
                judge(batch(0, step)[0])
    pending = [engine(*batch(engine.global_rank, 3)) for engine in engines]
    for engine, loss, found in zip(engines, pending, losses, strict=True):
        engine.backward(loss)
        found.append(loss.item())
    for engine in engines:
        engine.step()
    return list(zip(losses, [weights(engine) for engine in engines], strict=True))


def test_engines_trained_alternately_are_what_each_is_alone(ranks):
    for one, other in zip(ranks(2, alone), ranks(2, alternately), strict=True):
        for (losses, want), (got_losses, got) in zip(one, other, strict=True):
            assert got_losses == losses and same(want, got)


# after a failure


class Boom(RuntimeError):
    pass


def interrupted(stage: int, accumulation: int) -> tuple[dict, dict, list[str], tuple]:
    """The same steps, undisturbed and with a failure before each: in forward, in backward, between two micro-steps."""
    found = []
    lines: list[str] = []
    for failing in (False, True):
        engine = make(settings(stage, accumulation))
        for step in range(4):
            if failing:
                with said() as told:
                    fail(engine, step)
                lines += told
            for micro in range(accumulation):
                engine.backward(engine(*batch(dist.get_rank(), step * accumulation + micro)))
                engine.step()
        found.append(weights(engine))
        counts = (engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples)
    return found[0], found[1], lines, counts


def fail(engine: Any, step: int) -> None:
    """Raise in forward (even steps) or in the middle of a step's last backward (odd steps)."""
    block = engine.module.blocks[1]

    def boom(*_: Any) -> None:
        raise Boom

    data = batch(dist.get_rank(), 1000 + step)
    if step % 2 == 0:
        handle = block.mix.register_forward_hook(boom)
        with pytest.raises(Boom):
            engine(*data)
    else:
        for _ in range(engine.gradient_accumulation_steps() - 1):
            engine.backward(engine(*data))
            engine.step()
        handle = block.mix.weight.register_hook(boom)
        with pytest.raises(Boom):
            engine.backward(engine(*data))
    handle.remove()


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 2), (1, 1), (2, 2), (3, 1), (3, 2)])
def test_a_failure_leaves_nothing_behind(ranks, stage, accumulation):
    for want, got, lines, counts in ranks(2, interrupted, stage, accumulation):
        assert same(want, got)
        assert counts == (4, 4 * accumulation, 0, 4 * accumulation * 4)
        assert all("the last backward did not finish" in line for line in lines)


def test_an_error_names_the_user_mistake_and_training_goes_on():
    engine = make(settings(3))
    with pytest.raises(IndexError):
        engine(torch.full((2, 7), 999))
    assert len(train(engine, range(2))) == 2 and engine.global_steps == 2


# after the end


def destroyed(stage: int, precision: str | None) -> tuple[dict, dict, dict, int]:
    model = make_net()
    engine = make(settings(stage, precision=precision), model)
    train(engine, range(2))
    trained = weights(engine)
    engine.destroy()
    now = {n: p.detach().clone() for n, p in model.named_parameters()}
    # an ordinary model again: gradients in .grad, any optimizer
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)  # moves every element, rounded to bf16 too
    model(*batch(0, 7)).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    moved = sum(not p.equal(now[n]) for n, p in model.named_parameters())
    # and one that may be given to an engine again
    again = make(settings(3 - stage), model)
    kept = {n: p.detach().clone() for n, p in trained.items()}
    train(again, range(1))
    return trained, now, kept, moved


@pytest.mark.parametrize(("stage", "precision"), [(0, None), (1, "bf16"), (2, None), (3, "bf16"), (3, None)])
def test_the_model_outlives_its_engine(ranks, stage, precision):
    for trained, now, _, moved in ranks(2, destroyed, stage, precision):
        assert same(trained, now)
        assert moved == len(now)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_destroyed_engine_leaves_no_state_behind(stage):
    """Masters, moments and gradients go with the engine; only the model's own bytes stay."""
    model = make_net()
    engine = make(settings(stage), model)
    train(engine, range(2))
    buckets = [weakref.ref(bucket) for bucket in engine.sharded.buckets]
    states = [weakref.ref(state) for s in engine.optimizer.state.values() for state in s.values()]
    assert states and all(ref() is not None for ref in (*buckets, *states))
    engine.destroy()
    del engine
    gc.collect()
    assert not [ref for ref in (*buckets, *states) if ref() is not None]
    assert model(*batch(0, 0)).isfinite()


# the config's traps, where they reach the engine


def test_unknown_keys_warn_at_the_top_and_fail_in_blocks():
    with pytest.warns(ts.config.config.ConfigWarning, match="zero_optimization.reduce_bucket_size"):
        make({**settings(), "zero_optimization.reduce_bucket_size": 10})
    with pytest.raises(ValueError, match="stge"):
        make(settings(zero_optimization={"stge": 2}))


def test_values_as_hugging_face_writes_them():
    """Floats for sizes, infinity for steps_per_print, both spellings of a key, "auto" where nobody filled it in."""
    text = json.dumps(
        {
            **settings(steps_per_print=float("inf"), bfloat16={"enabled": True}),
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "reduce_bucket_size": 152.1, "prefetch_bucket_size": "auto",
                                  "stage3_param_persistence_threshold": 5e2, "overlap_comm": None,
                                  "gather_16bit_weights_on_model_save": True},
        }
    )  # fmt: skip
    engine = make(text)  # type: ignore[arg-type]
    assert engine.zero_reduce_bucket_size() == 152 and engine.zero_param_persistence_threshold() == 500
    assert engine.bfloat16_enabled() and engine.zero_overlap_comm() and engine.zero_gather_16bit_weights_on_model_save()
    assert engine.gradient_clipping() == 1.0 and engine.get_batch_info() == (2, 2, 1)
    train(engine, range(2))
    with pytest.raises(ValueError, match="stage"):
        make('{"train_batch_size": 2, "zero_optimization": {"stage": 1, "stage": 2}}')  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 3])
def test_compiled_units_train_to_the_same_bits(stage):
    """The backend that changes nothing: what is tested is that the hooks stay outside the graphs."""
    found = []
    for compiled in (False, True):
        engine = make(settings(stage))
        if compiled:
            engine.compile(backend="eager")
        train(engine, range(3))
        found.append(weights(engine))
    assert same(*found)
