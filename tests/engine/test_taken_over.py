"""A model that is given to ``initialize`` again, as DeepSpeed lets it be: to evaluate after training, to train anew.

Lightning does it between fit, validate and test, Trainer where it evaluates before it trains.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from engines import make, same, settings, weights
from models import Net, batch

import tritonspeed as ts


def without_optimizer(stage: int) -> dict[str, Any]:
    return {k: v for k, v in settings(stage).items() if k != "optimizer"}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(engine: ts.Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(*batch(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def strip_hooks(model: torch.nn.Module) -> None:
    """What Lightning does to a model before it is given to DeepSpeed to evaluate it."""
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            getattr(module, name).clear()


def train_evaluate_train(first: int, between: int, last: int) -> tuple[Any, ...]:
    """(losses, weights) with the model in three engines' hands; the same with it in one's, momentum dropped in the
    middle by ``destroy``."""
    model = net()
    engine = make(settings(first), model)
    losses = train(engine, range(2))
    strip_hooks(model)
    evaluating = ts.initialize(model=model, config=without_optimizer(between))[0]
    with torch.no_grad():
        losses += [evaluating(*batch(evaluating.global_rank, 9)).item()]
    again = make(settings(last), model)
    losses += train(again, range(2, 4))
    taken = weights(again)

    model = net()
    engine = make(settings(first), model)
    expected = train(engine, range(2))
    with torch.no_grad():
        expected += [engine(*batch(engine.global_rank, 9)).item()]
    engine.destroy()
    engine = make(settings(last), model)
    expected += train(engine, range(2, 4))
    return losses, expected, same(taken, weights(engine))


@pytest.mark.parametrize("stages", [(0, 0, 0), (2, 2, 2), (3, 3, 3), (3, 0, 2), (1, 3, 3)])
def test_three_engines_after_one_another_train_as_one_that_is_destroyed_between(ranks, stages):
    for losses, expected, same_weights in ranks(2, train_evaluate_train, *stages):
        assert losses == expected
        assert same_weights


def test_the_earlier_engine_says_that_the_model_is_anothers():
    model = net()
    earlier = make(settings(2), model)
    train(earlier, range(1))
    later = make(settings(2), model)
    for call in (earlier.step, lambda: earlier.save_checkpoint("nowhere"), lambda: earlier.backward(torch.zeros(()))):
        with pytest.raises(ValueError, match="was given to initialize"):
            call()
    with pytest.raises(ValueError, match="sharded again"):
        earlier.optimizer.step()
    assert earlier(*batch(0, 0)).isfinite()  # calls the model, which is the later one's
    earlier.destroy()
    assert train(later, range(1))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_earlier_engine_keeps_no_state_although_somebody_keeps_it(stage):
    model = net()
    earlier = make(settings(stage), model)
    train(earlier, range(1))
    states = [weakref.ref(state) for s in earlier.optimizer.state.values() for state in s.values()]
    masters = [weakref.ref(bucket.master) for bucket in earlier.sharded.buckets if bucket.master is not None]
    assert states and masters and all(ref() is not None for ref in (*states, *masters))
    later = make(settings(stage), model)
    gc.collect()
    assert not [ref for ref in (*states, *masters) if ref() is not None]
    assert train(later, range(1))


def test_a_part_of_a_sharded_model_is_not_taken_out_of_it():
    model = net()
    engine = make(settings(2), model)
    with pytest.raises(ValueError, match=r"manages other parameters too: destroy\(\)"):
        ts.zero.shard(model.blocks, stage=2)
    assert train(engine, range(1))


def test_a_model_with_its_state_on_disk_is_not_taken_over(tmp_path):
    model = net()
    zero = {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    config = settings(2, zero_optimization=zero, optimizer={"type": "AdamW", "params": {"lr": 1e-3}})
    engine = make(config, model)
    with pytest.raises(ValueError, match=r"on disk: destroy\(\)"):
        make(settings(2), model)
    assert train(engine, range(1))
    engine.destroy()
    assert train(make(settings(2), model), range(1))
