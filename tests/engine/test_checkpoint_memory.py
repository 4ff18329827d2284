"""Loading holds no more than one bucket beyond what it loads into, and the reader's bounded buffers."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
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


def copied(folder: str, stage: int, precision: str | None) -> None:
    engine = make(config(stage, 1, precision, checkpoint={"async_save": True}))
    train(engine, 0, 2)
    host = engine.sharded.ledger.host
    assert host.total_bytes == 0 and engine.optimizer is not None
    host.reset_peak()
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    # a slice of padding alone has no moments
    own = [(b.layout.slice_numel, 12 if b.layout.pieces(*b.own) else 4) for b in engine.optimizer.buckets]
    expected = sum(numel * num_bytes for numel, num_bytes in own)
    assert host.peak_bytes == expected, "this rank's part of masters and two moments in fp32, once"
    train(engine, 2, 3)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    assert host.peak_bytes == host.total_bytes == expected, "the memory is kept for the next save"
    engine.destroy()
    gc.collect()
    assert host.total_bytes == 0


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_background_save_copies_a_ranks_part_once(ranks, tmp_path, stage, precision):
    ranks(2, copied, str(tmp_path), stage, precision)
