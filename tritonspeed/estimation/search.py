"""Which settings fit a model on a machine, the fastest first, each with the block of a ds_config.json that asks for it.

Tried are the stages (those that keep parameters whole only where a rank can hold them), the tiers of optimizer and
parameters, activation checkpointing, and how the samples of a step are cut into micro batches; tokens per step stay
what they are. A time is ``links.time_of``: a bound, so the ranking is one of bounds. Settings within 2 % of each other
rank by simplicity: less offloaded, no recomputation, a lower stage. What does not fit comes last, the nearest to
fitting first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonspeed.config import Config, load
from tritonspeed.config.read import read
from tritonspeed.estimation import memory
from tritonspeed.estimation.forecast import Forecast, Split, combine
from tritonspeed.estimation.machine import Machine
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.precision import Policy
from tritonspeed.zero.stages import STAGES

ALIKE = 1.02  # times within this factor count as equal
PLACEHOLDER = "/local_nvme"
TIERS = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class Setting:
    """One way to run.

    Attributes:
        stage, optimizer, parameters: stage number, and the tiers as a config names them.
        checkpointing: every block's activations are recomputed in backward.
        micro_batch, accumulation: samples of a forward, and forwards of a step.
        forecast: what it holds and moves.
        shortages: what does not fit, in words; empty where it fits.
        need: of what is scarcest, how often there is not enough: at most 1 where it fits.
        block: what to put into the ds_config.json.
    """

    stage: int
    optimizer: str
    parameters: str
    checkpointing: bool
    micro_batch: int
    accumulation: int
    forecast: Forecast = field(repr=False)
    shortages: tuple[str, ...]
    need: float
    block: dict[str, Any] = field(repr=False)

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def seconds(self) -> float:
        """Least time of a step."""
        assert self.forecast.step is not None, "a search has a machine"
        return self.forecast.step.seconds

    @property
    def text(self) -> str:
        """The block as JSON, to paste."""
        return json.dumps(self.block, indent=2)

    @property
    def _rank(self) -> tuple[Any, ...]:
        if not self.fits:
            return (True, self.need)
        moved = TIERS.index(self.optimizer) + TIERS.index(self.parameters)
        alike = round(math.log(max(self.seconds, 1e-9)) / math.log(ALIKE))
        return (False, alike, moved, self.checkpointing, self.stage, self.accumulation)


def search(
    model: Any,
    config: Any,
    world_size: int,
    machine: Machine,
    *,
    nodes: int = 1,
    tokens: int | None = None,
) -> list[Setting]:
    """Settings for ``model`` on ``world_size`` ranks, best first; those that do not fit come last, each with why.

    Args:
        model: as for ``estimate``.
        config: the ds_config.json to start from: precision, optimizer and batch sizes are kept.
        world_size, nodes, tokens: as for ``estimate``.
        machine: what the nodes have.
    """
    shape = ModelShape.of(model).with_module()
    given = {} if isinstance(config, Config) else read(config)
    start = load(config).resolve(world_size)
    samples = int(start.train_micro_batch_size_per_gpu or 1) * int(start.gradient_accumulation_steps or 1)
    kept = {k: v for k, v in given.items() if k != "train_batch_size"}
    device, found = "cpu" if machine.shares_memory else "cuda", []
    itemsize = Policy.from_config(start).param.itemsize
    room = machine.host_bytes * nodes / world_size if machine.shares_memory else machine.device_bytes
    for stage, optimizer, parameters in _placements(machine, world_size, itemsize * shape.num_params > room):
        held: dict[bool, memory.Estimate] = {}
        gathers = None  # the same for all cuts
        for micro in _cuts(samples):
            accumulation = samples // micro
            block = _block(given, stage, optimizer, parameters) | _batch(micro, accumulation)
            if (accumulation > 1) not in held:  # how often it accumulates changes no byte, only whether
                held[accumulation > 1] = memory.estimate(shape.build(), kept | block, world_size, device=device)
            for checkpointing in (False, True):
                split = Split(world_size, nodes, tokens, checkpointing, machine.shares_memory, gathers)
                forecast = combine(held[accumulation > 1], shape, kept | block, split, machine)
                gathers = forecast.work.gathers
                place = (stage, optimizer, parameters, checkpointing, micro, accumulation)
                lacks, need = tuple(forecast.shortages(machine)), max(forecast.needs(machine))
                found.append(Setting(*place, forecast, lacks, need, block))
    return sorted(_best_cuts(found), key=lambda each: each._rank)


def _placements(machine: Machine, world_size: int, must_shard: bool) -> Iterator[tuple[int, str, str]]:
    """(stage, tier of the optimizer, tier of the parameters), where the parameters go no further than the optimizer.

    Args:
        must_shard: the parameters alone are more than a rank can hold.
    """
    for number, stage in STAGES.items():
        if must_shard and not stage.shards_parameters:
            continue
        if world_size == 1 and stage.shards_optimizer and not stage.shards_parameters:
            continue  # nobody to share with: stage 0 by another name
        for optimizer in TIERS:
            if machine.shares_memory and optimizer == "cpu":
                continue  # the same memory
            for parameters in TIERS if stage.shards_parameters else TIERS[:1]:
                if TIERS.index(parameters) <= TIERS.index(optimizer) and not (
                    machine.shares_memory and parameters == "cpu"
                ):
                    yield number, optimizer, parameters


def _cuts(samples: int) -> list[int]:
    """Micro batches that divide the samples of a step, the largest first: all at once, halves, quarters, ..., one."""
    found = {samples, 1}
    micro = samples
    while micro % 2 == 0:
        micro //= 2
        found.add(micro)
    return sorted(found, reverse=True)


def _batch(micro: int, accumulation: int) -> dict[str, int]:
    return {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}


def _block(given: Mapping[str, Any], stage: int, optimizer: str, parameters: str) -> dict[str, Any]:
    """The ``zero_optimization`` block: the given one with another stage and other tiers."""
    zero = dict(given.get("zero_optimization") or {})
    before = {name: dict(zero.pop(name, None) or {}) for name in ("offload_optimizer", "offload_param")}
    path = next((b["nvme_path"] for b in before.values() if b.get("nvme_path")), PLACEHOLDER)
    zero["stage"] = stage
    for name, tier in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if tier != "none":
            kept = {k: v for k, v in before[name].items() if k not in ("device", "nvme_path", "ratio")}
            zero[name] = {"device": tier, **({"nvme_path": path} if tier == "nvme" else {}), **kept}
    return {"zero_optimization": zero}


def _best_cuts(settings: list[Setting]) -> list[Setting]:
    """Of each placement the fastest cut that fits, or the nearest to fitting where none does."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for each in settings:
        groups.setdefault((each.stage, each.optimizer, each.parameters), []).append(each)
    return [min(group, key=lambda each: each._rank) for group in groups.values()]
