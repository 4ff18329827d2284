"""examples/bigger_than_memory.py, small: it trains from disk, stays under the bound it printed, and leaves no files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "bigger_than_memory.py"
STEPS = 4


def test_it_trains_from_disk_under_its_bound(tmp_path: Path) -> None:
    settings = ["--parameters", "2e6", "--steps", str(STEPS), "--rows", "1", "--length", "128", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, EXAMPLE, *settings], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["parameters"] > 2e6 and run["peak_bytes"] <= run["bound_bytes"]
    assert str(run["estimate"]) in done.stdout.split("step 1 ")[0], "the estimate comes first"
    losses = [step["loss"] for step in run["steps"]]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    last = run["steps"][-1]
    assert last["disk_bytes"] > 24 * run["parameters"], "two slots of master and moments, and large parameters"
    read, written = last["links"]["disk read"][0], last["links"]["disk write"][0]
    assert read > 12 * run["parameters"] and written > 12 * run["parameters"], "each step reads and writes them all"
    assert max(b for _, b in run["samples"]) <= run["peak_bytes"]
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "run.json"], "no files are left"
