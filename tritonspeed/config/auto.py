"""What "auto" becomes when nobody fills it. Hugging Face's Trainer fills it before us; without it the same rules
hold here, with DeepSpeed's defaults where the Trainer would take its own arguments.

    reduce_bucket_size = h²    prefetch_bucket_size = ⌊0.9·h²⌋    param_persistence_threshold = 10·h    h: hidden size
    fp16, bf16 = whether the model already has that type
    anything else = its default
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from tritonspeed.config.batch import NAMES, solve
from tritonspeed.config.coerce import dtype_name
from tritonspeed.config.keys import AUTO, replace_at, specs, value_at
from tritonspeed.config.optimizers import optimizer_defaults, schedule_defaults
from tritonspeed.config.schema import Knobs

K = TypeVar("K", bound=Knobs)
Notes = dict[str, str]


@dataclass(frozen=True)
class ModelFacts:
    """What a config needs to know of the model. `dtype` is that of its parameters, as a torch.dtype or its name."""

    hidden_size: int | None = None
    dtype: object = None


def fill(config: K, world_size: int, facts: ModelFacts) -> tuple[K, Notes]:
    """The config with every "auto" and every value that depends on others filled in, and how each came about.

    ValueError: the batch triad does not multiply out, data_parallel_size is not the world size, or fp16 and bf16
    are both on.
    """
    assert world_size >= 1, f"world_size {world_size} must be at least 1"
    notes: Notes = {}
    config = _fill_precision(config, facts, notes)
    config = _fill_sizes(config, facts, notes)
    config = _fill_optimizer(config, notes)
    config = _fill_scheduler(config, notes)
    config = _fill_batch(config, world_size, notes)
    for path, spec in specs(type(config)).items():
        if spec.block is None and not spec.is_open and value_at(config, path) == AUTO:
            notes[path] = "nobody filled it: the default"
            config = replace_at(config, path, spec.default)
    if config.zero_optimization.overlap_comm is None:
        stage = config.zero_optimization.stage
        notes["zero_optimization.overlap_comm"] = f"follows from stage {stage}"
        config = replace_at(config, "zero_optimization.overlap_comm", stage == 3)
    if config.zero_optimization.stage != 3:  # as in DeepSpeed: only stage 3 shards parameters
        config = replace_at(config, "zero_optimization.offload_param.device", "none")
    if config.data_parallel_size not in (None, world_size):
        raise ValueError(
            f"data_parallel_size {config.data_parallel_size} ≠ world size {world_size}, and no other axis is built: "
            "remove it"
        )
    return config, notes


def _fill_precision(config: K, facts: ModelFacts, notes: Notes) -> K:
    model = None if facts.dtype is None else dtype_name(facts.dtype)
    if config.torch_autocast.enabled == AUTO:
        config = replace_at(config, "torch_autocast.enabled", False)
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        if getattr(config, name).enabled != AUTO:
            continue
        taken = next((on for on in (other, "torch_autocast") if getattr(config, on).enabled is True), None)
        notes[f"{name}.enabled"] = (
            f"{taken} is on" if taken else f"the model is {model}" if model else "nobody filled it: off"
        )
        config = replace_at(config, f"{name}.enabled", model == name and taken is None)
    on = [name for name in ("fp16", "bf16", "torch_autocast") if getattr(config, name).enabled]
    if len(on) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}.enabled' for name in on)} are all true, and a model computes in one precision: "
            "keep one"
        )
    return config


def _fill_sizes(config: K, facts: ModelFacts, notes: Notes) -> K:
    h = facts.hidden_size
    rules = (
        {}
        if h is None
        else {
            "reduce_bucket_size": (h * h, f"hidden size {h}²"),
            "prefetch_bucket_size": (math.floor(0.9 * h * h), f"0.9 × hidden size {h}²"),
            "param_persistence_threshold": (10 * h, f"10 × hidden size {h}"),
        }
    )
    for name in ("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold"):
        path = f"zero_optimization.{name}"
        if value_at(config, path) != AUTO:
            continue
        value, notes[path] = rules.get(name, (specs(type(config))[path].default, "no hidden size known: the default"))
        config = replace_at(config, path, value)
    return config


def _fill_optimizer(config: K, notes: Notes) -> K:
    if config.optimizer is None or config.optimizer.type is None:
        return config
    defaults = optimizer_defaults(config.optimizer.type)
    params = dict(config.optimizer.params)
    for name, value in config.optimizer.params.items():
        if value == AUTO:
            notes[f"optimizer.params.{name}"] = f"nobody filled it: {config.optimizer.type}'s default"
            params.pop(name)
            if name in defaults:
                params[name] = defaults[name]
    return replace_at(config, "optimizer.params", params)


def _fill_scheduler(config: K, notes: Notes) -> K:
    if config.scheduler is None or config.scheduler.type is None:
        return config
    defaults = schedule_defaults(config.scheduler.type)
    lr = None if config.optimizer is None else config.optimizer.params.get("lr")
    params = dict(config.scheduler.params)
    for name, value in config.scheduler.params.items():
        if value != AUTO:
            continue
        note = f"nobody filled it: {config.scheduler.type}'s default"
        default = defaults.get(name)
        if name == "warmup_max_lr" and lr is not None:
            default, note = lr, "the optimizer's lr"
        elif name == "total_num_steps":
            note = "nobody filled it: set the number of optimizer steps before training"
        notes[f"scheduler.params.{name}"] = note
        params.pop(name)
        if default is not None:
            params[name] = default
    return replace_at(config, "scheduler.params", params)


def _fill_batch(config: K, world_size: int, notes: Notes) -> K:
    given: list[Any] = [getattr(config, name) for name in NAMES]
    known = [None if value == AUTO else value for value in given]
    triad = solve(*known, world_size=world_size, default=AUTO in given[:2])
    for name, was, value in zip(NAMES, known, (triad.train, triad.micro, triad.accumulation), strict=True):
        if was is None:
            notes[name] = f"{triad.train} = {triad.micro} × {triad.accumulation} × world {world_size}"
        config = replace_at(config, name, value)
    return config
