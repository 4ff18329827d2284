"""Adapters: trained with DeepSpeed's numbers, saved, loaded, merged; what is frozen stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from script_cases import PEFT, Case
from script_runs import run_case

AsRecorded = Callable[[Case], dict[str, Any]]
RESUMED = "peft_lora-stage3"


@pytest.mark.parametrize("case", [case for case in PEFT if case.name != RESUMED], ids=lambda case: case.name)
def test_adapters_have_deepspeeds_numbers(case: Case, as_recorded: AsRecorded) -> None:
    record = as_recorded(case)
    if case.script == "peft_loop.py":  # saved with exclude_frozen_parameters
        names = {name for file in Path(record["out"], "two").rglob("*.safetensors") for name in names_in(file)}
        weights = {name for name in names if not name.startswith(("__pad__", "state["))}
        frozen = {name for name in weights if "lora_" not in name and "prompt_encoder" not in name}
        assert weights and not frozen, f"frozen, and in the checkpoint: {sorted(frozen)}"


def names_in(file: Path) -> list[str]:
    """What a safetensors file holds."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_a_run_is_resumed_from_its_adapters(as_recorded: AsRecorded, tmp_path: Path) -> None:
    """In another process, from the checkpoint at step 2: its steps, and what it exports, are those of the whole run."""
    case = next(case for case in PEFT if case.name == RESUMED)
    first = as_recorded(case)
    assert "saved metadata" not in first["output"], "recomputed under gradient checkpointing as it was computed"
    checkpoint = Path(first["out"]) / "checkpoint-2"
    weights = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert 0 < weights < 4 * first["metrics"]["total"], f"{weights} bytes: the adapter alone, not the whole model"
    folder = tmp_path / "resumed"
    folder.mkdir()
    again = run_case(dataclasses.replace(case, arguments=(*case.arguments, f"--resume={checkpoint}")), folder)
    assert again["steps"][-2:] == first["steps"][-2:]
    assert again["metrics"] == first["metrics"]
