"""PyTorch's own sharder as an oracle: the same model under FSDP2, step by step, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import one_pass
from models import Net, batch
from tolerances import tolerance
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tritonspeed as ts

CLOSE = tolerance(torch.float32, 4096)
STEPS = 5


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def beside_fsdp2(stage: int, recompute: str | None, tied: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    theirs = Net(recompute=recompute, tied=tied)
    torch.manual_seed(0)
    ours = Net(recompute=recompute, tied=tied)
    mesh = init_device_mesh("cpu", (world,))
    for block in theirs.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    their_optimizer = momentum(theirs.parameters())
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    ours, our_optimizer = ts.zero.shard(ours, momentum(ours.parameters()), stage=stage, options=options)
    for step in range(STEPS):
        loss = theirs(*batch(rank, step))
        loss.backward()
        torch.testing.assert_close(one_pass(ours, rank, step), loss.detach(), **CLOSE)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            want = q.grad.full_tensor()
            got = ts.zero.safe_get_full_grad(p)
            torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, n=name: f"gradient of {n}: {text}")
        their_optimizer.step()
        their_optimizer.zero_grad()
        our_optimizer.step()
    whole = ours._tritonspeed.full_state_dict(rank0_only=False)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(whole[name], value.full_tensor(), **CLOSE)


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("recompute", [None, "plain"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_and_gradients_equal_fsdp2(ranks: Any, stage: int, recompute: str | None, tied: bool) -> None:
    ranks(2, beside_fsdp2, stage, recompute, tied)
