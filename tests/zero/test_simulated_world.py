"""A 40 B-parameter model on 1,024 ranks, in one process and without its memory: laid out, stepped, freed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys, time
import torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch import nn
import tritonspeed as ts

stage, world, width, depth, vocab = map(int, sys.argv[1:])

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.mix, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.nn.functional.gelu(self.up(h)) * self.mix(h))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(width, vocab, bias=False)
    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()

config = {
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": stage, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 10**9,
                          "stage3_prefetch_bucket_size": 10**8, "overlap_comm": True},
}
with torch.device("meta"):
    paper = Model()
want = ts.estimate(paper, config, world)
start = time.time()
dist.init_process_group("fake", rank=world // 3, world_size=world, store=FakeStore())
mesh = ts.comm.mesh_of()
with FakeTensorMode():
    engine, *_ = ts.initialize(model=Model(), config=config)
    for step in range(3):
        engine.backward(engine(torch.zeros(1, 16, dtype=torch.long)))
        if step == 2:
            peak = dict(engine.sharded.ledger.peak_of)
        engine.step()
    rest = engine.memory()
    engine.destroy()
print(json.dumps({
    "rest": rest, "peak": sum(peak.values()), "want_rest": want.rest_bytes, "want_peak": want.total_peak_bytes,
    "parameters": want.num_parameters, "seconds": time.time() - start,
    "process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def simulate(stage: int, world: int, width: int, depth: int, vocab: int) -> dict:
    arguments = [str(n) for n in (stage, world, width, depth, vocab)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", [2, 3])
def test_forty_billion_parameters_on_1024_ranks(stage):
    got = simulate(stage, 1024, 8192, 48, 50257)
    assert got["parameters"] > 39e9
    assert got["rest"] == got["want_rest"]
    assert got["peak"] == pytest.approx(got["want_peak"], rel=0.03)
    assert got["process_mib"] < 2048  # the model's bytes, 80 GB in bf16, are nowhere
