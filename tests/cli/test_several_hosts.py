"""Several hosts on one machine: two network namespaces with a cable between them, and an ssh that goes nowhere."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_LIMIT_S = 60

_ALL_REDUCE = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
t = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(t)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", t.item(), "over", os.environ["GLOO_SOCKET_IFNAME"])
"""


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, interface, address) of two hosts that see each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    hosts = [(f"ts{os.getpid()}{side}", f"veth-{side}", f"10.77.0.{number}") for number, side in ((1, "a"), (2, "b"))]
    (first, first_link, _), (second, second_link, _) = hosts
    commands = [f"ip netns add {first}", f"ip netns add {second}"]
    commands += [f"ip link add {first_link} netns {first} type veth peer name {second_link} netns {second}"]
    for name, link, address in hosts:
        commands += [f"ip -n {name} addr add {address}/24 dev {link}"]
        commands += [f"ip -n {name} link set {device} up" for device in ("lo", link)]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"this machine makes no network namespaces: {command}: {done.stderr.strip()}")
        yield hosts
    finally:
        for name, _, _ in hosts:  # the cable goes with the namespaces
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def test_two_hosts_of_a_hostfile_agree(namespaces: list[tuple[str, str, str]], tmp_path: Path, start) -> None:
    (tmp_path / "train.py").write_text(_ALL_REDUCE)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for _, _, address in namespaces))
    launchers = []
    for node_rank, (name, link, _) in enumerate(namespaces):
        (tmp_path / f"env{node_rank}").write_text(f"GLOO_SOCKET_IFNAME={link}\n")
        words = ("run", "--hostfile", "hosts", "--no_ssh", "--node_rank", str(node_rank), "--no_local_rank", "train.py")
        prefix = ("ip", "netns", "exec", name)
        launchers.append(start(*words, prefix=prefix, TRITONSPEED_ENV_FILE=f"env{node_rank}"))
    for node_rank, launcher in enumerate(launchers):
        out, error = launcher.communicate(timeout=_LIMIT_S)
        assert launcher.returncode == 0, error
        assert out == f"rank {node_rank} of 2 sum 11.0 over {namespaces[node_rank][1]}\n"


@pytest.fixture
def ssh_nowhere(tmp_path: Path) -> str:
    """A PATH on which `ssh` runs the command here, and notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ssh"
    calls = shlex.quote(str(tmp_path / "calls"))
    script.write_text(f'#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\necho "$1" >> {calls}\nexec sh -c "$2"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def run_over_ssh(start, path: str, script: str) -> subprocess.Popen[str]:
    Path("train.py").write_text(script)
    Path("hosts").write_text("alpha slots=1\nbeta slots=2\n")
    return start("run", "--hostfile", "hosts", *free_meeting(), "--no_local_rank", "train.py", PATH=path)


def free_meeting() -> tuple[str, ...]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ("--master_addr", "127.0.0.1", "--master_port", str(probe.getsockname()[1]))


def test_hosts_are_reached_by_ssh_and_end_together(start, ssh_nowhere: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NCCL_NOTE", "travels")
    script = """
import os, time
rank = os.environ["RANK"]
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "NCCL_NOTE")))
open(f"ready{rank}", "w").close()
while not all(os.path.exists(f"ready{other}") for other in range(3)):
    time.sleep(0.05)
if rank == "2":
    raise OSError("no disk here")
time.sleep(600)
"""
    launcher = run_over_ssh(start, ssh_nowhere, script)
    out, error = launcher.communicate(timeout=_LIMIT_S)
    assert sorted(out.splitlines()) == ["0 0 0 3 travels", "1 0 1 3 travels", "2 1 1 3 travels"]
    assert sorted((tmp_path / "calls").read_text().split()) == ["alpha", "beta"]
    assert launcher.returncode == 1
    lines = error.splitlines()
    assert lines[-2] == "OSError: no disk here"
    assert lines[-1].startswith("rank 2 of 3 failed: OSError: no disk here")
    assert error.count("failed") == 1


def test_a_host_that_cannot_be_reached(start, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text("#!/bin/sh\necho 'ssh: no route to host' >&2\nexit 255\n")
    (folder / "ssh").chmod(0o755)
    launcher = run_over_ssh(start, f"{folder}{os.pathsep}{os.environ['PATH']}", "")
    _, error = launcher.communicate(timeout=_LIMIT_S)
    assert launcher.returncode == 255
    assert "no route to host" in error
    assert error.splitlines()[-1] == "alpha: the launcher ended with exit status 255; its output is above"
