"""State three times as large as the memory that there may be: it trains, and stays under what `estimate` said before.

The limit is the system's (RLIMIT_DATA: private writable memory), and is the bound itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("under_limit.py")
STATE_BYTES = 16  # of a parameter under Adam: 2 + 2 of weight and gradient, 12 of master and moments
TIMEOUT_S = 600


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on data and /proc are Linux's")
def test_a_model_bigger_than_the_limit_trains_under_it(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["limit_bytes"] == found["bound_bytes"]
    assert STATE_BYTES * found["num_parameters"] >= 3 * found["limit_bytes"]
    assert found["built_peak_bytes"] < found["peak_bytes"] <= found["bound_bytes"]
    assert found["peak_bytes"] > 0.75 * found["bound_bytes"]  # a bound, and not a loose one
    assert found["files_bytes"] == found["disk_bytes"]
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert any(line.startswith("resident in this process: at most") for line in found["said"])

    without = run(tmp_path, "--no-offload", "--limit-bytes", str(found["limit_bytes"]))
    assert without.returncode != 0
    assert "can't allocate memory" in without.stderr or "MemoryError" in without.stderr, without.stderr[-2000:]
