"""Every way from a loss to gradients gives the gradients of plain PyTorch, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import Both, Weight, make, said, same, settings, weights
from lockstep import plain_training
from models import Net, batch
from torch import nn
from torch.nn import functional as F

STEPS = 2
LOSS_RTOL = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}  # tests/zero/test_parity.py's, for the same models
MASTER_ATOL = {"fp32": 2e-6, "bf16": 1e-3, "fp16": 1e-4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def by_engine(engine: Any, data: Any) -> Any:
    loss = engine(*data)
    returned = engine.backward(loss)
    assert returned.equal(loss.detach() / engine.gradient_accumulation_steps())
    assert not returned.requires_grad
    return loss


def by_torch(engine: Any, data: Any) -> Any:
    loss = engine(*data)
    loss.backward()
    return loss


def by_scaling(engine: Any, data: Any) -> Any:
    loss = engine(*data)
    engine.scale(loss).backward()
    return loss


def divided_by_the_caller(engine: Any, data: Any) -> Any:
    loss = engine(*data)
    part = loss / engine.gradient_accumulation_steps()
    assert engine.backward(part, scale_wrt_gas=False).equal(part.detach())
    return loss


def external_loss(engine: Any, data: Any) -> Any:
    loss = F.cross_entropy(engine(data[0]).flatten(0, -2).float(), data[1].flatten())
    engine.backward(loss)
    return loss


def external_loss_by_torch(engine: Any, data: Any) -> Any:
    loss = F.cross_entropy(engine(data[0]).flatten(0, -2).float(), data[1].flatten())
    loss.backward()
    return loss


def gradient_of_logits(engine: Any, data: Any) -> Any:
    """Backward of an output that is not a scalar."""
    logits = engine(data[0])
    free = logits.detach().requires_grad_()
    loss = F.cross_entropy(free.flatten(0, -2).float(), data[1].flatten())
    loss.backward()
    logits.backward(free.grad)
    return loss


def two_losses(engine: Any, data: Any) -> Any:
    loss = engine(*data)
    engine.backward(0.25 * loss, retain_graph=True)
    engine.backward(0.75 * loss)
    return loss


def two_forwards(engine: Any, data: Any) -> Any:
    one, two = engine(*data), engine(*data)
    engine.backward(0.25 * one + 0.75 * two)
    return one


def loss_beside_logits(engine: Any, data: Any) -> Any:
    """The loss is an output, and so are the logits it was computed from: the scale must not be applied twice."""
    out = engine(*data)
    out["loss"].backward()
    return out["loss"]


WAYS = {f.__name__: f for f in (
    by_engine, by_torch, by_scaling, divided_by_the_caller, external_loss, external_loss_by_torch, gradient_of_logits,
    two_losses, two_forwards, loss_beside_logits,
)}  # fmt: skip


def train(stage: int, accumulation: int, precision: str, way: str, **more: Any) -> tuple[list, list, dict]:
    engine = make(settings(stage, accumulation, precision, **more), Both if way == "loss_beside_logits" else Net)
    losses, norms = [], []
    for step in range(STEPS):
        mean = 0.0
        for micro in range(accumulation):
            loss = WAYS[way](engine, batch(dist.get_rank(), step * accumulation + micro))
            mean += loss.item() / accumulation
            engine.step()
        assert engine.last_step is not None
        if engine.last_step.loss is not None and way != "two_losses":
            assert engine.last_step.loss == pytest.approx(mean, rel=1e-2 if precision == "bf16" else 1e-5)
        total = torch.tensor(mean, dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        norms.append(engine.get_global_grad_norm())
    found = weights(engine)
    engine.destroy()
    return losses, norms, found


def every_way(stage: int, accumulation: int, precision: str) -> dict[str, tuple]:
    return {way: train(stage, accumulation, precision, way) for way in WAYS}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_every_way_equals_plain_pytorch(ranks, stage, precision, accumulation):
    losses, norms, masters = plain_training(2, STEPS, accumulation, DTYPES[precision], optimizer="sgd")
    for found in ranks(2, every_way, stage, accumulation, precision):
        for way, (got_losses, got_norms, got) in found.items():
            assert got_losses == pytest.approx(losses, rel=LOSS_RTOL[precision]), way
            assert got_norms == pytest.approx(norms, rel=20 * LOSS_RTOL[precision]), way
            for name, want in masters.items():
                # parameters are the masters rounded to the compute type: one more rounding
                close = {"rtol": torch.finfo(DTYPES[precision]).eps, "atol": MASTER_ATOL[precision]}
                torch.testing.assert_close(got[name].float(), want, **close, msg=f"{way}: {name}")
        if accumulation == 1:  # where nothing is divided, calling loss.backward() is the same to the last bit
            assert same(found["by_torch"][2], found["by_engine"][2])


def fp16_ways(stage: int) -> dict[str, Any]:
    more = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    found = {way: train(stage, 2, "fp32", way, **more) for way in ("by_engine", "by_scaling", "external_loss")}
    engine = make(settings(stage, 1, **more))
    data = batch(dist.get_rank(), 0)
    refused = []
    for _ in range(2):
        engine.scale(engine(*data)).backward()  # counts for this one alone
        engine.zero_grad()
        try:
            engine(*data).backward()
        except ValueError as error:
            refused.append(str(error))
    before = weights(engine)
    with said() as lines:
        engine.backward(engine(*data))
        engine.step()
    return {**found, "refused": refused, "moved": not same(before, weights(engine)), "said": lines}


@pytest.mark.parametrize("stage", range(4))
def test_fp16_wants_a_scaled_loss(ranks, stage):
    losses, norms, _ = plain_training(2, STEPS, 2, torch.float16, optimizer="sgd")
    for found in ranks(2, fp16_ways, stage):
        for way in ("by_engine", "by_scaling", "external_loss"):
            assert found[way][0] == pytest.approx(losses, rel=LOSS_RTOL["fp16"]), way
            assert found[way][1] == pytest.approx(norms, rel=20 * LOSS_RTOL["fp16"]), way
        assert same(found["by_engine"][2], found["by_scaling"][2])
        assert len(found["refused"]) == 2
        assert all("256" in text and "engine.scale(loss)" in text for text in found["refused"])
        assert found["moved"] and found["said"] == []  # refused before anything began: nothing to drop


class Half(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width_in, 5), nn.Linear(5, width_out))

    def forward(self, x: Any) -> Any:
        return self.layers(x).tanh()


def chain(stages: tuple[int, int], by: str) -> tuple[dict, dict]:
    """One loss through two engines, with accumulation: each must be scaled once."""
    torch.manual_seed(0)
    first, second = Half(4, 7), Half(7, 1)
    make_one = {"gradient_clipping": 0.0}
    a, b = make(settings(stages[0], 3, **make_one), first), make(settings(stages[1], 3, **make_one), second)
    for step in range(6):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        loss = b(a(x)).square().sum()
        if by == "torch":
            loss.backward()
        elif by == "last":
            b.backward(loss)
        else:
            a.backward(loss)
        a.step()
        b.step()
    assert a.global_steps == b.global_steps == 2
    return weights(a), weights(b)


def plain_chain() -> list[torch.Tensor]:
    torch.manual_seed(0)
    first, second = Half(4, 7), Half(7, 1)
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(6):
        for rank in range(2):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            (second(first(x)).square().sum() / 6).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("stages", [(0, 3), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("by", ["torch", "last", "first"])
def test_one_loss_through_two_engines(ranks, stages, by):
    want = plain_chain()
    for a, b in ranks(2, chain, stages, by):
        for got, value in zip([*a.values(), *b.values()], want, strict=True):
            torch.testing.assert_close(got, value)


def test_a_loss_that_is_not_scalar_is_refused():
    engine = make(settings(2))
    with pytest.raises(ValueError, match=r"scalar loss, and this one has shape \(2, 7, 37\)"):
        engine.backward(engine(batch(0, 0)[0]))


def test_a_loss_that_the_caller_divided_is_reported_whole():
    engine = make(settings(0, 4), Weight)
    for x in (1.0, 2.0, 3.0, 4.0):
        engine.backward(engine(torch.full((3,), x)) / 4, scale_wrt_gas=False)
        engine.step()
    assert engine.last_step.loss == pytest.approx(3 * 2.5)
    assert engine.get_global_grad_norm() == pytest.approx(2.5 * 3**0.5)


def test_a_call_of_the_bare_module_is_scaled_too():
    """Trainers evaluate, and some train, through the module: its loss.backward() is the engine's."""
    found = []
    for through_module in (False, True):
        engine = make(settings(1, 4))
        for micro in range(4):
            (engine.module if through_module else engine)(*batch(0, micro)).backward()
            engine.step()
        found.append(weights(engine))
    assert same(*found)
