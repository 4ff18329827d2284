"""`tritonspeed run --dry-run`: which line each host gets for which flags, and what is refused."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch

from tritonspeed import cli


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``lines(*words, gpus=N)`` is what a dry run prints to be typed on each host."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "hosts").write_text("alpha slots=4\nbeta slots=2\n")

    def print_lines(*words: str, gpus: int = 0) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert cli.main(["run", "--dry-run", "-q", *words]) == 0, capsys.readouterr().err
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]

    return print_lines


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["run", "--dry-run", *words]) == 2
    return capsys.readouterr().err


def option(line: str, name: str) -> str | None:
    words = shlex.split(line)
    return words[words.index(name) + 1] if name in words else None


def variable(line: str, name: str) -> str | None:
    return next((w.partition("=")[2] for w in shlex.split(line) if w.startswith(f"{name}=")), None)


@pytest.mark.parametrize(("gpus", "words", "num_procs"), [(0, (), "1"), (4, (), "4"), (4, ("--num_gpus", "3"), "3")])
def test_ranks_of_one_machine(lines, gpus: int, words: tuple[str, ...], num_procs: str) -> None:
    (line,) = lines(*words, "train.py", "--lr", "1e-3", gpus=gpus)
    assert option(line, "--nproc-per-node") == num_procs
    assert "--standalone" in line
    assert line.endswith("--module tritonspeed.cli.rank_entry --pass-local-rank train.py --lr 1e-3")


@pytest.mark.parametrize("flag", ["--num_gpus", "--num_accelerators", "--num_procs"])
def test_three_names_of_one_flag(lines, flag: str) -> None:
    assert option(lines(flag, "2", "train.py")[0], "--nproc-per-node") == "2"


def test_a_given_port_is_kept(lines) -> None:
    (line,) = lines("--master_port", "29999", "train.py")
    assert option(line, "--master-port") == "29999"
    assert "--standalone" not in line


def test_include_and_exclude_choose_devices(lines, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (line,) = lines("--include", "localhost:1,3", "train.py", gpus=4)
    assert (option(line, "--nproc-per-node"), variable(line, "CUDA_VISIBLE_DEVICES")) == ("2", "1,3")
    (line,) = lines("--exclude", "localhost:0", "train.py", gpus=4)
    assert variable(line, "CUDA_VISIBLE_DEVICES") == "1,2,3"
    (line,) = lines("train.py", gpus=4)
    assert variable(line, "CUDA_VISIBLE_DEVICES") is None


def test_hidden_devices_stay_hidden(lines, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    (line,) = lines("--include", "localhost:6", "train.py", gpus=2)
    assert (option(line, "--nproc-per-node"), variable(line, "CUDA_VISIBLE_DEVICES")) == ("1", "6")
    (line,) = lines("train.py", gpus=2)
    assert (option(line, "--nproc-per-node"), variable(line, "CUDA_VISIBLE_DEVICES")) == ("2", None)
    assert "no slot 0; its slots are 4,6" in mistake(capsys, "--include", "localhost:0", "train.py")
    assert "3 ranks want a GPU each and 2 are visible, CUDA_VISIBLE_DEVICES=4,6" in mistake(
        capsys, "--num_gpus", "3", "train.py"
    )


def test_options_of_the_ranks(lines, tmp_path: Path) -> None:
    words = ("--no_local_rank", "--bind_core_list", "0-3,8", "--enable_each_rank_log", "logs", "--num_gpus", "2")
    (line,) = lines(*words, "train.py")
    assert "--pass-local-rank" not in line
    assert option(line, "--bind-cores") == "0-3,8"
    assert variable(line, "OMP_NUM_THREADS") == "2"
    log_file = Path(option(line, "--log-file") or "")
    assert log_file.parent == tmp_path / "logs"
    assert log_file.name.endswith("_rank{rank}.log")
    assert option(lines("--bind_cores_to_rank", "train.py")[0], "--bind-cores") == "all"


def test_hostfile_gives_one_line_per_host(lines) -> None:
    alpha, beta = lines("-H", "hosts", "--master_port", "30000", "train.py")
    for line, rank, num_procs in ((alpha, "0", "4"), (beta, "1", "2")):
        assert option(line, "--nnodes") == "2"
        assert option(line, "--node-rank") == rank
        assert option(line, "--nproc-per-node") == num_procs
        assert (option(line, "--master-addr"), option(line, "--master-port")) == ("alpha", "30000")
        assert variable(line, "CUDA_VISIBLE_DEVICES") is None
    assert lines("-H", "hosts", "--no_ssh", "--node_rank", "1", "--master_port", "30000", "train.py") != [alpha]


def test_hostfile_with_a_choice_of_slots(lines) -> None:
    alpha, beta = lines("-H", "hosts", "--include", "alpha:3,1@beta", "--master_addr", "10.0.0.1", "train.py")
    assert variable(alpha, "CUDA_VISIBLE_DEVICES") == "1,3"
    assert variable(beta, "CUDA_VISIBLE_DEVICES") is None
    assert option(beta, "--master-addr") == "10.0.0.1"
    (line,) = lines("-H", "hosts", "--num_nodes", "1", "--num_gpus", "2", "train.py")
    assert variable(line, "CUDA_VISIBLE_DEVICES") == "0,1"


def test_nodes_that_number_themselves(lines) -> None:
    for line in lines("-H", "hosts", "--num_nodes", "1:2", "train.py"):
        assert option(line, "--nnodes") == "1:2"
        assert option(line, "--rdzv-endpoint") == "alpha:29500"
        assert option(line, "--node-rank") is None


def test_nodes_without_a_hostfile(lines, capsys) -> None:
    first, second = lines("--num_nodes", "2", "--master_addr", "10.0.0.1", "--num_gpus", "2", "train.py")
    assert (option(first, "--node-rank"), option(second, "--node-rank")) == ("0", "1")
    assert "without a host file" in mistake(capsys, "--num_nodes", "2", "train.py")


def test_ssh_command_carries_folder_variables_and_options(lines, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 1")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    (tmp_path / ".deepspeed_env").write_text("GREETING=hello\n")
    words = [
        "-H",
        "hosts",
        "--ssh_port",
        "2222",
        "--launcher_args",
        "-o ConnectTimeout=5",
        "--venv_script",
        "my env.sh",
    ]
    assert cli.main(["run", "--dry-run", "--launcher", "pdsh", "-H", "hosts", "train.py"]) == 0
    assert "pdsh is not needed" in capsys.readouterr().err
    assert cli.main(["run", "--dry-run", *words, "train.py"]) == 0
    out = capsys.readouterr().out
    comment = next(line for line in out.splitlines() if line.startswith("# started by: ") and "--node-rank 1" in line)
    command = shlex.split(comment.removeprefix("# started by: "))
    assert command[:-1] == ["ssh", "-o", "BatchMode=yes", "-p", "2222", "-o", "ConnectTimeout=5", "beta"]
    there = command[-1]
    assert there.startswith(f". 'my env.sh' && cd {shlex.quote(os.getcwd())} && exec env ")
    assert "'NCCL_SOCKET_IFNAME=eth 1'" in there
    assert "GREETING=hello" in there
    assert "s3cret" not in out


def test_inside_a_slurm_step(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"JOB_ID": "7", "STEP_ID": "0", "STEP_NODELIST": "n[1-2]", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "2"}
    for name, value in {**step, "NODEID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (line,) = lines("train.py", gpus=8)
    assert option(line, "--node-rank") == "1"
    assert (option(line, "--master-addr"), option(line, "--master-port")) == ("n1", "20007")
    assert option(line, "--nproc-per-node") == "8"


def test_inside_a_slurm_allocation(lines, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    (line,) = lines("--num_gpus", "4", "--no_local_rank", "train.py", "--lr", "1")
    assert line.startswith("srun --ntasks-per-node=1 ")
    assert "--nodes=3" in line
    assert line.endswith(" --no_local_rank --quiet --num_procs 4 --log_level critical train.py --lr 1")
    (line,) = lines("--launcher", "slurm", "--include", "n1@n2", "--launcher_args", "-p gpu", "train.py")
    assert "--nodes=2 --ntasks=2 --nodelist=n1,n2 -p gpu " in line
    assert "whole hosts" in mistake(capsys, "--launcher", "slurm", "--include", "n1:0", "train.py")
    assert " OMP_NUM_THREADS=" in lines("--num_nodes", "1", "train.py")[0]
    monkeypatch.setenv("PATH", "")
    assert cli.main(["run", "train.py"]) == 2
    assert "srun is not on the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--launcher", "openmpi"), "--launcher ssh"),
        (("--launcher", "mvapich"), "--launcher ssh"),
        (("--launcher", "carrier-pigeon"), "ssh and slurm"),
        (("--launcher", "pdsh", "--launcher_args", "-f 8"), "--launcher ssh"),
        (("--elastic_training",), "--num_nodes MIN:MAX"),
        (("--max_elastic_nodes", "4"), "--num_nodes MIN:MAX"),
        (("--autotuning", "tune"), "ts.estimate"),
        (("--include", "a", "--num_gpus", "2"), "drop --num_nodes and --num_gpus"),
        (("--hostfile", "hosts", "--num_nodes", "3:2"), "MIN ≤ MAX"),
        (("--hostfile", "hosts", "--num_nodes", "x"), "MIN ≤ MAX"),
        (("--hostfile", "nowhere"), "no such file"),
        (("--hostfile", "hosts", "--no_ssh", "--node_rank", "2"), "there are 2 hosts"),
        (("--hostfile", "hosts", "--bind_core_list", "0"), "4 ranks"),
        (("--hostfile", "hosts", "--num_nodes", "3"), "there are 2 hosts"),
    ],
)
def test_refused_by_name_with_an_alternative(lines, capsys, words: tuple[str, ...], named: str) -> None:
    assert named in mistake(capsys, *words, "train.py")


def test_no_ssh_must_know_which_host_this_is(lines, capsys) -> None:
    assert cli.main(["run", "--hostfile", "hosts", "--no_ssh", "train.py"]) == 2
    assert "Say so with --node_rank" in capsys.readouterr().err
