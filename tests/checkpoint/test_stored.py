"""Our own format read back: any interval of any parameter, from any number of ranks' files, checked."""

from __future__ import annotations

import random

import pytest
import torch
from handmade import spread, write

from tritonspeed.checkpoint import ParameterFacts
from tritonspeed.checkpoint.stored import StoredCheckpoint, verify

SHAPES = {"embed": (300, 70), "norm": (33,), "layers.0.weight": (128, 64), "layers.0.bias": (1,), "scale": ()}


def facts(shapes=SHAPES):
    return {name: ParameterFacts(shape, torch.bfloat16) for name, shape in shapes.items()}


def values(kinds=("master", "exp_avg"), shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    return {kind: {name: torch.randn(shape).flatten().to(dtype) for name, shape in shapes.items()} for kind in kinds}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("run_bytes", [1000, 4096, 12288, 2**24])
def test_any_interval_of_any_world(tmp_path, world, run_bytes):
    rng, truth = random.Random(world), values()
    path = write(tmp_path / "c", facts(), spread(truth, world, rng), run_bytes=run_bytes, gap=rng.choice((0, 5)))
    with StoredCheckpoint(path) as found:
        assert dict(found.parameters) == facts()
        for _ in range(200):
            kind, name = rng.choice(list(truth)), rng.choice(list(SHAPES))
            lo, hi = sorted(rng.randint(0, truth[kind][name].numel()) for _ in range(2))
            got = found.read(kind, name, lo, hi)
            assert got.dtype == torch.float32 and torch.equal(got, truth[kind][name][lo:hi])
        assert found.kinds("norm") == {"master", "exp_avg"}
    assert verify(path) == 7
