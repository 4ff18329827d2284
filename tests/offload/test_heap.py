"""What is freed goes back to the system: in a process of its own, since it is said once and for the whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from tritonspeed.estimation.memory import framework_bytes
from tritonspeed.offload.heap import give_back_freed_blocks

if sys.argv[1] == "yes":
    assert give_back_freed_blocks()
torch.set_num_threads(1)
torch.ones(6 * 2**20)  # 24 MiB, freed: glibc's threshold rises
before = framework_bytes()
kept, gone = [], []
for _ in range(30):
    gone.append(torch.ones(2 * 2**20))
    kept.append(torch.ones(2**18))
gone.clear()
print(framework_bytes() - before - sum(t.nbytes for t in kept))
"""


def left_bytes(gives_back: str) -> int:
    """Resident bytes that nobody uses, after 30 blocks of 8 MiB were freed between 30 that stay."""
    run = [sys.executable, "-c", SCRIPT, gives_back]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_go_back():
    assert left_bytes("yes") < 4 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_they_would_stay():
    assert left_bytes("no") > 100 * 2**20
