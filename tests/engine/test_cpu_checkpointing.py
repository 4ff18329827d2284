"""``activation_checkpointing.cpu_checkpointing`` in the config is all it takes: models call torch's checkpoint."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from engines import make, same, settings, weights
from models import Net, batch

from tritonspeed import checkpointing
from tritonspeed.checkpointing import settings as checkpointing_settings
from tritonspeed.checkpointing.host_inputs import HostInputs
from tritonspeed.checkpointing.torch_hook import save_through

ROWS, LENGTH, WIDTH, DEPTH = 2, 7, 13, 3


def trained(stage: int, recompute: str, cpu_checkpointing: bool) -> tuple:
    inputs = checkpointing_settings._inputs = HostInputs(copies_on_cpu=True)
    given = {"activation_checkpointing": {"cpu_checkpointing": True}} if cpu_checkpointing else {}
    engine = make(settings(stage, 2, **given), Net(recompute=recompute))
    try:
        for micro in range(4):
            engine.backward(engine(*batch(dist.get_rank(), micro)))
            engine.step()
    finally:
        save_through(None)
    found = weights(engine), engine.get_global_grad_norm(), inputs.peak_host_bytes, inputs.host_bytes
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("recompute", ["plain", "reentrant"])
def test_the_config_alone_moves_what_torchs_checkpoint_saves(ranks, stage, recompute):
    """Same bits, and the host held each block's input, (2, 7, 13) of 4 bytes, at once."""
    for moved, kept in zip(
        ranks(2, trained, stage, recompute, True), ranks(2, trained, stage, recompute, False), strict=True
    ):
        assert same(moved[0], kept[0])
        assert moved[1] == kept[1]
        assert moved[2:] == (DEPTH * ROWS * LENGTH * WIDTH * 4, 0)
        assert kept[2:] == (0, 0)


def test_an_engine_whose_config_does_not_say_leaves_things_as_they_are(ranks):
    ranks(1, untouched)


def untouched() -> None:
    checkpointing.configure(checkpoint_in_cpu=True)
    inputs = checkpointing_settings._inputs = HostInputs(copies_on_cpu=True)
    checkpointing.configure(checkpoint_in_cpu=True)
    make(settings(0)).destroy()
    engine = make(settings(0, activation_checkpointing={"profile": True}), Net(recompute="plain"))
    engine.backward(engine(*batch(0, 0)))
    assert inputs.peak_host_bytes > 0
    engine.destroy()
    off = make(settings(0, activation_checkpointing={"cpu_checkpointing": False}), Net(recompute="plain"))
    inputs.clear()
    off.backward(off(*batch(0, 0)))
    assert inputs.peak_host_bytes == 0
    off.destroy()
