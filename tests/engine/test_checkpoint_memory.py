"""Loading holds no more than one bucket beyond what it loads into, and the reader's bounded buffers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from engines import make
from models import Net
from test_checkpoint import config, train

from tritonspeed.checkpoint.blocks import HELD_BYTES

WIDTH, DEPTH = 960, 10
BUFFERS = HELD_BYTES + 32 * 2**20  # blocks read ahead and kept; threads, and what the allocator has not given back


def wide() -> Net:
    return Net(vocab=64, width=WIDTH, depth=DEPTH)


def saved(folder: str, stage: int) -> None:
    engine = make(config(stage), wide)
    train(engine, 0, 1)
    engine.save_checkpoint(folder)


def resident_bytes(line: str) -> int:
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, line
    return int(found[1]) * 1024


def measured(folder: str, stage: int) -> None:
    """In a process of its own: the peak of loading above what was there before and the states that are there after."""
    from tritonspeed.offload.heap import give_back_freed_blocks

    give_back_freed_blocks()
    torch.set_num_threads(1)
    engine = make(config(stage), wide)
    assert engine.optimizer is not None
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    engine.load_checkpoint(folder)
    peak = resident_bytes("VmHWM")
    states = sum(engine.optimizer.states.bytes_of(bucket) for bucket in engine.optimizer.buckets)
    largest = max(bucket.layout.slice_numel * 4 for bucket in engine.optimizer.buckets)
    print(peak - before, states, largest)


def test_loading_holds_one_bucket_beyond_the_state(ranks, tmp_path):
    ranks(2, saved, str(tmp_path), 2)
    here = Path(__file__)
    places = [str(here.parent), str(here.parent.parent)]
    code = f"import sys; sys.path[:0] = {places}; import {here.stem}; {here.stem}.measured({str(tmp_path)!r}, 3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    more, states, largest = map(int, done.stdout.split())
    assert more <= states + largest + BUFFERS, f"{more:,} for {states:,} of states, {largest:,} in the largest bucket"
    assert states > 6 * largest and states > BUFFERS, "the bound would not tell"
