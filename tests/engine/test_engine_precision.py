"""Dtypes that a config asks for are the dtypes that numbers have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import SGD, Weight, make, settings
from models import Net, batch
from torch import nn


def test_autocast_trains_as_plain_autocast():
    engine = make(settings(2, torch_autocast={"enabled": True, "dtype": "bf16"}))
    torch.manual_seed(0)
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD["params"])
    for step in range(4):
        data = batch(0, step)
        with torch.autocast("cpu", torch.bfloat16):
            want = plain(*data)
        want.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        loss = engine(*data)
        engine.backward(loss)
        engine.step()
        assert loss.item() == pytest.approx(want.item(), rel=1e-6), step
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    assert engine(batch(0, 0)[0]).dtype == torch.bfloat16
    assert engine.torch_autocast_enabled() and not engine.bfloat16_enabled()
    assert engine.get_data_types() == (torch.float32, torch.float32)


class Dtypes(nn.Module):
    """Says which dtype its input had."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.dtype]]:
        return self.linear(x), [x.dtype, more["y"].dtype, more["tokens"].dtype]


def test_auto_cast_casts_floating_inputs_alone():
    more = {"y": torch.zeros(3), "tokens": torch.zeros(3, dtype=torch.int64)}
    engine = make(settings(0, fp16={"enabled": True, "auto_cast": True}), Dtypes)
    out, seen = engine(torch.zeros(2, 3), more=more)
    assert seen == [torch.float16, torch.float16, torch.int64] and out.dtype == torch.float16
    assert more["y"].dtype == torch.float32  # the caller's
    plain = make(settings(0, fp16={"enabled": True}), Dtypes)
    with pytest.raises(RuntimeError, match="dtype"):
        plain(torch.zeros(2, 3), more=more)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("dtype", "norm"), [("fp32", 1.001), ("bf16", 1.0)])
def test_gradients_are_added_in_the_accumulation_type(stage, dtype, norm):
    """1 + 0.001 is 1 in bf16, whose step there is 2⁻⁷."""
    config = settings(stage, 2, "bf16", data_types={"grad_accum_dtype": dtype}, gradient_clipping=0)
    engine = make(config, Weight)
    for value in (1.0, 0.001):
        engine.backward(engine(torch.tensor([value, 0, 0]).bfloat16()), scale_wrt_gas=False)
        kept = {b.grad.dtype for b in engine.sharded.buckets if b.grad is not None}
        engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
    assert engine.get_data_types()[1] == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert kept == {engine.get_data_types()[1]}


def norm_of_thirds(more: dict[str, Any]) -> float | None:
    engine = make(settings(2, gradient_clipping=0, **more), Weight)
    engine.backward(engine(torch.tensor([(1 + dist.get_rank()) / 3, 0, 0])))
    engine.step()
    return engine.get_global_grad_norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_travel_in_the_communication_type(ranks, dtype):
    """Each rank's part is rounded to it, the sum is not."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    want = sum(torch.tensor(value, dtype=torch.float32).to(dtype).float() for value in (1 / 3, 2 / 3)).item() / 2
    for got in ranks(2, norm_of_thirds, {"communication_data_type": name}):
        assert got == pytest.approx(want, rel=1e-7)
    assert dtype == torch.float32 or want != pytest.approx(0.5, rel=1e-7)


@pytest.mark.parametrize(("op", "want"), [("mean", 0.5), ("sum", 1.0)])
def test_ranks_are_averaged_or_summed(ranks, op, want):
    assert ranks(2, norm_of_thirds, {"gradient_allreduce_op": op}) == pytest.approx([want] * 2)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
def test_clipping_is_torchs(clip):
    data = torch.tensor([2.0, 3.0, 6.0])
    engine = make(settings(3, gradient_clipping=clip), Weight)
    engine.backward(engine(data))
    engine.step()
    plain = Weight()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD["params"])
    plain(data).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
    optimizer.step()
    assert engine.get_global_grad_norm() == pytest.approx(norm.item()) == pytest.approx(7.0)
    torch.testing.assert_close(engine.module_state_dict()["weight"], plain.weight.detach())
    assert engine.gradient_clipping() == clip


def unused(stage: int, ignoring: bool, accumulation: int) -> list[str]:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(5, 3)
            self.extra = nn.Linear(2, 2)

    zero = {"stage": stage, "ignore_unused_parameters": ignoring, "stage3_param_persistence_threshold": 0}
    engine = make(settings(stage, accumulation, zero_optimization=zero), Spare)
    errors = []
    for micro in range(2 * accumulation):
        loss = engine(*batch(dist.get_rank(), micro))
        try:
            engine.backward(loss)
        except ValueError as error:
            errors.append(str(error))
        engine.step()  # ranks stay in step: whoever catches the error may go on
    assert engine.global_steps == 2
    engine.module.spare.requires_grad_(False)
    return errors


@pytest.mark.parametrize(("stage", "accumulation", "told"), [(0, 1, 2), (1, 2, 2), (2, 2, 4), (3, 1, 2)])
def test_unused_parameters_are_an_error_on_request(ranks, stage, accumulation, told):
    """Stages 0 and 1 look once per accumulation, 2 and 3 at every backward: whenever gradients leave."""
    for errors in ranks(2, unused, stage, False, accumulation):
        assert len(errors) == told
        assert all("4 trainable parameter(s)" in e and "'spare.weight'" in e and "set it to true" in e for e in errors)
    assert ranks(2, unused, stage, True, accumulation) == [[], []]


class Sometimes(Net):
    """Leaves its last block out when told to."""

    whole = True

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks if self.whole else list(self.blocks)[:-1]:
            x = block(x)
        return self.norm(x)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_was_used_before_may_be_unused_now(stage):
    zero = {"stage": stage, "ignore_unused_parameters": False, "stage3_param_persistence_threshold": 0}
    engine = make(settings(stage, zero_optimization=zero), Sometimes)
    engine.backward(engine(*batch(0, 0)))
    engine.step()
    engine.module.whole = False
    with pytest.raises(ValueError, match=r"7 trainable parameter\(s\).*blocks\.2\."):
        engine.backward(engine(*batch(0, 1)))


def test_all_parameters_used_is_no_error():
    zero = {"stage": 2, "ignore_unused_parameters": False}
    engine = make(settings(2, zero_optimization=zero), lambda: Net(tied=True, recompute="plain"))
    for step in range(2):
        engine.backward(engine(*batch(0, step)))
        engine.step()
    assert engine.global_steps == 2


class Rotary(nn.Module):
    """A table that must not be rounded, a running mean, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(4.0) / 4), persistent=False)
        self.register_buffer("coarse", torch.full((2,), 1 / 3, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * (x * self.frequencies).to(self.weight.dtype)).sum()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_buffers_keep_their_dtype(stage, precision):
    """As in DeepSpeed 0.19: casting a rotary table moved the loss of a tiny Llama in its third decimal."""
    engine = make(settings(stage, precision=precision), Rotary)
    plain = dict(Rotary().named_buffers())
    assert engine.module.weight.dtype == engine.get_data_types()[0] != torch.float32
    for name, buffer in engine.module.named_buffers():
        assert buffer.dtype == plain[name].dtype and buffer.equal(plain[name]), name
    engine.backward(engine(torch.ones(4)))
    engine.step()
