"""What a sharded parameter answers to DeepSpeed's names, and that any other has none of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import tritonspeed as ts
from tritonspeed.integrations import parameters
from tritonspeed.integrations.parameters import ZeroParamStatus


def answers() -> None:
    parameters.show()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 3))
    assert not hasattr(model[0].weight, "ds_id")
    want = next(model.parameters()).detach().clone()
    options = ts.zero.ShardOptions(param_persistence_threshold=200)
    model, _ = ts.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, options=options)
    p, small = model[0].weight, model[1].bias
    assert (p.ds_shape, p.ds_numel, p.ds_persist, small.ds_persist) == (want.shape, want.numel(), False, True)
    assert len({q.ds_id for q in model.parameters()}) == 4
    parts = torch.tensor([p.partition_numel()])
    assert parts.item() == p.ds_tensor.numel()
    dist.all_reduce(parts)
    assert parts.item() == want.numel()
    assert p.ds_status is ZeroParamStatus.NOT_AVAILABLE
    p.all_gather([model[1].weight, p] if dist.get_rank() else [p, model[1].weight])  # in any order
    assert p.ds_status is ZeroParamStatus.AVAILABLE and torch.equal(p.detach(), want)
    p.partition([p, model[1].weight])
    assert p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p.isnan().all()


def test_a_sharded_parameter_answers(ranks):
    ranks(2, answers)
