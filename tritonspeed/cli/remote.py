"""One launcher on each host, over ssh, held together: the first to fail ends the others, and its words come last.

Each host's launcher (`tritonspeed.cli.launch --controlled`) has its standard input open to this process. When that
closes, because this process ended it or was itself killed, the host ends its ranks: none outlives its launcher.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tritonspeed.cli import failures
from tritonspeed.cli.launch import GRACE_S
from tritonspeed.cli.plan import HostPlan

_POLL_S = 0.1
_COLLECT_S = 1.0
"""From the first host's end until the others are told: time for a failure that came first elsewhere to arrive."""


@dataclass(frozen=True)
class Ssh:
    """How to reach another host: the port (None leaves it to ssh's configuration), more options of ssh, a script to
    source there first."""

    port: int | None = None
    options: tuple[str, ...] = ()
    venv_script: str = ""


@dataclass
class _Running:
    """A host whose launcher has been started."""

    host: str
    process: subprocess.Popen[bytes]
    pump: threading.Thread = field(init=False)
    failures: list[failures.Failure] = field(default_factory=list)
    muted: bool = False

    def __post_init__(self) -> None:
        self.pump = threading.Thread(target=self._forward, daemon=True)
        self.pump.start()

    def _forward(self) -> None:
        assert self.process.stderr is not None, "the launcher was started without a pipe for its standard error"
        for raw in self.process.stderr:
            line = raw.decode(errors="replace")
            if line.startswith(failures.MARK):
                self.failures = failures.from_line(line)
            elif not self.muted:
                print(line, file=sys.stderr, end="", flush=True)

    def release(self) -> None:
        """Close its standard input, which ends its ranks."""
        assert self.process.stdin is not None, "the launcher was started without a pipe for its standard input"
        self.process.stdin.close()


def command_for(plan: HostPlan, ssh: Ssh, folder: str) -> list[str]:
    """The command that runs `plan` on its host, in `folder`.

    Args:
        plan: what to run there. On this machine itself no ssh is needed.
        ssh: how to reach it.
        folder: the working directory, which must be there on every host.
    """
    launcher = [sys.executable, "-m", "tritonspeed.cli.launch", "--controlled", *plan.torchrun]
    variables = ["env", *(f"{name}={value}" for name, value in plan.env.items())]
    if is_this_machine(plan.host):
        return [*variables, *launcher]
    there = f"cd {shlex.quote(folder)} && exec {shlex.join([*variables, *launcher])}"
    if ssh.venv_script:
        there = f". {shlex.quote(ssh.venv_script)} && {there}"
    port = ["-p", str(ssh.port)] if ssh.port is not None else []
    # BatchMode: an unattended launch must fail at once where ssh would ask for a password.
    return ["ssh", "-o", "BatchMode=yes", *port, *ssh.options, plan.host, there]


def is_this_machine(host: str) -> bool:
    """Whether a host file's name is this machine's own."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.gethostname().partition(".")[0])


def run_hosts(commands: Mapping[str, Sequence[str]]) -> int:
    """Run one command per host until all have ended or one has failed.

    Args:
        commands: host name to command, in the order of node ranks.

    Returns:
        0; the exit status of the rank that failed first; 255 where ssh itself failed; 130 after Ctrl-C.
    """
    running = [_start(host, command) for host, command in commands.items()]
    try:
        while not any(host.process.poll() for host in running):
            if all(host.process.poll() == 0 for host in running):
                return 0
            time.sleep(_POLL_S)
        first = next(host for host in running if host.process.poll())
        time.sleep(_COLLECT_S)
    except KeyboardInterrupt:
        _end(running)
        print("SIGINT: every rank on every host has been ended", file=sys.stderr)
        return 130
    _end(running)
    found = sorted((failure for host in running for failure in host.failures), key=lambda failure: failure.time)
    if found:
        print(failures.describe(found), file=sys.stderr, flush=True)
        return found[0].status
    status = first.process.returncode
    print(f"{first.host}: the launcher ended with exit status {status}; its output is above", file=sys.stderr)
    return status if status > 0 else 128 - status


def _start(host: str, command: Sequence[str]) -> _Running:
    # A session of its own keeps the terminal's Ctrl-C from ssh: this process hears it and ends the hosts in order.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return _Running(host, process)


def _end(running: Sequence[_Running]) -> None:
    """End what still runs, hide what it says about being ended, and read all failures that were handed over."""
    for host in running:
        host.muted = host.process.poll() is None
        host.release()
    deadline = time.monotonic() + GRACE_S + 2.0  # its own watcher kills its ranks after GRACE_S
    for host in running:
        try:
            host.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(host.process.pid, 9)
            host.process.wait()
        host.pump.join(1.0)
