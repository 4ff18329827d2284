"""Runs users' scripts as users run them: `tritonspeed run --num_gpus 2 script.py --deepspeed ds_config.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from script_cases import SCRIPTS, Case

TIMEOUT_S = 240
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "WANDB_MODE": "offline"}


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Run it under tritonspeed; what it recorded, with what it printed under "output".

    Raises:
        AssertionError: it failed, with the end of what it printed.
    """
    config = folder / "ds_config.json"
    config.write_text(json.dumps(case.config))
    out = folder / "out"
    command = [sys.executable, "-m", "tritonspeed.cli", "run", "--num_gpus", "2", "--no_local_rank"]
    command += [str(SCRIPTS / case.script), *case.flags, str(config), "--out", str(out), *case.arguments]
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **case.environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=folder)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{case.name}: {' '.join(command)}\n{output[-6000:]}"
    record = json.loads((out / "record.json").read_text())
    return {**record, "output": output, "out": str(out)}


def differences(case: Case, record: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What ``other`` has that ``record`` lacks or has otherwise, to the case's decimals; empty where nothing is."""
    found = []
    if len(record["steps"]) != len(other["steps"]):
        found.append(f"{len(record['steps'])} steps and {len(other['steps'])}")
    pairs = [(f"step {n}", a, b) for n, (a, b) in enumerate(zip(record["steps"], other["steps"], strict=False), 1)]
    for where, a, b in [*pairs, ("the run", record["metrics"], other["metrics"])]:
        if missing := sorted(set(b) - set(a)):  # DeepSpeed tells no gradient norm at stage 0: ours may have more
            found.append(f"{where}: {', '.join(missing)} missing")
        limit = 0.5 * 10**-case.close
        found += [
            f"{where}: {key} {a[key]!r}, {b[key]!r}"
            for key in sorted(a.keys() & b.keys())
            if not _same(a[key], b[key], limit)
        ]
    return found


def _same(a: Any, b: Any, limit: float) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, limit) for x, y in zip(a, b, strict=True))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return abs(a - b) <= limit * max(1.0, abs(b))
    return a == b
