"""The command line as a user starts it: in a process, in an empty folder, without this machine's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]

_FOREIGN = (
    "SLURM_",
    "CUDA_",
    "DS_ENV",
    "TRITONSPEED_",
    "TORCHELASTIC_",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "OMP_",
    "GLOO_",
)


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed launcher cannot remove its folder
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(*words, prefix=(), **env)`` starts `tritonspeed` with these words; what still runs later is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(*words: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "tritonspeed.cli", *words]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env})
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(40)
