"""Checkpoints of the parts, without an engine."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from models import Net, batch

import tritonspeed as ts
from tritonspeed.checkpoint.sharded import load, save

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "zero"))


def made(stage: int, precision: str | None = None):
    torch.manual_seed(0)
    model = Net()
    return ts.zero.shard(model, ts.optim.AdamW(model.parameters(), lr=1e-2), stage, precision)


def steps(model, optimizer, first: int, last: int) -> list[float]:
    losses = []
    for i in range(first, last):
        loss = model(*batch(dist.get_rank(), i)) * (1 + 0.1 * torch.rand(()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def cycle(folder: str, stage: int, precision: str | None) -> None:
    model, optimizer = made(stage, precision)
    torch.manual_seed(dist.get_rank())
    steps(model, optimizer, 0, 3)
    path = save(model, folder, state={"epoch": 3, "rank": dist.get_rank()})
    assert path.name == "step3"
    expected = steps(model, optimizer, 3, 6)
    other, stepper = made(stage, precision)
    assert load(other, folder) == {"epoch": 3, "rank": dist.get_rank()}
    assert steps(other, stepper, 3, 6) == expected
    moved, _ = made(3 - stage, precision)
    load(moved, folder)
    for (name, p), (_, q) in zip(other.named_parameters(), moved.named_parameters(), strict=True):
        before = ts.zero.safe_get_full_fp32_param(q)
        load(other, folder)
        assert ts.zero.safe_get_full_fp32_param(p).equal(before), name
        break
    assert load(moved, pathlib.Path(folder) / "empty") is None


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_parts_resume_with_the_same_bits(ranks, tmp_path, stage, precision):
    ranks(2, cycle, str(tmp_path), stage, precision)


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Net is not sharded by ts.zero.shard"):
        save(Net(), tmp_path)
