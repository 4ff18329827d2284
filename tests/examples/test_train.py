"""examples/train.py stops and goes on, with another number of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(num_ranks: int, steps: int, folder: Path) -> str:
    script = [str(EXAMPLES / "train.py"), "--deepspeed_config", str(EXAMPLES / "ds_config.json")]
    settings = ["--steps", str(steps), "--checkpoints", str(folder), "--save_every", "20"]
    launcher = [sys.executable, "-m", "tritonspeed.cli", "run", "--num_procs", str(num_ranks)]
    done = subprocess.run([*launcher, *script, *settings], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_it_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    assert "there is no checkpoint to load" in run(2, 45, tmp_path)
    assert (tmp_path / "latest").read_text().strip() == "global_step40"
    said = run(1, 80, tmp_path)
    assert "global_step40, step 40" in said and "step 80" in said and "step 40 " not in said
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == [f"global_step{n}" for n in (20, 40, 60, 80)]
