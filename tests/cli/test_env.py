"""Scripts that say `deepspeed`, under each launcher a user may have: `tritonspeed env`, `deepspeed`, none at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonspeed.cli import deepspeed_command
from tritonspeed.integrations import names
from tritonspeed.integrations.finder import FOLDER

CLI = (sys.executable, "-m", "tritonspeed.cli")
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}
SCRIPT = """
import argparse, os, subprocess, sys
import torch
import deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--deepspeed", default=None)
args = parser.parse_args()
torch.manual_seed(0)
engine, optimizer, _, _ = deepspeed.initialize(model=torch.nn.Linear(3, 1), config=args.deepspeed)
for _ in range(2):
    loss = engine(torch.ones(2, 3)).square().mean()
    engine.backward(loss)
    engine.step()
rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
said = f"rank {rank} of {world}, step {engine.global_steps}"
if rank == 0:
    look = "import deepspeed; print(deepspeed.__version__)"
    inner = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    said += f", inside {inner.stdout.strip()}{inner.stderr}"
print(said + "\\n", end="")
"""
ACCELERATE = """
import torch
from accelerate import Accelerator

accelerator = Accelerator()
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
rows = accelerator.gather(torch.tensor([accelerator.process_index]))
print(f"{accelerator.process_index} of {accelerator.num_processes}: {len(loader)} {rows.tolist()}"
      f" {type(model).__module__} {accelerator.distributed_type.value}\\n", end="")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "accelerate_train.py").write_text(ACCELERATE)
    return tmp_path


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(filter(None, done.stdout.splitlines()))


def trained(world: int) -> list[str]:
    """What the ranks of the script say; what rank 0 started found the same `deepspeed`, and did not say so again."""
    first = f"rank 0 of {world}, step 2, inside {names.VERSION}"
    return [first, *(f"rank {rank} of {world}, step 2" for rank in range(1, world))]


def test_under_torchrun(folder: Path) -> None:
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", "2")
    done = run(*CLI, "env", *torchrun, "train.py", "--deepspeed", "ds.json")
    assert lines(done) == trained(2)
    assert done.stderr.count("`deepspeed` is tritonspeed") == 1


def test_under_the_command_deepspeed(folder: Path) -> None:
    command = (sys.executable, "-m", "tritonspeed.cli.deepspeed_command")
    done = run(*command, "--num_gpus", "2", "train.py", "--deepspeed", "ds.json")
    assert lines(done) == trained(2)
    assert done.stderr.count("`deepspeed` is tritonspeed") == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--no_local_rank --launcher pdsh --num_gpus 2 --master_addr alpha --master_port 29500",
        "--no_local_rank --launcher pdsh --exclude beta:1 --master_port 29500",
        "--no_local_rank --launcher pdsh --include alpha:0,1@beta --master_port 29500 --module",
        "--node_rank 1 --no_ssh --num_gpus 2 --master_addr alpha --master_port 29500",
    ],
)
def test_the_flags_that_accelerate_gives_the_command(flags: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    words = ["--dry-run", "-q", "--hostfile", "hosts", *flags.split(), "train.py", "--deepspeed", "ds.json"]
    assert deepspeed_command.main(words) == 0
    printed = capsys.readouterr().out
    assert "train.py --deepspeed ds.json" in printed and "29500" in printed
    assert f"PYTHONPATH={FOLDER}" in printed.replace("'", "")


def test_without_a_launcher_there_is_one_rank(folder: Path) -> None:
    in_the_process = SCRIPT.replace("import deepspeed; print(deepspeed.__version__)", "print('anything')")
    (folder / "alone.py").write_text(f"import tritonspeed.hf\n{in_the_process}")
    done = run(sys.executable, "alone.py", "--deepspeed", "ds.json")
    assert lines(done) == ["rank 0 of 1, step 2, inside anything"]


def test_under_accelerate_launch_there_are_two_processes(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="it is in the extra [hf]")
    launch = ("accelerate", "launch", "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2")
    done = run(*CLI, "env", *launch, "--main_process_port", "0", "accelerate_train.py")
    assert [line[:18] for line in lines(done)] == ["0 of 2: 2 [0, 1] t", "1 of 2: 2 [0, 1] t"]
    assert all(line.endswith("tritonspeed.engine.engine DEEPSPEED") for line in lines(done)), done.stdout
    assert done.stderr.count("`deepspeed` is tritonspeed") == 1


def test_without_a_command_it_prints_what_a_shell_evaluates(folder: Path) -> None:
    say = "import deepspeed; print(deepspeed.__version__)"
    done = run("sh", "-c", f'eval "$("$0" -m tritonspeed.cli env)"; "$0" -c "{say}"', sys.executable, PYTHONPATH="/a b")
    assert done.stdout == f"{names.VERSION}\n"
    assert run(*CLI, "env", PYTHONPATH="/a b").stdout == f"export PYTHONPATH='{FOLDER}:/a b'\n"


def test_what_is_not_there_is_named(folder: Path) -> None:
    done = subprocess.run([*CLI, "env", "no-such-command"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "there is no command 'no-such-command'" in done.stderr


class TestBesideARealDeepSpeed:
    @pytest.fixture(autouse=True)
    def _real(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = tmp_path / "real" / "deepspeed" / "launcher" / "runner.py"
        runner.parent.mkdir(parents=True)
        (tmp_path / "real" / "deepspeed" / "__init__.py").write_text("__version__ = '0.99.1'\n")
        runner.write_text("def main(args): print('the real runner got', args)\n")
        (tmp_path / "real" / "deepspeed-0.99.1.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.99.1\n"
        (tmp_path / "real" / "deepspeed-0.99.1.dist-info" / "METADATA").write_text(metadata)
        (tmp_path / "train.py").write_text("import deepspeed\nprint(deepspeed.__version__)\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "real"))

    def start(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **env}
        return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, env=env)

    def test_run_leaves_it_alone_and_says_so(self) -> None:
        done = self.start("tritonspeed.cli", "run", "--num_gpus", "1", "--no_local_rank", "train.py")
        assert done.stdout == "0.99.1\n"
        assert "`import deepspeed` gives DeepSpeed 0.99.1 (TRITONSPEED_AS_DEEPSPEED=1 gives" in done.stderr

    def test_run_takes_its_place_when_forced_and_says_so(self) -> None:
        forced = {"TRITONSPEED_AS_DEEPSPEED": "1"}
        done = self.start("tritonspeed.cli", "run", "--num_gpus", "1", "--no_local_rank", "train.py", **forced)
        assert done.stdout == f"{names.VERSION}\n"
        assert "in place of the DeepSpeed 0.99.1" in done.stderr

    def test_env_refuses_unless_forced(self) -> None:
        done = self.start("tritonspeed.cli", "env")
        assert (done.returncode, done.stdout) == (2, "")
        assert "there is a DeepSpeed 0.99.1" in done.stderr and "TRITONSPEED_AS_DEEPSPEED=1" in done.stderr
        assert str(FOLDER) in self.start("tritonspeed.cli", "env", TRITONSPEED_AS_DEEPSPEED="1").stdout

    def test_the_command_hands_over(self) -> None:
        done = self.start(deepspeed_command.__name__, "--num_gpus", "2", "train.py")
        assert done.stdout == "the real runner got ['--num_gpus', '2', 'train.py']\n"
        assert "DeepSpeed 0.99.1's own launcher (TRITONSPEED_AS_DEEPSPEED=1 for" in done.stderr
