"""From DeepSpeed to here and back: each goes on from the other's checkpoint with the losses that the other would have.

What DeepSpeed's next losses were was recorded when the checkpoints were made. Making new ones, and loading ours there,
needs DeepSpeed: its interpreter (bench/peers/setup.sh) is taken from TRITONSPEED_PEER_PYTHON.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_fixture import Made, unpack

import tritonspeed as ts
from bench.peers import deepspeed_checkpoints as peer

PEER = os.environ.get("TRITONSPEED_PEER_PYTHON")
needs_peer = pytest.mark.skipif(not PEER, reason="TRITONSPEED_PEER_PYTHON names no python that has DeepSpeed")
LIMIT_S = 240
# as in tests/zero/test_parity.py, AdamW's row: two AdamWs that differ in the order of their operations
RTOL = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("deepspeed"))


def ours(config: dict[str, Any]) -> ts.Engine:
    """Our engine of the model, from DeepSpeed's config as it is."""
    model = peer.Tiny()
    return ts.initialize(model=model, model_parameters=peer.groups(model), config=config)[0]


def losses(engine: ts.Engine, tokens: torch.Tensor, first: int) -> list[float]:
    """Of ``STEPS`` steps, mean over the ranks."""
    found = []
    for step in range(first, first + peer.STEPS):
        loss = engine(tokens[step, dist.get_rank() % tokens.shape[1]])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found.append(total.item() / dist.get_world_size())
    return found


def go_on(folder: str, config: dict[str, Any], stage: int) -> tuple[list[float], Any, int, list[float]]:
    case = Made(Path(folder))
    zero = {**config["zero_optimization"], "stage": stage}
    zero.pop("parameter_alignment", None)  # of 0.19's layout, and no key of ours
    engine = ours({**config, "zero_optimization": zero})
    path, client_state = engine.load_checkpoint(str(case.path.parent))
    assert path is not None
    steps, rates = engine.global_steps, engine.get_lr()
    return losses(engine, case.truth["batches"], peer.STEPS), client_state, steps, rates


# the optimizers that DeepSpeed shares with us, at its own stage; its stage 0 in bf16 has counted a step too many, and
# goes on from there, which ours does too
GO_ON = [
    *("stage0-fp32", "stage0-bf16", "stage1-bf16", "stage1-bf16-fp32accum", "stage2-fp16", "stage2-bf16-robin"),
    *("stage2-bf16-aligned", "stage2-fp32-elastic", "stage3-fp16", "stage3-bf16", "stage3-bf16-universal"),
    *("stage2-fp16-universal", "stage1-fp32-lion", "stage2-fp32-sgd", "stage2-fp32-three"),
]


@pytest.mark.parametrize("name", GO_ON)
def test_we_go_on_with_deepspeeds_losses(ranks, made: Path, name: str):
    case = Made(made / name)
    config, world = case.facts["config"], case.truth["batches"].shape[1]
    precision = next((p for p in ("fp16", "bf16") if p in config), "fp32")
    stage = config["zero_optimization"]["stage"]
    for got, client_state, steps, rates in ranks(world, go_on, str(made / name), config, stage):
        assert got == pytest.approx(case.facts["after"], rel=RTOL[precision])
        assert client_state == {"epoch": 4, "note": "seen"} and steps == peer.STEPS
        assert rates == pytest.approx([0.004771212547196624] * 2, rel=1e-12)
    # and they are not what training anew would have given
    assert case.facts["before"] != pytest.approx(case.facts["after"], rel=10 * RTOL[precision])


@pytest.mark.parametrize("stage", range(4))
def test_at_any_stage_of_ours(ranks, made: Path, stage: int):
    case = Made(made / "stage2-fp32-elastic")
    for got, *_ in ranks(2, go_on, str(made / case.name), case.facts["config"], stage):
        assert got == pytest.approx(case.facts["after"], rel=RTOL["fp32"])
