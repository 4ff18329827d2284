"""What an engine writes and says of its steps: profiles that count right at every stage, and change no number."""

from __future__ import annotations

import csv
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from engines import Weight, make, said, settings, weights
from models import Net, batch
from torch import nn

LINEAR = sum(m.weight.numel() for m in Net().modules() if isinstance(m, nn.Linear))
TOKENS = 2 * 7
FILES = ("lr", "train_loss", *(f"elapsed_time_ms_{n}" for n in ("forward", "backward", "step")))


def train(engine, steps, accumulation=1, rows=lambda step: 2):
    losses = []
    for step in range(steps * accumulation):
        loss = engine(*batch(engine.global_rank, step, rows=rows(step // accumulation)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def observed(stage, folder, **more):
    where = {"enabled": True, "output_path": folder, "job_name": "run"}
    return settings(
        stage,
        flops_profiler={"enabled": True, "profile_step": 1, **more},
        csv_monitor=where,
        jsonl_monitor=where,
        tensorboard=where,
        steps_per_print=2,
        wall_clock_breakdown=True,
    )


def everything_watched(stage, folder):
    """The losses and weights of a run with everything on, and of one with nothing; what rank 0 has of the first."""
    runs = []
    for config in (settings(stage), observed(stage, folder)):
        with said() as lines:
            engine = make(config)
            losses = train(engine, 4)
            runs.append((losses, weights(engine)))
            found, enabled = engine.last_flops, engine.monitor.enabled
            report = engine.last_step
            engine.destroy()
    (losses, plain), (others, watched) = runs
    same = losses == others and all(plain[name].equal(watched[name]) for name in plain)
    if found is None:
        return same, enabled, None, lines, None
    figures = {
        "flops": (found.num_forward, found.num_backward, found.num_params, found.shape.num_held),
        "step": (found.step, found.was_counted_live, found.num_samples, found.num_tokens),
        "phases": sorted(found.phase_s),
        "modules": {row.name: (row.forward, row.backward) for row in found.rows},
    }
    return same, enabled, figures, lines, (report.step, report.loss, report.grad_norm)


@pytest.mark.parametrize("stage", [0, 3])
def test_watching_everything_changes_nothing_and_counts_right(ranks, tmp_path, stage):
    first, second = ranks(2, everything_watched, stage, str(tmp_path))
    assert first[0] and second[0], "losses and weights are the same to the last bit"
    assert first[1] and second[1] and second[2] is None, "rank 0 profiles and writes"
    figures = first[2]
    num_params = sum(p.numel() for p in Net().parameters())
    held = num_params
    if stage == 3:
        held = figures["flops"][3]
        assert 0 < held < num_params
    assert figures["flops"] == (2 * LINEAR * TOKENS, 4 * LINEAR * TOKENS, num_params, held)
    assert figures["step"] == (2, False, 2, TOKENS)
    assert figures["phases"] == ["backward", "forward", "step"]
    for name, module in Net().named_modules():
        if isinstance(module, nn.Linear):
            cost = 2 * module.weight.numel() * TOKENS
            assert figures["modules"][name] == (cost, 2 * cost)
    text = "\n".join(first[3])
    assert "flops profile of step 2, rank 0 of 2" in text and "share of the bound    unknown" in text
    assert text.count("samples/s over") == 2 and "step 4 · " in text and "TFLOP/s a rank, as counted" in text
    folder = tmp_path / "run"
    for name in FILES:
        rows = list(csv.reader((folder / f"Train_Samples_{name}.csv").read_text().splitlines()))
        assert [row[0] for row in rows] == ["step", "4", "8", "12", "16"]
        assert all(float(row[1]) > 0 for row in rows[1:])
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [each["samples"] for each in steps] == [4, 8, 12, 16]
    assert (steps[-1]["step"], steps[-1]["loss"], steps[-1]["grad_norm"]) == first[4]


def rank_shares(stage):
    config = {**settings(stage), "flops_profiler": {"enabled": True, "profile_step": 0}}
    engine = make(config)
    from tritonspeed.profiling.flops_step import shape_of

    held = shape_of(engine.sharded, engine.policy).num_held
    engine.destroy()
    return held


def test_the_ranks_parts_add_up_to_the_model(ranks):
    assert sum(ranks(2, rank_shares, 3)) == sum(p.numel() for p in Net().parameters())


def test_shapes_not_met_before_are_counted_as_they_are_timed():
    """With accumulation, where the profiled step's batches are larger than those of the step before."""
    engine = make(settings(0, accumulation=2, flops_profiler={"enabled": True, "profile_step": 1, "detailed": False}))
    with said() as lines:
        train(engine, 2, accumulation=2, rows=lambda step: 2 + step)
    found = engine.last_flops
    assert found.was_counted_live and found.num_micro == 2 and found.num_samples == 4
    assert found.num_forward == 2 * 2 * LINEAR * 3 * 7 and found.num_backward == 2 * found.num_forward
    assert "being counted" in lines[0] and "2 micro-steps" in lines[0]
    engine.destroy()


@pytest.mark.parametrize("recompute", ["plain", "reentrant"])
def test_recomputation_is_told_apart_in_an_engine(recompute):
    engine = make(settings(3, flops_profiler={"enabled": True, "profile_step": 1}), Net(recompute=recompute))
    with said() as lines:
        train(engine, 2)
    found = engine.last_flops
    assert (found.num_forward, found.num_backward) == (2 * LINEAR * TOKENS, 4 * LINEAR * TOKENS)
    head = 37 * 13
    last = 0 if recompute == "reentrant" else 3 * 13 * 27  # torch's own stops before each block's last product
    assert found.counts.num_recompute == 2 * (LINEAR - head - last) * TOKENS
    assert "of them recomputed" in lines[0] and "without recomputing" in lines[0]
    engine.destroy()


def test_compiled_units_are_counted_apart_and_timed_as_they_are_compiled():
    losses = []
    for enabled in (False, True):
        engine = make(settings(3, flops_profiler={"enabled": enabled, "profile_step": 2, "detailed": False}))
        engine.compile(backend="eager")
        losses.append(train(engine, 4))
        found = engine.last_flops
        engine.destroy()
    assert losses[0] == losses[1] and found is not None and found.was_uncompiled
    assert "ran uncompiled while they were counted" in found.table()
    assert (found.num_forward, found.num_backward) == (2 * LINEAR * TOKENS, 4 * LINEAR * TOKENS)
    rows = {row.name: row for row in found.rows}
    assert rows["blocks.0"].seconds > 0 and rows["blocks.0.up"].seconds == 0 and rows["blocks.0.up"].forward


def test_a_backward_of_the_callers_is_taken_as_so_many_forwards():
    engine = make(settings(0, flops_profiler={"enabled": True, "profile_step": 0, "recompute_fwd_factor": 1.0}))
    with said() as lines:
        engine(*batch(0, 0)).backward()
        engine.step()
    assert engine.last_flops.num_backward == 3 * engine.last_flops.num_forward == 6 * LINEAR * TOKENS
    assert "3 × forward: it was not seen" in lines[0]
    engine.destroy()


def test_the_table_goes_to_a_file_and_a_file_that_cannot_be_written_to_the_log(tmp_path):
    (tmp_path / "file").write_text("")
    for path, there in ((tmp_path / "a" / "flops.txt", True), (tmp_path / "file" / "flops.txt", False)):
        profiler = {"enabled": True, "profile_step": 0, "output_file": str(path), "module_depth": 1}
        engine = make(settings(0, flops_profiler=profiler))
        with said() as lines:
            train(engine, 1)
        engine.destroy()
        text = path.read_text() if there else "\n".join(lines)
        assert "ModuleList" in text and "share of the bound" in text
        assert "Block" not in text, "module_depth is 1, and blocks stand at 2"
        assert there or "cannot be written" in text
        assert there is not bool(lines)


def test_the_share_of_the_bound_is_the_data_sheets_or_a_measured_machines(monkeypatch):
    from dataclasses import replace

    from tritonspeed.estimation import machine_of
    from tritonspeed.profiling import flops_table

    engine = make(settings(0, flops_profiler={"enabled": True, "profile_step": 0}))
    train(engine, 1)
    found = engine.last_flops
    assert found is not None and found.bound() is None
    assert found.bound(machine_of("H100"))[0] == pytest.approx(989e12 / 16)
    monkeypatch.setattr(flops_table, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    half = replace(
        found, shape=replace(found.shape, dtype=torch.bfloat16), phase_s={"forward": found.num_flops / 400e12}
    )
    assert half.bound()[0] == 989e12
    assert "40.4% of 989 TFLOP/s" in replace(half, phase_s={"backward": half.num_flops / 400e12}).table()
    engine.destroy()


def test_throughput_is_said_as_often_as_reports_and_not_when_it_is_off():
    for timers, times in (({}, 2), ({"throughput": {"enabled": False}}, 0)):
        engine = make(settings(0, steps_per_print=2, timers=timers))
        with said() as lines:
            train(engine, 4)
        line = [each for each in lines if "samples/s" in each]
        assert len(line) == times
        if times:
            assert "over 1 step " in line[0] and "over 2 steps" in line[1]
            assert "tokens/s a rank" in line[1] and "TFLOP/s a rank by 6·N·tokens" in line[1]
        engine.destroy()


def test_the_getters_answer_with_the_block():
    engine = make(settings(0, flops_profiler={"enabled": False, "profile_step": 7}))
    assert not engine.flops_profiler_enabled() and engine.flops_profiler_profile_step() == 7
    assert engine.flops_profiler_output_file() is None and not engine.monitor.enabled
    engine.destroy()


def test_a_skipped_step_is_written_with_the_scale_that_follows(tmp_path):
    where = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    half = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    engine = make(settings(0, fp16=half, csv_monitor=where, jsonl_monitor=where), Weight())
    for x in (torch.ones(3), torch.full((3,), float("inf"))):
        engine.backward(engine(x))
        engine.step()
    engine.destroy()
    rows = (tmp_path / "run" / "Train_Samples_loss_scale.csv").read_text().split()
    assert rows == ["step,loss_scale", "2,16.0", "4,8.0"]
    last = json.loads((tmp_path / "run" / "steps.jsonl").read_text().splitlines()[-1])
    assert (
        last["skipped"]
        and last["loss_scale"] == 16
        and last["grad_norm"] is None
        and "weight" in last["skipped_reason"]
    )


def test_a_run_that_exits_has_written_its_steps(tmp_path):
    """As it ends by a scheduler's signal: SystemExit, and nobody calls destroy."""
    program = f"""
import sys
sys.path += {[str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]!r}
from engines import make, settings
from models import batch
engine = make(settings(0, csv_monitor={{"enabled": True, "output_path": {str(tmp_path)!r}}}))
engine.backward(engine(*batch(0, 0)))
engine.step()
sys.exit(143)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "DeepSpeedJobName" / "Train_Samples_lr.csv").read_text().split() == ["step,lr", "2,0.1"]


def test_a_missing_library_is_named_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        make(settings(0, wandb={"enabled": True}))
