"""Starts the interpreter's lane: the tests beside this file once more, every kernel run by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonspeed.kernels._triton import HAS_TRITON, INTERPRETED


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="this is the interpreter's lane, or triton is not installed")
def test_the_interpreters_lane_passes() -> None:
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(here),
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "-rs",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    lane = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert lane.returncode == 0, f"\n{lane.stdout}\n{lane.stderr}"
    assert "the interpreter's lane: started by" not in lane.stdout, "the lane skipped its own tests"
