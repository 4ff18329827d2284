"""``engine.optimizer.parameter_offload``: by it TRL takes the hooks off while a gathered model generates."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from engines import SGD, make, same, settings, weights
from models import batch
from torch import Tensor

import tritonspeed as ts
from tritonspeed.integrations import parameters
from tritonspeed.zero import GatheredParameters


def offload_of(engine: ts.Engine) -> Any:
    """As TRL's models/utils.py finds it."""
    optimizer: Any = engine.optimizer
    return optimizer.parameter_offload if hasattr(optimizer, "parameter_offload") else optimizer


def remove_hooks(engine: ts.Engine) -> None:
    """As TRL does it."""
    offload = offload_of(engine)
    for _, p in itertools.chain(offload.module.named_parameters(), offload.module.ds_external_parameters()):
        p.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []


def add_hooks(engine: ts.Engine) -> None:
    """As TRL does it."""
    offload = offload_of(engine)
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def num_hooks(engine: ts.Engine) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules())


def generate(engine: ts.Engine) -> tuple[Tensor, int]:
    """Three forwards of the bare model, and how many hooks it had then."""
    with GatheredParameters(engine.parameters()):
        remove_hooks(engine)
        with torch.no_grad():
            found = torch.stack([engine.module(*batch(engine.global_rank, n)) for n in range(3)])
        left = num_hooks(engine)
        add_hooks(engine)
    return found, left


def train(generates: bool) -> dict[str, Any]:
    parameters.show()
    engine = make(settings(3))
    assert offload_of(engine).module is engine.module
    found: dict[str, Any] = {"hooks": num_hooks(engine), "left": [], "losses": []}
    for step in range(3):
        if generates:
            outputs, left = generate(engine)
            with torch.no_grad():
                hooked = torch.stack([engine.module(*batch(engine.global_rank, n)) for n in range(3)])
            assert outputs.equal(hooked)
            found["left"].append(left)
        loss = engine(*batch(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        found["losses"].append(loss.item())
    found["weights"] = weights(engine)
    found["hooks after"] = num_hooks(engine)
    found["sharded"] = all(group.is_sharded for group in engine.sharded.groups if group.frees)
    return found


def test_hooks_go_for_a_generation_and_come_back(ranks):
    for plain, other in zip(ranks(2, train, False), ranks(2, train, True), strict=True):
        assert plain["hooks"] > 0 and other["left"] == [0, 0, 0]
        assert other["hooks after"] == other["hooks"] and other["sharded"]
        assert other["losses"] == plain["losses"] and same(other["weights"], plain["weights"])


def infer() -> tuple[bool, int, bool]:
    parameters.show()
    engine = make({k: v for k, v in settings(3).items() if k != "optimizer"})
    with torch.no_grad():
        before = torch.stack([engine(*batch(engine.global_rank, n)) for n in range(3)])
    outputs, left = generate(engine)
    return outputs.equal(before), left, all(group.is_sharded for group in engine.sharded.groups if group.frees)


def test_an_engine_without_optimizer_generates_too(ranks):
    assert ranks(2, infer) == [(True, 0, True)] * 2


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_only_stage_3_has_it(stage):
    engine = make(settings(stage, optimizer=SGD))
    assert not hasattr(engine.optimizer, "parameter_offload")
