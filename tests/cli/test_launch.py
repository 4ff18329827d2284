"""Real ranks: what they are given, and how all of them end when one fails or someone stops them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritonspeed import cli

# Blocked for ten minutes unless somebody ends it: a test that waits for that has failed long before.
_BLOCKED_IN_A_COLLECTIVE = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
t = torch.ones(1)
dist.all_reduce(t)
open(f"ready{dist.get_rank()}", "w").close()
if dist.get_rank() == 1:
    WHAT_RANK_ONE_DOES
dist.all_reduce(t)
"""
_LIMIT_S = 25  # less than torchrun's own 30 seconds, after which it would have ended the ranks without us


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=_LIMIT_S)
    return process.returncode, out, error


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{[str(path) for path in paths if not path.exists()]} did not appear"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_rank_gets_what_deepspeed_gives_it(tmp_path: Path, start) -> None:
    script = """
        import multiprocessing, os, sys
        from helper import word

        def child(queue):
            queue.put(os.environ["RANK"])

        if __name__ == "__main__":
            queue = multiprocessing.get_context("spawn").SimpleQueue()
            process = multiprocessing.get_context("spawn").Process(target=child, args=(queue,))
            process.start()
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FROM_FILE", "OMP_NUM_THREADS")
            print([os.environ[name] for name in names], sys.argv[1:], queue.get(), word, len(os.sched_getaffinity(0)))
            process.join()
    """
    (tmp_path / "scripts").mkdir()
    write(tmp_path / "scripts", "helper.py", "word = 'found'")
    path = write(tmp_path / "scripts", "train.py", "\n".join(line[8:] for line in script.splitlines()))
    write(tmp_path, ".deepspeed_env", "FROM_FILE=yes")
    cores = sorted(os.sched_getaffinity(0))
    num_procs = min(2, len(cores))
    share = len(cores) // num_procs
    flags = ("--num_gpus", str(num_procs), "--bind_cores_to_rank", "--enable_each_rank_log", "logs")
    status, out, error = end_of(start("run", *flags, f"scripts/{path}", "--lr", "0.1"))
    assert (status, out, error) == (0, "", "")
    logs = sorted((tmp_path / "logs").iterdir())
    assert [log.name.partition("_")[2] for log in logs] == [f"rank{rank}.log" for rank in range(num_procs)]
    for rank, log in enumerate(logs):
        given = [str(rank), str(rank), str(num_procs), str(num_procs), "yes", str(share)]
        arguments = [f"--local_rank={rank}", "--lr", "0.1"]
        assert log.read_text() == f"{given} {arguments} {rank} found {share}\n"


def test_the_printed_line_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "train.py", "import os, sys; print('rank', os.environ['RANK'], sys.argv[1:])")
    assert cli.main(["run", "--dry-run", "--num_gpus", "2", "train.py", "a b"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].replace(" python ", f" {shlex.quote(sys.executable)} ", 1)
    printed = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=_LIMIT_S).stdout
    assert sorted(printed.splitlines()) == [f"rank {r} ['--local_rank={r}', 'a b']" for r in range(2)]


def test_a_program_without_python(tmp_path: Path, start) -> None:
    words = ("--num_gpus", "2", "--no_python", "--no_local_rank", "sh", "-c", "echo $RANK; exit $((RANK * 3))")
    status, _, error = end_of(start("run", *words))
    assert status == 3
    assert error.splitlines()[-1].startswith("rank 1 of 2 failed: it ended with exit status 3 and no exception")


def test_one_rank_raises_while_the_other_waits_for_it(tmp_path: Path, start) -> None:
    raises = 'raise ValueError("rank one is unwell\\nand says so at length")'
    write(tmp_path, "train.py", _BLOCKED_IN_A_COLLECTIVE.replace("WHAT_RANK_ONE_DOES", raises))
    status, _, error = end_of(start("run", "--num_gpus", "2", "--no_local_rank", "train.py"))
    assert status == 1
    lines = error.splitlines()
    assert lines[-1].startswith("rank 1 of 2 failed: ValueError: rank one is unwell [")
    trace = error[error.index("Traceback") :]
    assert "train.py" in trace.splitlines()[1], "the traceback begins in the script, not in the launcher"
    assert "ValueError: rank one is unwell\nand says so at length\nrank 1 of 2 failed" in trace
    assert error.count("Traceback") == 1, "one traceback: the other rank's loss of its peer is no news"


def test_a_rank_that_does_not_listen_is_killed(tmp_path: Path, start) -> None:
    script = """
import os, signal, time
open(f"pid{os.environ['RANK']}", "w").write(str(os.getpid()))
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("deaf", "w").close()
    time.sleep(600)
while not os.path.exists("deaf"):
    time.sleep(0.05)
raise SystemExit("rank one gives up")
"""
    write(tmp_path, "train.py", script)
    status, _, error = end_of(start("run", "--num_gpus", "2", "train.py"))
    assert status == 1
    assert error.splitlines()[-1].startswith("rank 1 of 2 failed: rank one gives up [")
    assert "rank 0" not in error, "a rank that the launcher ended did not fail"
    assert is_gone(int((tmp_path / "pid0").read_text()))


def test_ctrl_c_ends_ranks_that_are_blocked(tmp_path: Path, start) -> None:
    does = 'open("pid", "w").write(str(os.getpid())); time.sleep(600)'
    write(tmp_path, "train.py", _BLOCKED_IN_A_COLLECTIVE.replace("WHAT_RANK_ONE_DOES", does))
    launcher = start("run", "--num_gpus", "2", "--no_local_rank", "train.py")
    wait_for(tmp_path / "ready0", tmp_path / "ready1", tmp_path / "pid")
    launcher.send_signal(signal.SIGINT)
    status, _, error = end_of(launcher)
    assert status == 130
    assert error.splitlines()[-1] == "SIGINT: every rank has been ended"
    assert "Traceback" not in error
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path, start) -> None:
    script = "import os, time\nopen(f\"pid{os.environ['RANK']}\", 'w').write(str(os.getpid()))\n"
    write(tmp_path, "train.py", script + "open(f\"ready{os.environ['RANK']}\", 'w').close()\ntime.sleep(600)")
    launcher = start("run", "--num_gpus", "2", "train.py")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.kill()
    launcher.wait()
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 10
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
