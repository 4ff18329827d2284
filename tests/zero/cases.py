"""Lock-step: a sharded model beside a plain one that sees every rank's batch, compared after every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from models import Net, batch
from tolerances import tolerance
from torch import Tensor, nn

import tritonspeed as ts

# how a model is sharded: name -> (stage, parameters below this many elements stay whole at stage 3)
SHARDINGS = {"0": (0, 0), "1": (1, 0), "2": (2, 0), "3": (3, 0), "3 persistent": (3, 30)}
NUM_SUMMED = 4096  # terms of the longest chain of sums behind a parameter after a few steps of the small models

Drive = Callable[[Any, int, int], Tensor]


def one_pass(model: Any, rank: int, step: int) -> Tensor:
    """One forward and one backward: the ordinary step."""
    loss = model(*batch(rank, step))
    loss.backward()
    return loss.detach()


def nothing(model: Any, rank: int, step: int) -> None:
    """No disturbance."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Errors stay as small as they were: Adam would blow a wrong last bit of a tiny gradient up to a full step."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A model and what happens in one of its steps.

    ``drive(model, rank, step)`` calls forward and backward and returns the loss; the plain model is driven once for
    every rank. ``disturb`` happens to the sharded model alone, before its drive: training must go on as if it had not.
    """

    model: Callable[[], nn.Module] = Net
    drive: Drive = one_pass
    disturb: Callable[[Any, int, int], None] = nothing
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    steps: int = 3
    options: dict[str, Any] = field(default_factory=dict)


class Plain:
    """The reference: an ordinary model on every rank's data, gradients averaged and masters kept in fp32."""

    def __init__(self, case: Case, world: int) -> None:
        torch.manual_seed(0)
        self.case, self.world, self.model = case, world, case.model()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
        master_of = dict(zip(self.parameters, self.masters, strict=True))
        self.optimizer = case.optimizer(self.parameters)
        for group in self.optimizer.param_groups:
            group["params"] = [master_of[p] for p in group["params"]]

    def step(self, step: int) -> list[Tensor]:
        """The losses of all ranks."""
        losses = []
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        for rank in range(self.world):
            losses.append(self.case.drive(self.model, rank, step))
            for p, master in zip(self.parameters, self.masters, strict=True):
                if p.grad is not None:
                    master.grad.add_(p.grad.float(), alpha=1 / self.world)
                    p.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(master)
        return losses


def assert_same_model(sharded: ts.zero.ShardedModel, plain: nn.Module, told: str) -> None:
    """Every parameter and buffer of the sharded model equals the plain one's."""
    got, want = sharded.full_state_dict(rank0_only=False), plain.state_dict()
    assert list(got) == list(want)
    for name, value in want.items():
        close = tolerance(value.dtype, NUM_SUMMED) if value.is_floating_point() else {}
        torch.testing.assert_close(got[name], value, **close, msg=lambda text, n=name: f"{told}, {n}: {text}")


def lock_step(case: Case, sharding: str) -> None:
    """Train ``case`` sharded and plain side by side; losses and every parameter stay equal."""
    stage, threshold = SHARDINGS[sharding]
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = Plain(case, world)
    torch.manual_seed(rank)  # rank 0's values win, and rank 0 is seeded as the plain model
    model = case.model()
    chosen = case.optimizer([p for p in model.parameters() if p.requires_grad])
    options = ts.zero.ShardOptions(**{"param_persistence_threshold": threshold, **case.options})
    model, optimizer = ts.zero.shard(model, chosen, stage=stage, options=options)
    assert optimizer is not None
    sharded = model._tritonspeed
    start = [p.detach().clone() for p in plain.parameters]
    for step in range(case.steps):
        case.disturb(model, rank, step)
        loss = case.drive(model, rank, step)
        optimizer.step()
        want = plain.step(step)[rank]
        torch.testing.assert_close(loss, want, **tolerance(torch.float32, NUM_SUMMED))
        assert_same_model(sharded, plain.model, f"after step {step}")
    assert_at_rest(sharded)
    assert any((p != was).any() for p, was in zip(plain.parameters, start, strict=True)), "nothing was trained"


def assert_at_rest(sharded: ts.zero.ShardedModel) -> None:
    """Nothing is left of a step: no hold, no whole parameter that the stage frees, no bytes under way."""
    for group in sharded.groups:
        assert not group.holds, (group.name, dict(group.holds))
        assert group.is_sharded or not group.frees, group.name
    assert sharded.ledger.bytes_of["communication"] == 0
