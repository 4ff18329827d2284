"""Hugging Face's Trainer, watched: the engine is ``trainer.model_wrapped``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parent / "scripts" / "trainer_traced.py"


def run(folder: Path) -> tuple[dict[str, Any], str]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1, "stage3_param_persistence_threshold": 0},
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    (folder / "ds_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "tritonspeed.cli", "run", "--num_gpus", "2", "--no_local_rank", str(SCRIPT)]
    command += ["--deepspeed", str(folder / "ds_config.json"), "--out", str(folder)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "facts.json").read_text()), done.stdout + done.stderr


def test_a_trainer_that_is_watched(tmp_path):
    facts, output = run(tmp_path)
    assert len(facts["steps"]) == 4 and facts["counted"] > 0
    assert {"all_gather_into_tensor", "reduce_scatter_tensor", "exchange"} <= set(facts["operations"])
    tables = output.count("outside the engine")
    assert tables == 1 and "Comm. Op" in output and "model.layers.0" in output
    events = json.loads(Path(facts["trace"]).read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans if event["cat"] == "step"} == {"step 2", "step 3"}
    per_unit = Counter((e["pid"], e["cat"], e["args"]["unit"]) for e in spans if e["cat"] in ("forward", "backward"))
    units = {unit for _, _, unit in per_unit}
    assert len(units) > 2 and set(per_unit.values()) == {4}  # two steps of two micro-steps, on both ranks
    assert len(per_unit) == 2 * 2 * len(units)
