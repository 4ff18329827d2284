"""torch.compile inside units: the graphs are the units' own, communication stays between them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, Plain, lock_step, one_pass
from models import Net
from tolerances import tolerance

import tritonspeed as ts

CLOSE = tolerance(torch.float32, 4096)


def compiled_before() -> Net:
    """As a user does who compiles blocks first and shards then."""
    net = Net(depth=2)
    for block in net.blocks:
        block.compile(backend="aot_eager")
    return net


def compiled_whole() -> Net:
    net = Net(depth=2)
    net.compile(backend="aot_eager")
    return net


CASES = {"blocks": Case(compiled_before), "the whole model": Case(compiled_whole)}


def run(name: str, sharding: str) -> None:
    torch._dynamo.reset()
    lock_step(CASES[name], sharding)


@pytest.mark.parametrize("sharding", ["0", "2", "3"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_before_it_is_sharded(ranks: Any, name: str, sharding: str) -> None:
    ranks(2, run, name, sharding)


class CountingBackend:
    """Counts the graphs it was given; runs them as they are."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.num_graphs += 1
        return graph.forward


def engine_steps(stage: int, backend: Any) -> None:
    torch._dynamo.reset()
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = Plain(Case(lambda: Net(depth=2), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05)), world)
    torch.manual_seed(0)
    net = Net(depth=2)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    engine, *_ = ts.initialize(model=net, optimizer=optimizer, config=settings)
    counting = CountingBackend() if backend is None else None
    engine.compile(backend=counting or backend)
    for step in range(3):
        loss = one_pass(engine, rank, step)
        engine.step()
        torch.testing.assert_close(loss, plain.step(step)[rank], **CLOSE)
    torch.testing.assert_close(engine.module_state_dict(), dict(plain.model.state_dict()), **CLOSE)
    if counting is not None:
        assert counting.num_graphs >= 1, "nothing was compiled"
        assert counting.num_graphs <= 4, f"{counting.num_graphs} graphs for two blocks of one kind: they break"


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_engine_compile(ranks: Any, stage: int, backend: Any) -> None:
    ranks(2, engine_steps, stage, backend)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
def test_engine_compile_with_inductor(ranks: Any) -> None:
    ranks(2, engine_steps, 3, "inductor")
