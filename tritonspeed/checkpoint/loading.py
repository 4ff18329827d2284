"""A checkpoint into a sharded model, over all ranks: the best one that is good.

Each part is done by every rank for itself, and then agreed on: a rank that failed alone would leave the others waiting.
What is damaged is found while it is read; the next older checkpoint then overwrites what had been read of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.agree import together
from tritonspeed.checkpoint.choose import candidates
from tritonspeed.checkpoint.data_file import Verify
from tritonspeed.checkpoint.errors import CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.opening import open_source
from tritonspeed.checkpoint.progress import progress
from tritonspeed.checkpoint.record import MASTER, PARAMETERS
from tritonspeed.checkpoint.restore import (
    Fit,
    Wanted,
    buffers_of,
    fill,
    fill_buffers,
    fill_gradients,
    fit,
    fit_buffers,
    publish,
)
from tritonspeed.checkpoint.source import RunFacts, Source
from tritonspeed.zero import GatheredParameters, ShardedModel, ZeroOptimizer

log = logging.getLogger("tritonspeed")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: of the checkpoint.
        facts: where its run stood.
        own: what this rank had kept for itself; empty where there were fewer ranks.
        found: what fitted, and what did not.
    """

    path: Path
    facts: RunFacts
    own: dict[str, Any]
    found: Fit


def load(
    sharded: ShardedModel,
    folder: Path,
    tag: str | None,
    wanted: Wanted,
    verify: Verify = "full",
    problems: Callable[[RunFacts], list[str]] = lambda facts: [],
    custom: Callable[..., Any] | None = None,
) -> Loaded | None:
    """Load tensors; counters, schedules and random states are the caller's. Collective.

    Args:
        folder: of checkpoints, or of one.
        tag: which; None takes what ``latest`` names, and if that is damaged the newest that is good, and says so.
        problems: of the caller with where the run stood, in words: what ``wanted.strict`` refuses. With any, gradients
            in accumulation are left out.
        custom: sets the parameters instead: ``custom(src=whole state dict, dst=module)``.

    Returns:
        None where there is no checkpoint.

    Raises:
        CorruptCheckpoint: the one that was named is damaged, or all are. The model may be partly overwritten.
        MismatchedCheckpoint: it is another model's or optimizer's; nothing was changed.
    """
    paths = together(sharded.mesh, lambda: candidates(folder, tag))
    for i, path in enumerate(paths):
        try:
            loaded = _load(sharded, path, wanted, verify, problems, custom)
        except CorruptCheckpoint as error:
            if i + 1 == len(paths):
                raise
            log.warning("%s cannot be loaded, the one before it is tried: %s", path, error)
            continue
        if loaded.found.complaints():
            log.warning("%s: loaded what fits, left: %s", path, "; ".join(loaded.found.complaints()))
        log.info("loaded %s, step %d", path, loaded.facts.global_steps)
        return loaded
    log.warning("%s: there is no checkpoint to load", folder)
    return None


def _load(
    sharded: ShardedModel,
    path: Path,
    wanted: Wanted,
    verify: Verify,
    problems: Callable[[RunFacts], list[str]],
    custom: Callable[..., Any] | None,
) -> Loaded:
    mesh = sharded.mesh
    told: list[Callable[[int], None]] = []  # the bar, as soon as it is known how much there is to read

    def on_bytes(num_bytes: int) -> None:
        for tell in told:
            tell(num_bytes)

    source = together(mesh, lambda: open_source(path, verify=verify, on_bytes=on_bytes))
    try:
        found, goes_on = together(mesh, lambda: _fit(sharded, source, wanted, problems))
        own, buffers = together(mesh, lambda: _own(sharded, source, wanted))
        if custom is not None:
            _load_by(custom, sharded, source)
            wanted = replace(wanted, values=False)
        shares = mesh.world if sharded.stage.shards_optimizer else 1
        with progress(f"loading {path.name}", getattr(source, "total_bytes", 0) // shares, mesh.rank) as tell:
            told.append(tell)
            together(mesh, lambda: fill(sharded, source, found, wanted))
            told.clear()
        if goes_on:
            factor = mesh.world / source.facts.world if sharded.options.average else 1.0
            together(mesh, lambda: fill_gradients(sharded, source, found, factor))
        fill_buffers(sharded, buffers)
        publish(sharded)
        return Loaded(path, source.facts, own, found)
    finally:
        source.close()


def _fit(
    sharded: ShardedModel, source: Source, wanted: Wanted, problems: Callable[[RunFacts], list[str]]
) -> tuple[Fit, bool]:
    """(what fits, whether an accumulation goes on)."""
    found = fit(sharded, source, wanted)
    if not wanted.states or sharded.stepper is None:
        return found, False
    said = problems(source.facts)
    theirs, ours = len(source.facts.param_groups), len(sharded.stepper.param_groups)
    if theirs and theirs != ours:
        found.left_out.append(f"{theirs} parameter groups in the checkpoint, {ours} here")
    found.left_out += said
    if found.left_out and wanted.strict:
        raise MismatchedCheckpoint(
            f"{source.path}: {'; '.join(found.left_out)}. To load what fits, pass load_module_strict=False"
        )
    return found, bool(source.facts.num_accumulated) and not said


def _own(sharded: ShardedModel, source: Source, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what this rank kept for itself, the buffers that fit: its own, else rank 0's)."""
    own = source.rank_state(sharded.mesh.rank)
    nearest = own or source.rank_state(0)
    if not own and "data" in nearest:  # counted over all ranks: one more rank stands where the others do
        own = {"data": nearest["data"]}
    buffers = {name: _whole(source, name) for name in buffers_of(sharded) if name in source.parameters}
    buffers |= nearest.get("buffers", {})
    return own, fit_buffers(sharded, buffers, wanted.strict and ("buffers" in nearest or bool(buffers)))


def _whole(source: Source, name: str) -> Tensor:
    """All of a tensor, as exactly as the checkpoint has it."""
    shape = source.parameters[name].shape
    return source.read(MASTER if MASTER in source.kinds(name) else PARAMETERS, name, 0, prod(shape)).view(shape)


def _load_by(custom: Callable[..., Any], sharded: ShardedModel, source: Source) -> None:
    """Parameters by the caller's own function."""
    values = together(sharded.mesh, lambda: {name: _whole(source, name) for name in source.parameters})
    with torch.no_grad(), GatheredParameters(list(sharded.model.parameters()), modifier_rank=0):
        custom(src=values, dst=sharded.model)


def settings_of(stepper: ZeroOptimizer) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the names of its parameters under "params"."""
    return [
        {**{key: value for key, value in group.items() if key != "params"}, "params": stepper.names_in(index)}
        for index, group in enumerate(stepper.param_groups)
    ]


def resume_optimizer(stepper: ZeroOptimizer, facts: RunFacts) -> None:
    """Settings of the groups, loss scale, and how many steps there were."""
    if len(facts.param_groups) == len(stepper.param_groups):
        for group, saved in zip(stepper.param_groups, facts.param_groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params" and (k in group or k == "initial_lr")})
    if facts.scaler is not None:
        stepper.scaler.load_state_dict(facts.scaler)
    stepper.num_steps = facts.global_steps - facts.skipped_steps
