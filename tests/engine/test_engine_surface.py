"""What an engine says of itself: getters, what falls through to the module, reports, the plan, the log."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import SGD, make, said, settings
from models import Net, batch

import tritonspeed as ts


def step(engine: ts.Engine, number: int = 0) -> ts.StepReport:
    for micro in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(*batch(engine.global_rank, 10 * number + micro)))
        engine.step()
    assert engine.last_step is not None
    return engine.last_step


# getters: those that the research note marks MUST, and those that Hugging Face's libraries call


def test_getters_answer_for_a_bf16_engine():
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_prefetch_bucket_size": 7.0e3}
    engine = make(settings(3, 2, "bf16", zero_optimization=zero, steps_per_print=5))
    step(engine)
    answers = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "get_batch_info": (4, 2, 2),
        "zero_optimization": True,
        "zero_optimization_stage": 3,
        "zero_optimization_partition_gradients": True,
        "zero_optimization_partition_weights": True,
        "zero_gather_16bit_weights_on_model_save": True,
        "zero_prefetch_bucket_size": 7000,
        "zero_overlap_comm": True,
        "zero_ignore_unused_parameters": True,
        "fp16_enabled": False,
        "bfloat16_enabled": True,
        "torch_autocast_enabled": False,
        "fp16_auto_cast": False,
        "get_data_types": (torch.bfloat16, torch.float32),
        "loss_scale": 1.0,
        "dynamic_loss_scale": False,
        "gradient_clipping": 0.5,
        "managed_gradient_accumulation": True,
        "dataloader_drop_last": False,
        "optimizer_name": "SGD",
        "optimizer_params": SGD["params"],
        "scheduler_name": None,
        "scheduler_params": None,
        "steps_per_print": 5,
        "wall_clock_breakdown": False,
        "get_lr": [0.1],
        "get_mom": [0.9],
        "get_type": ["SGD"],
        "was_step_applied": True,
        "is_gradient_accumulation_boundary": False,
        "get_data_parallel_rank": 0,
    }
    assert {name: getattr(engine, name)() for name in answers} == answers
    facts = {"global_steps": 1, "global_samples": 4, "micro_steps": 2, "skipped_steps": 0, "cur_scale": 1.0}
    facts |= {"global_rank": 0, "local_rank": 0, "world_size": 1, "dp_world_size": 1, "device": torch.device("cpu")}
    assert {name: getattr(engine, name) for name in facts} == facts


@pytest.mark.parametrize("stage", [0, 1])
def test_getters_tell_stages_apart(stage):
    engine = make(settings(stage, fp16={"enabled": True, "initial_scale_power": 5}))
    assert engine.zero_optimization() == (stage > 0)
    assert not engine.zero_optimization_partition_gradients() and not engine.zero_optimization_partition_weights()
    assert not engine.zero_overlap_comm()  # DeepSpeed: by default at stage 3 alone
    assert engine.fp16_enabled() and engine.dynamic_loss_scale() and engine.loss_scale() == 32
    assert engine.get_data_types()[0] == torch.float16


def test_betas_are_the_momentum_of_adam():
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.9]}}
    assert make(settings(optimizer=adamw)).get_mom() == [(0.8, 0.9)]


# the module behind the engine


class Custom(Net):
    kind = "of the class"

    def __init__(self) -> None:
        super().__init__()
        self.answer = 42
        self.register_buffer("table", torch.arange(3))

    def generate(self, tokens: torch.Tensor) -> torch.Tensor:
        return self(tokens).argmax(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.head.weight.shape)


@pytest.mark.parametrize("stage", [0, 3])
def test_unknown_names_are_the_modules(stage):
    engine = make(settings(stage), Custom)
    assert engine.answer == 42 and engine.kind == "of the class" and engine.shape == (37, 13)
    assert engine.table.tolist() == [0, 1, 2] and engine.blocks is engine.module.blocks
    tokens = batch(0, 0)[0]
    with torch.no_grad():
        assert engine.generate(tokens).equal(engine(tokens).argmax(-1))
    assert "generate" not in dir(torch.nn.Module) and hasattr(engine, "generate")


def test_names_that_nobody_has():
    engine = make(settings())
    assert not hasattr(engine, "nonsense")
    with pytest.raises(AttributeError, match="neither the engine nor its module has an attribute 'nonsense'"):
        engine.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train_batch", "pipeline"),
        ("eval_batch", "pipeline"),
    ],
)
def test_what_is_not_built_says_so(name, told):
    engine = make(settings())
    with pytest.raises(AttributeError, match=f"'{name}' yet.*{told}"):
        getattr(engine, name)


def test_an_engine_is_a_module():
    engine: Any = make(settings(3))
    assert isinstance(engine, torch.nn.Module) and isinstance(engine.module, Net)
    assert not engine.eval().training and not engine.module.blocks[0].training
    assert engine.train().module.blocks[0].training
    names = [name for name, _ in engine.named_parameters()]
    assert names == [f"module.{name}" for name, _ in Net().named_parameters()]
    assert set(engine.parameters()) == set(engine.module.parameters())


def test_module_state_dict_is_whole_and_plain(ranks):
    for stage in (0, 3):
        for rank, (everywhere, only_first) in enumerate(ranks(2, whole_states, stage)):
            torch.manual_seed(0)
            want = Net().state_dict()
            assert list(everywhere) == list(want) and all(everywhere[n].equal(want[n]) for n in want)
            assert list(only_first) == (list(want) if rank == 0 else [])


def whole_states(stage: int) -> tuple[dict, dict]:
    engine = make(settings(stage))
    return engine.module_state_dict(), engine.module_state_dict(rank0_only=True)


# the report of a step


def test_the_report_has_every_fact():
    engine = make(settings(1, 2))
    losses = []
    for micro in range(2):
        loss = engine(*batch(0, micro))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    report = engine.last_step
    assert (report.step, report.lr, report.loss_scale, report.skipped, report.skipped_reason) == (
        *(1, [0.1], 1.0, False, None),
    )
    assert report.loss == pytest.approx(sum(losses) / 2)
    assert report.grad_norm == engine.get_global_grad_norm() > 0
    assert report.bytes_of == engine.memory() and report.peak_bytes >= sum(report.bytes_of.values())
    assert report.forward_ms > 0 and report.backward_ms > 0 and report.step_ms > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loss = 0.0
    assert str(report).startswith(f"step 1 · loss {report.loss:.4f} · grad norm {report.grad_norm:.4g} · lr 0.1")


def test_times_are_of_one_step_and_all_its_micro_steps(monkeypatch):
    ticks = itertools.count()  # every look at the clock is a second after the last
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    engine = make(settings(1, 3))
    for number in range(2):
        report = step(engine, number)
        assert (report.forward_ms, report.backward_ms, report.step_ms) == (3000.0, 3000.0, 1000.0)


# the plan


def plans(stage: int, precision: str, accumulation: int) -> list[tuple[str, dict[str, int]]]:
    engine = make(settings(stage, accumulation, precision))
    found = []
    for number in range(2):
        found.append((engine.explain(), engine.memory()))
        step(engine, number)
    found.append((engine.explain(), engine.memory()))
    if accumulation > 1:
        engine.backward(engine(*batch(dist.get_rank(), 99)))
        found.append((engine.explain(), engine.memory()))
    return found


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "fp16"), (3, "bf16"), (3, "fp32")])
def test_the_plan_is_a_table_whose_bytes_add_up(ranks, stage, precision):
    when = {0: "never: whole on every rank", 3: "all ranks, before each use of the unit"}
    when = when.get(stage, "all ranks, after each step")
    for found in ranks(2, plans, stage, precision, 2):
        for table, memory in found:
            rows = rows_of(table)
            assert f"ZeRO stage {stage} · 2 rank(s) · gloo · cpu" in table
            assert re.search(
                r"unit .*parameters .*elements .*slice .*compute .*master .*lives .*gradient .*bytes here", table
            )
            assert [row[0] for row in rows] == ["root", "blocks.0", "blocks.1", "blocks.2"]
            assert sum(int(row[1]) for row in rows) == len(list(Net().parameters()))
            assert sum(int(row[2].replace(",", "")) for row in rows) == sum(p.numel() for p in Net().parameters())
            assert {tuple(row[i] for i in (4, 5, 6, 7, 9)) for row in rows} == {
                (precision, "fp32", "device", "fp32", when)
            }
            assert sum(int(row[8].replace(",", "")) for row in rows) == sum(memory.values())
            for name, value in memory.items():
                assert f"{name} {value:,} bytes" in " ".join(table.split())


def test_the_plan_of_a_frozen_model_without_optimizer():
    net = Net()
    net.requires_grad_(False)
    engine = make({k: v for k, v in settings(3, precision="bf16").items() if k != "optimizer"}, net)
    rows = rows_of(engine.explain())
    assert {(row[5], row[6], row[7], row[9]) for row in rows} == {
        ("frozen", "device", "none", "one rank: nothing to gather")
    }
    assert sum(int(row[8].replace(",", "")) for row in rows) == sum(engine.memory().values())


# the log


def lines_of(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tritonspeed"]


def test_the_default_of_clipping_is_told_once_with_its_reason(caplog):
    caplog.set_level(logging.INFO, "tritonspeed")
    config = {k: v for k, v in settings().items() if k != "gradient_clipping"}
    engine = make(config)
    told = [line for line in lines_of(caplog) if "gradient_clipping" in line]
    assert len(told) == 1 and "1 applies" in told[0] and "June 2026" in told[0]
    assert engine.gradient_clipping() == 1.0
    step(engine)
    assert len([line for line in lines_of(caplog) if "gradient_clipping" in line]) == 1
    caplog.clear()
    make(settings())
    assert not [line for line in lines_of(caplog) if "gradient_clipping" in line]  # given: nothing to explain


@pytest.mark.parametrize(("every", "printed"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (float("inf"), []), (None, [])])
def test_steps_are_printed_as_often_as_asked(caplog, every, printed):
    caplog.set_level(logging.INFO, "tritonspeed")
    engine = make(settings(steps_per_print=every))
    for number in range(4):
        step(engine, number)
    found = [int(m.group(1)) for line in lines_of(caplog) if (m := re.match(r"step (\d+) · loss", line))]
    assert found == printed


@pytest.mark.parametrize(("every", "printed"), [(None, [1, 2, 3, 4]), (2, [2, 4]), (float("inf"), [1, 2, 3, 4])])
def test_times_are_printed_on_request(caplog, every, printed):
    caplog.set_level(logging.INFO, "tritonspeed")
    engine = make(settings(steps_per_print=every, wall_clock_breakdown=True))
    for number in range(4):
        step(engine, number)
    pattern = r"step (\d+) · forward ([\d.]+) ms · backward ([\d.]+) ms · step ([\d.]+) ms"
    found = [m for line in lines_of(caplog) if (m := re.fullmatch(pattern, line))]
    assert [int(m.group(1)) for m in found] == printed
    assert all(float(m.group(i)) > 0 for m in found for i in (2, 3, 4))


def logged_by_rank() -> list[str]:
    with said() as lines:
        engine = make({k: v for k, v in settings(steps_per_print=1).items() if k != "gradient_clipping"})
        step(engine)
    return lines


def test_rank_0_speaks_for_all(ranks):
    one, two = ranks(2, logged_by_rank)
    assert len(one) == 2 and two == []
