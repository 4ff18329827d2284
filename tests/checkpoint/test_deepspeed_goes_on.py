"""From DeepSpeed to here and back: each goes on from the other's checkpoint with the losses that the other would have.

What DeepSpeed's next losses were was recorded when the checkpoints were made. Making new ones, and loading ours there,
needs DeepSpeed: its interpreter (bench/peers/setup.sh) is taken from TRITONSPEED_PEER_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_fixture import Made, unpack

import tritonspeed as ts
from bench.peers import deepspeed_checkpoints as peer
from tritonspeed.checkpoint.convert import convert
from tritonspeed.checkpoint.deepspeed.universal import write_universal

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
        # the same samples in every step, however many ranks share them
        loss = engine(tokens[step].flatten(0, 1).chunk(dist.get_world_size())[dist.get_rank()])
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
    rows = case.truth["batches"][0].flatten(0, 1).shape[0] // dist.get_world_size()
    engine = ours({**config, "zero_optimization": zero, "train_micro_batch_size_per_gpu": rows})
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


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3), (1, 1), (4, 0), (4, 2), (4, 3)])
def test_at_any_stage_and_world_size_of_ours(ranks, made: Path, world: int, stage: int):
    case = Made(made / "stage2-fp32-elastic")
    for got, *_ in ranks(world, go_on, str(made / case.name), case.facts["config"], stage):
        assert got == pytest.approx(case.facts["after"], rel=RTOL["fp32"])


# with DeepSpeed at hand


def run_peer(*arguments: str | Path) -> None:
    assert PEER is not None, "a test that needs DeepSpeed"
    command = [PEER, "-m", "bench.peers.deepspeed_checkpoints", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def deepspeed_goes_on(folder: Path, case: str, out: Path) -> dict[str, Any]:
    run_peer("--only", case, "--resume", folder, "--out", out)
    return json.loads(out.read_text())


@needs_peer
@pytest.mark.parametrize("name", ["stage2-fp32", "stage3-bf16", "stage1-bf16-fp32accum"])
def test_we_go_on_from_what_deepspeed_saves_now(ranks, tmp_path: Path, name: str):
    run_peer("--only", name, "--out", tmp_path)
    case = Made(tmp_path / name)
    config = case.facts["config"]
    precision = "bf16" if "bf16" in config else "fp32"
    for got, *_ in ranks(2, go_on, str(tmp_path / name), config, config["zero_optimization"]["stage"]):
        assert got == pytest.approx(case.facts["after"], rel=RTOL[precision])


@needs_peer
@pytest.mark.parametrize("name", ["stage1-bf16", "stage1-bf16-fp32accum", "stage2-fp16"])
def test_deepspeed_goes_on_from_a_universal_folder_of_ours(made: Path, tmp_path: Path, name: str):
    """With exactly its own next losses: nothing has been rounded on the way."""
    case = Made(made / name)
    write_universal(case.open(), tmp_path / "global_step3_universal")
    found = deepspeed_goes_on(tmp_path, name, tmp_path / "losses.json")
    assert (found["first"], found["epoch"]) == (peer.STEPS, 4)
    assert found["losses"] == case.facts["after"]


def train_here(folder: str, name: str) -> list[float]:
    """Three steps, saved as ours, and three more."""
    case = peer.CASES[name]
    engine, tokens = ours(case.config()), peer.batches(case.world)
    losses(engine, tokens, 0)
    engine.save_checkpoint(folder, client_state={"epoch": 4})
    return losses(engine, tokens, peer.STEPS)


@needs_peer
@pytest.mark.parametrize("name", ["stage2-fp32", "stage1-bf16"])
def test_deepspeed_goes_on_from_our_training(ranks, tmp_path: Path, name: str):
    ours_next, _ = ranks(2, train_here, str(tmp_path / "ours"), name)
    convert(tmp_path / "ours", tmp_path / "theirs/global_step3_universal", "universal")
    found = deepspeed_goes_on(tmp_path / "theirs", name, tmp_path / "losses.json")
    assert (found["first"], found["epoch"]) == (peer.STEPS, 4)
    assert found["losses"] == pytest.approx(ours_next, rel=RTOL["fp32" if "fp32" in name else "bf16"])
