"""Checkpoints of a model that was sharded without an engine.

model, optimizer = ts.zero.shard(model, optimizer, stage=3, precision="bf16")
ts.checkpoint.save(model, "checkpoints", tag="epoch1", state={"epoch": 1})
state = ts.checkpoint.load(model, "checkpoints")      # at any world size, stage and tier
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonspeed.checkpoint.collect import collect
from tritonspeed.checkpoint.data_file import Verify
from tritonspeed.checkpoint.loading import load as load_into
from tritonspeed.checkpoint.loading import resume_optimizer, settings_of
from tritonspeed.checkpoint.randomness import random_state, set_random_state
from tritonspeed.checkpoint.restore import Wanted, buffers_of
from tritonspeed.checkpoint.saver import Job, Saver
from tritonspeed.version import __version__
from tritonspeed.zero import ShardedModel


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tag: str | None = None,
    state: dict[str, Any] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Save a sharded model, its optimizer and its random states. Collective: every rank calls it.

    Args:
        model: what ``ts.zero.shard`` returned.
        folder: of checkpoints; all ranks see it.
        tag: name of this one; None is ``step<N>``.
        state: whatever else is to be kept, each rank its own: plain values, tensors, arrays, state dicts of schedules.
        keep_last: so many of the newest checkpoints stay; None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveFailed: nothing was committed; earlier checkpoints are untouched.
        CheckpointBusy: another process saves into this folder.
        ValueError: the model is not sharded.
    """
    sharded = _sharded(model)
    stepper = sharded.stepper
    steps = stepper.num_steps if stepper is not None else 0
    own: dict[str, Any] = {
        "random": random_state(sharded.mesh.device),
        "client_state": state or {},
        "buffers": {name: buffer.detach() for name, buffer in buffers_of(sharded).items()},
    }
    if sharded.mesh.rank == 0:
        own["run"] = {
            "global_steps": steps,
            "world": sharded.mesh.world,
            "optimizer": type(stepper.inner).__name__ if stepper is not None else None,
            "param_groups": settings_of(stepper) if stepper is not None else [],
            "scaler": stepper.scaler.state_dict() if stepper is not None else None,
            "client_state": state or {},
        }
    collected = collect(sharded)
    job = Job(
        folder=Path(folder),
        tag=tag or f"step{steps}",
        records=collected.records,
        scalars=collected.scalars,
        state=own,
        parameters=collected.parameters,
        step=steps,
        facts={"tritonspeed": __version__, "torch": torch.__version__, "stage": sharded.stage.number, "latest": True},
        keep_last=keep_last,
    )
    return Saver(sharded.mesh).save(job)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tag: str | None = None,
    strict: bool = True,
    verify: Verify = "full",
) -> dict[str, Any] | None:
    """Load what ``save`` or an engine saved, or DeepSpeed, at any world size, stage and tier. Collective.

    Args:
        model: what ``ts.zero.shard`` returned.
        folder: of checkpoints, or of one.
        tag: which; None takes what ``latest`` names, and if that is damaged the newest that is good, and says so.
        strict: everything must fit; False loads what fits and logs the rest.
        verify: which digests are compared.

    Returns:
        What this rank gave as ``state``; None where there is no checkpoint.

    Raises:
        CorruptCheckpoint: the one that was named is damaged, or all are.
        MismatchedCheckpoint: it is another model's or optimizer's; nothing was changed.
        ValueError: the model is not sharded.
    """
    sharded = _sharded(model)
    wanted = Wanted(states=sharded.stepper is not None, strict=strict)
    loaded = load_into(sharded, Path(folder), tag, wanted, verify)
    if loaded is None:
        return None
    if sharded.stepper is not None:
        resume_optimizer(sharded.stepper, loaded.facts)
    if "random" in loaded.own:
        set_random_state(loaded.own["random"], sharded.mesh.device)
    return dict(loaded.own.get("client_state", loaded.facts.client_state))


def _sharded(model: nn.Module) -> ShardedModel:
    sharded = model.__dict__.get("_tritonspeed")
    if not isinstance(sharded, ShardedModel):
        raise ValueError(
            f"{type(model).__name__} is not sharded by ts.zero.shard: call that first. With an engine, use "
            "engine.save_checkpoint and engine.load_checkpoint"
        )
    return sharded
