"""Run `run_one` in processes of its own, each system under its own interpreter, and read back its line of JSON."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESULT "  # the line that carries the JSON; systems print much else on stdout
OURS = "tritonspeed"
QUIET_CORES = 0.15  # cores taken by others below which a run counts as undisturbed


class RunFailed(RuntimeError):
    """A run ended badly, or ran past its limit; the message ends with what it said last."""


def python_for(system: str, peer_python: str | None) -> str:
    """The interpreter that has the system: DeepSpeed lives in the peers' environment, ours and torch's own in this one.

    torch's systems run where DeepSpeed runs when that is given, since both environments pin the same torch.
    """
    return sys.executable if system == OURS or peer_python is None else peer_python


def environment(python: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A run's environment: that interpreter's own tools (ninja) first on PATH, DeepSpeed told there is no GPU."""
    tools = str(Path(python).parent)  # not resolved: a virtual environment's python is a link out of it
    return {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", **(extra or {})}


def run(
    python: str,
    arguments: Sequence[str],
    *,
    num_ranks: int = 2,
    limit_s: float = 180,
    extra_environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Launch run_one on `num_ranks` gloo ranks, one torch thread each (torchrun's default), and return what it printed.

    A run that printed its result and then aborted while the interpreter was taken down ("terminate called without an
    active exception": seen with plain DDP, DeepSpeed and ours) is returned too, with its "exit_status" beside the rest.
    "others_cores" says how many cores worked for somebody else meanwhile.

    Raises:
        RunFailed: the run ended without a result, or `limit_s` seconds were not enough: all its processes are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", str(port)]
    command += ["-m", "bench.systems.run_one", *arguments]
    ticks_before, own_before = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(python, extra_environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise RunFailed(f"{' '.join(arguments)}: not done after {limit_s} s\n{output[-2000:]}") from None
    results = [line[len(MARK) :] for line in output.splitlines() if line.startswith(MARK)]
    if not results:
        raise RunFailed(f"{' '.join(arguments)}: exit status {process.returncode}\n{output[-4000:]}")
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = own.ru_utime + own.ru_stime - own_before.ru_utime - own_before.ru_stime
    others = (busy_seconds() - ticks_before - own_s) / (time.monotonic() - start)
    return {**json.loads(results[-1]), "exit_status": process.returncode, "others_cores": max(0.0, others)}


def quiet_run(python: str, arguments: Sequence[str], *, attempts: int = 4) -> dict[str, Any]:
    """`run`, after an idle second and again while others worked beside it; the quietest of the attempts.

    A step of two ranks on two cores doubles when a neighbour takes one of them, and no median over rounds mends that.
    After `attempts` the quietest is returned all the same, its "others_cores" above `QUIET_CORES`.
    """
    results = []
    for _ in range(attempts):
        wait_until_idle()
        results.append(run(python, arguments))
        if results[-1]["others_cores"] <= QUIET_CORES:
            break
    return min(results, key=lambda result: result["others_cores"])


def wait_until_idle(idle_fraction: float = 0.9, limit_s: float = 12) -> None:
    """Wait for a second in which the cores were idle for that fraction of the time, `limit_s` seconds at most."""
    end = time.monotonic() + limit_s
    idle = False
    while not idle and time.monotonic() < end:
        before, start = busy_seconds(), time.monotonic()
        time.sleep(1)
        used = (busy_seconds() - before) / (time.monotonic() - start) / (os.cpu_count() or 1)
        idle = used <= 1 - idle_fraction


def busy_seconds() -> float:
    """Core-seconds that the machine has worked since it started: user, nice, system, interrupts, stolen."""
    user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
