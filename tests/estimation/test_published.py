"""The papers' figures on paper: 7.5 B parameters on 64 GPUs, a trillion on 512 to 4,096; and ours beside them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tritonspeed.estimation.forecast import estimate
from tritonspeed.estimation.published import (
    infinity_checkpoint_bytes,
    infinity_params,
    infinity_state_bytes,
    infinity_working_bytes,
    zero_bytes,
)
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.zero.stages import STAGES

GB, GIB, TIB = 1e9, 2**30, 2**40
TRILLION = {  # ZeRO-Infinity's model of 1.01 T
    "model_type": "gpt2", "n_embd": 25_600, "n_layer": 128, "n_head": 256, "n_positions": 1024, "vocab_size": 50_257,
}  # fmt: skip


def config(stage: int, **zero: object) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, **zero},
    }  # fmt: skip


def test_zero_figure_1():
    """Rajbhandari et al. 2020: 120, 31.4, 16.6 and 1.88 GB."""
    got = [zero_bytes(7.5e9, STAGES[stage], 64) / GB for stage in range(4)]
    assert got == pytest.approx([120, 31.4, 16.6, 1.88], rel=0.005)


@pytest.mark.parametrize(("params", "world", "want"), [
    (7.5e9, 4, (52.5, 41.3, 30)), (7.5e9, 1024, (30.1, 15.1, 0.12)), (128e9, 64, (536, 284, 32)),
    (128e9, 1024, (513, 257, 2)), (1e12, 64, (4187, 2218, 250)), (1e12, 1024, (4011, 2013, 15.6)),
])  # fmt: skip
def test_zero_table_1(params, world, want):
    got = [zero_bytes(params, STAGES[stage], world) / GB for stage in (1, 2, 3)]
    assert got == pytest.approx(want, rel=0.03)  # the table cuts its digits off


def test_zero_infinity_figure_2a():
    """1.01 T: 128 layers of 25 K: 18.31 TB of state, 0.20 TB of checkpoints, 9.77 GB of working memory; 10.05 T."""
    assert infinity_params(128, 25_600) == pytest.approx(1.01e12, rel=0.005)
    assert infinity_state_bytes(128, 25_600) / TIB == pytest.approx(18.31, abs=0.005)
    assert infinity_checkpoint_bytes(128, 25_600, batch=32, sequence=1024) / TIB == pytest.approx(0.20, abs=0.005)
    assert infinity_working_bytes(25_600) / GIB == pytest.approx(9.77, abs=0.005)
    assert infinity_state_bytes(195, 65_536) / TIB == pytest.approx(182.81, abs=0.005)
    assert infinity_working_bytes(65_536) / GIB == pytest.approx(64.0, abs=0.005)


@pytest.mark.parametrize("world", [512, 1024, 2048, 4096])
def test_a_trillion_parameters_ours_beside_zero(world):
    """Stage 3 without offload: 16 bytes per parameter over the ranks, 31.3 to 3.9 GB, and the units that are whole."""
    found = estimate(TRILLION, config(3), world, nodes=world // 16)
    state = found.total_rest_bytes + found.peak_bytes["gradients"]
    want = zero_bytes(found.num_parameters, STAGES[3], world)
    persistent = found.rest_bytes["parameters"]  # biases and norms stay whole on every rank, DeepSpeed's default
    assert state - persistent == pytest.approx(want, rel=0.02)
    assert want / GB == pytest.approx(16 * 1.007e3 / world, rel=0.01)
    # working memory: a block is 12·hidden² elements here, gathered, its gradient beside it: of ZeRO-Infinity's layer of
    # 4·hidden² elements it is three times as much
    assert found.peak_bytes["communication"] >= 3 * infinity_working_bytes(25_600) / 2


def test_the_first_figure_as_ours():
    """7.5 B on 64: where ZeRO has 2 bytes of gradients, ours has 4, sharded from stage 1 on."""
    shape = ModelShape.of_count(7.5e9)
    for stage in range(4):
        found = estimate(shape, config(stage), 64, nodes=4)
        row = STAGES[stage]
        theirs = zero_bytes(shape.num_params, row, 64)
        more = 4 / (64 if row.shards_optimizer else 1) - 2 / (64 if row.shards_gradients else 1)
        more -= 2 / 64 if row.shards_parameters else 0  # no 16-bit shard: it is the master, rounded when gathered
        ours = found.total_rest_bytes + 4 * shape.num_params / (64 if row.shards_optimizer else 1)
        persistent = found.rest_bytes["parameters"] if row.shards_parameters else 0
        assert ours - persistent == pytest.approx(theirs + more * shape.num_params, rel=0.01)


TRILLION_ALONE = """
import resource
from tritonspeed.estimation import estimate, machine_of
config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
found = estimate("params=1e12", config, 1024, nodes=128, machine=machine_of("H100"))
print(found.num_parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_trillion_is_seconds_and_megabytes():
    """0.6 s and 0.4 GiB, imports aside; it must not become minutes."""
    done = subprocess.run([sys.executable, "-c", TRILLION_ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    num, resident_bytes = map(float, done.stdout.split())
    assert num == pytest.approx(1e12, rel=0.01)
    assert resident_bytes < 2 * GIB
