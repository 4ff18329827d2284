"""Starts the interpreter's lane: the tests beside this file once more, every kernel run by Triton's interpreter.

Each file is a process of its own, ``NUM_WORKERS`` at a time: the interpreter is chosen when a kernel is defined.
"""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tritonspeed.kernels._triton import HAS_TRITON, INTERPRETED

HERE = Path(__file__).parent
OPTIMIZERS = HERE.parent / "optim"  # their steps go through the kernels too
NUM_WORKERS = 2
TIMEOUT_S = 600
NOT_HERE = {"test_interpreter_lane.py", "test_machine_code.py", "test_adamw_machine_code.py", "test_without_triton.py"}
FILES = [path for path in sorted([*HERE.glob("test_*.py"), *OPTIMIZERS.glob("test_*.py")]) if path.name not in NOT_HERE]


def run(path: Path) -> subprocess.CompletedProcess[str]:
    options = ["-m", "not gpu", "-p", "no:cacheprovider", "--color=no", "-rs"]
    command = [sys.executable, "-m", "pytest", str(path), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


@cache
def started() -> dict[Path, Future[subprocess.CompletedProcess[str]]]:
    pool = ThreadPoolExecutor(NUM_WORKERS)
    return {path: pool.submit(run, path) for path in FILES}


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="this is the interpreter's lane, or triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_interpreters_lane_passes(path: Path) -> None:
    lane = started()[path].result()
    assert lane.returncode == 0, f"\n{lane.stdout}\n{lane.stderr}"
    assert "the interpreter's lane: started by" not in lane.stdout, "the lane skipped its own tests"
