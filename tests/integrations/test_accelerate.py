"""Scripts on Accelerate, as they are, on two ranks; and as `accelerate launch` starts them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from script_cases import ACCELERATE, RECORDED, SCRIPTS, Case
from script_runs import OFFLINE, TIMEOUT_S, differences, run_case

from tritonspeed.integrations.finder import path_variables

LAUNCHED = ("accelerate_loop-stage0", "accelerate_loop-stage3")  # these run under `accelerate launch` alone
ALONE = [c for c in ACCELERATE if c.script == "accelerate_loop.py" and not c.no_peer and c.name not in LAUNCHED]
OVERFLOW = next(case for case in ACCELERATE if case.no_peer)
SEVERAL = [case for case in ACCELERATE if case.script == "accelerate_models.py"]
AsRecorded = Callable[[Case], dict[str, Any]]


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_a_loop_of_ones_own_has_deepspeeds_numbers(case: Case, as_recorded: AsRecorded) -> None:
    """It resumes to the bit, and exports its weights in every way, in the same run."""
    as_recorded(case)


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
def test_several_models_have_deepspeeds_numbers(case: Case, as_recorded: AsRecorded) -> None:
    """Real DeepSpeed cannot save the ones without an optimizer; here save_state takes all, and the numbers stay."""
    record = as_recorded(dataclasses.replace(case, arguments=(*case.arguments, "--save_all")))
    assert "zero_optimization.reduce_bucket_size: unknown key" in record["output"], "dotted keys are told, and no error"


def test_a_step_that_overflows_is_skipped_and_said(tmp_path: Path) -> None:
    """fp16 from a loss scale that is too high: skipped steps come first, and the schedule waits for them."""
    rows = run_case(OVERFLOW, tmp_path)["steps"]
    assert [row["skipped"] for row in rows] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert rows[3]["loss"] == rows[0]["loss"], "the second epoch begins where the first did: nothing was learned"
    rates = [row["learning_rate"] for row in rows]
    assert rates[:3] == [0.0] * 3 and rates[3] > rates[4] > rates[5] > 0, rates
    assert all(0.7 < row["grad_norm"] < 0.9 for row in rows[3:]), "unscaled"


def launched(folder: Path, case: Case, *flags: str) -> list[str]:
    """What a loop under `accelerate launch` has otherwise than real DeepSpeed, which was told `--cpu`:
    here nothing says so, and the ranks find each other."""
    out = folder / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *flags]
    arguments = [each for each in case.arguments if each != "--cpu"]
    command += [str(SCRIPTS / case.script), "--out", str(out), *arguments]
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.update(path_variables(env))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=folder)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-6000:]}"
    record = json.loads((out / "record.json").read_text())
    return differences(case, record, json.loads((RECORDED / f"{case.name}.json").read_text()))


def test_accelerate_launch_with_flags(tmp_path: Path) -> None:
    case = next(each for each in ACCELERATE if each.name == LAUNCHED[1])
    ranks = ("--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    stage = ("--zero_stage", "3", "--zero3_init_flag", "true", "--zero3_save_16bit_model", "true")
    found = launched(tmp_path, case, *ranks, *stage, "--gradient_clipping", "1.0")
    assert not found, "\n".join(found)


def test_accelerate_launch_with_a_config_file(tmp_path: Path) -> None:
    """As `accelerate config` writes it, with a ds_config.json named in it."""
    case = next(each for each in ACCELERATE if each.name == LAUNCHED[0])
    config, settings = tmp_path / "ds_config.json", tmp_path / "default_config.yaml"
    config.write_text(json.dumps(case.config))
    deepspeed = {"deepspeed_config_file": str(config), "zero3_init_flag": False}
    answers = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    settings.write_text(json.dumps({**answers, "num_machines": 1, "num_processes": 2}))
    found = launched(tmp_path, case, "--config_file", str(settings))
    assert not found, "\n".join(found)
