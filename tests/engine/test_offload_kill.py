"""A run that is killed at any moment leaves the last step it acknowledged, or a later one, whole on disk."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonspeed.offload.disk import committed

KILLS = 6
SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}]
import tritonspeed as ts
from models import Net, batch

torch.set_num_threads(1)
torch.manual_seed(0)
zero = {{"stage": 3, "stage3_param_persistence_threshold": 0}}
zero["offload_optimizer"] = zero["offload_param"] = {{"device": "nvme", "nvme_path": {path!r}}}
config = {{"train_micro_batch_size_per_gpu": 2, "bf16": {{"enabled": True}}, "zero_optimization": zero}}
config["optimizer"] = {{"type": "AdamW", "params": {{"lr": 1e-2}}}}
engine, *_ = ts.initialize(model=Net(vocab=97, width=65, depth=2), config=config)
last = int(sys.argv[1])
for step in range(last):
    engine.backward(engine(*batch(0, step, vocab=97)))
    engine.step()
    if step:
        print(step, flush=True)  # the update of the step before has ended, and is committed
engine.destroy()
print(last, flush=True)
"""


def start(folder: Path, steps: int) -> subprocess.Popen:
    tests = str(Path(__file__).parent.parent)
    script = SCRIPT.format(tests=tests, path=str(folder))
    return subprocess.Popen([sys.executable, "-c", script, str(steps)], stdout=subprocess.PIPE, text=True)


def masters(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(the committed step, its masters and moments), digests verified."""
    state = committed(folder / "tritonspeed" / "rank-0-of-1")
    return state.record.step, {name: state[name].clone() for name in state if not name.startswith("parameters")}


@pytest.mark.slow
def test_what_a_killed_run_has_acknowledged_is_on_disk(tmp_path):
    """The state of step n is the same bits whether the run ended there or was killed in a later step."""
    pick, wanted = random.Random(0), {}
    for number in range(KILLS):
        folder = tmp_path / str(number)
        after = pick.randint(1, 12)
        run, told = start(folder, 1000), 0
        assert run.stdout is not None
        for line in run.stdout:
            told = int(line)
            if told >= after:
                break
        run.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in run.stdout)])
        run.wait(30)
        step, state = masters(folder)
        assert step >= told
        wanted[step] = state
    assert len(wanted) > 1
    step, state = max(wanted.items())
    ended = start(tmp_path / "ended", step)
    assert ended.communicate(timeout=120)[0].split()[-1] == str(step)
    assert masters(tmp_path / "ended")[0] == step
    for name, value in masters(tmp_path / "ended")[1].items():
        assert value.equal(state[name]), name
