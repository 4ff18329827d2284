"""What DeepSpeed's files say of a run: counters, scaler, schedule, groups of settings, its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.deepspeed.layout import (
    Shapes,
    checked_count,
    checked_name,
    checked_shape,
    items,
    read_shapes,
)
from tritonspeed.checkpoint.deepspeed.torch_file import Standin, standins
from tritonspeed.checkpoint.errors import MismatchedCheckpoint
from tritonspeed.checkpoint.source import ParameterFacts, RunFacts

MOST_RANKS = 2**20
_SCALERS = ("LossScaler", "DynamicLossScaler")
KNOWN = standins(
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in _SCALERS),
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "argparse.Namespace",  # Megatron's arguments
)
OWN_KEYS = frozenset(
    (
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "num_experts",
        "folding",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "universal_checkpoint_info",
        "ds_autoep_layers",
        "autoep_layers",
        "ds_config",
        "ds_version",
    )
)


@dataclass
class ModelState:
    """A model's file, without its optimizer.

    Attributes:
        shapes: of trained parameters by flat; None at stage 0, where it is not said.
        aliases: first name → the others.
        buffers: by name.
        weights: parameters in the dtype of modules, by first name: whole, or empty where they are sharded.
        frozen_shapes: of those that are not trained, as far as it is said.
        fragments: a rank's share of them.
        facts: the run, without what the optimizer's files say.
        optimizer: at stage 0, its state.
    """

    shapes: list[Shapes] | None
    aliases: dict[str, tuple[str, ...]]
    buffers: dict[str, Tensor]
    weights: dict[str, Tensor]
    frozen_shapes: Shapes = field(default_factory=dict)
    fragments: dict[str, Tensor] = field(default_factory=dict)
    facts: RunFacts = field(default_factory=RunFacts)
    optimizer: Any = None

    def parameter(self, name: str, shape: tuple[int, ...], trainable: bool) -> ParameterFacts:
        """As it was saved."""
        held = self.weights.get(name, self.fragments.get(name))
        dtype = held.dtype if held is not None else torch.float32
        return ParameterFacts(shape, dtype, trainable, self.aliases.get(name, ()))


def read_model_state(content: Any) -> ModelState:
    """What ``*_model_states.pt`` holds.

    Raises:
        ValueError: it is something else.
        MismatchedCheckpoint: of a kind of parallelism that is not read.
    """
    said = dict(items(content))
    _refuse_parallel(said)
    module = {name: value for name, value in items(said["module"]) if isinstance(value, Tensor)}
    names = said.get("buffer_names") or []
    buffers = {name: module[name] for name in names if name in module}
    weights = {checked_name(name): value for name, value in module.items() if name not in buffers}
    first = _first_names(said.get("shared_params"), weights)
    aliases: dict[str, list[str]] = {}
    for alias, name in first.items():
        aliases.setdefault(name, []).append(alias)
    shapes = said.get("param_shapes")
    fragments = said.get("frozen_param_fragments") or {}
    return ModelState(
        shapes=None if shapes is None else read_shapes(shapes),
        aliases={name: tuple(others) for name, others in aliases.items()},
        buffers=buffers,
        weights={name: value for name, value in weights.items() if name not in first},
        frozen_shapes={n: checked_shape(s, checked_name(n)) for n, s in items(said.get("frozen_param_shapes") or {})},
        fragments={name: value for name, value in items(fragments) if isinstance(value, Tensor)},
        facts=_run_facts(said),
        optimizer=said.get("optimizer"),
    )


def _refuse_parallel(said: dict[str, Any]) -> None:
    """What is spread over more than data-parallel ranks."""
    dimensions = said.get("checkpoint_parallel_dimensions") or {}
    degrees = {"tensor": dimensions.get("tp_degree"), "pipeline": dimensions.get("pp_degree")}
    degrees["model"] = said.get("mp_world_size")
    for what, degree in degrees.items():
        if degree not in (None, 1):
            raise MismatchedCheckpoint(f"it is of {what}-parallel training, degree {degree!r:.20}: not read here")
    if any(said.get(key) is not None for key in ("ds_autoep_layers", "autoep_layers", "folding")) or any(
        n not in (None, 0) for n in said.get("num_experts") or ()
    ):
        raise MismatchedCheckpoint("it is of experts spread over ranks: not read here")
    if said.get("module") is None:
        raise MismatchedCheckpoint("its modules are in files of their own, by pipeline stage: not read here")


def _first_names(shared: Any, weights: dict[str, Tensor]) -> dict[str, str]:
    """A tied parameter's other names → its first."""
    if shared is not None:
        pairs = shared.items() if isinstance(shared, dict) else shared
        found = {checked_name(alias): checked_name(name) for alias, name in pairs}
        return {alias: name for alias, name in found.items() if alias != name}
    found, seen = {}, {}
    for name, value in weights.items():
        where = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and seen.setdefault(where, name) != name:
            found[name] = seen[where]
    return found


def _run_facts(said: dict[str, Any]) -> RunFacts:
    def count(key: str, least: int = 0) -> int:
        value = said.get(key)
        return least if value is None else checked_count(value, key, least)

    config = said.get("ds_config")
    config = config if isinstance(config, dict) else {}
    accumulation, micro_batch = (
        value if type(value) is int and value > 0 else None
        for value in (config.get("gradient_accumulation_steps"), config.get("train_micro_batch_size_per_gpu"))
    )
    optimizer = config.get("optimizer")
    name = optimizer.get("type") if isinstance(optimizer, dict) else None
    scheduler = said.get("lr_scheduler")
    return RunFacts(
        global_steps=count("global_steps"),
        global_samples=count("global_samples"),
        micro_steps=count("global_steps") * (accumulation or 1),
        skipped_steps=count("skipped_steps"),
        world=checked_count(said.get("dp_world_size") or 1, "dp_world_size", 1, MOST_RANKS),
        accumulation=accumulation or 1,
        micro_batch=micro_batch,
        optimizer=name if isinstance(name, str) else None,
        scheduler=scheduler if isinstance(scheduler, dict) else None,
        client_state={k: plainly(v) for k, v in said.items() if k not in OWN_KEYS},
    )


def plainly(value: Any) -> Any:
    """Stand-ins as the dicts of what they held."""
    if isinstance(value, Standin):
        return plainly(value.held if value.held is not None else list(value.args))
    if isinstance(value, dict):
        return {key: plainly(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plainly(each) for each in value)
    return value


def read_scaler(said: dict[str, Any], global_steps: int) -> dict[str, Any] | None:
    """The loss scaler as ``LossScaler.state_dict`` gives it; None where there is none.

    Raises:
        ValueError: a number is none.
    """
    scaler = said.get("loss_scaler")
    if isinstance(scaler, Standin) and isinstance(scaler.held, dict):
        held = scaler.held
    elif "cur_scale" in said:  # stage 0, where every overflow halves the scale: no patience; and what we have written
        held = {"cur_hysteresis": 1, **said, "dynamic": said.get("dynamic_loss_scale", False)}
    else:
        return None
    scale, updates = held.get("cur_scale", 1.0), held.get("cur_iter", global_steps)
    last = held.get("last_overflow_iter", -1)
    last = -1 if last is None else checked_count(last, "last_overflow_iter", -1)
    if not isinstance(scale, int | float) or not 0.0 < scale < float("inf"):
        raise ValueError(f"a loss scale of {scale!r:.40}")
    updates = checked_count(updates, "cur_iter")
    return {
        "dynamic": held.get("dynamic") is True,
        "scale": float(scale),
        "num_updates": updates,
        "last_overflow": last,
        "hysteresis_left": checked_count(held.get("cur_hysteresis", 1), "cur_hysteresis", 1),
        "num_overflows_in_a_row": int(0 <= last == updates - 1),
    }


def settings_of(groups: Any, names: Sequence[Sequence[str] | None]) -> list[dict[str, Any]]:
    """``param_groups`` with the names of the parameters of each; None where they are unknown.

    Raises:
        ValueError: they are no dicts.
    """
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("param_groups is no list of dicts")
    padded = [*names, *[None] * len(groups)]
    found = []
    for group, members in zip(groups, padded, strict=False):
        kept = {k: v for k, v in group.items() if k not in ("params", "param_names") and isinstance(k, str)}
        if "bias_correction" in kept:
            kept.pop("step", None)  # FusedAdam's, never counted on: each state has its own
        found.append({**kept, "params": None if members is None else list(members)})
    return found


def scalars_in(state: Any) -> dict[str, float]:
    """The numbers of one state of an optimizer: {"step": 12.0}."""
    found: dict[str, float] = {}
    for key, value in items(state):
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        if isinstance(key, str) and isinstance(value, int | float):
            found[key] = float(value)
    return found


def tensors_in(state: Any, numel: Sequence[int]) -> dict[str, Tensor]:
    """Its tensors, one element for each of the parameter's.

    Args:
        numel: how many elements there may be.

    Raises:
        MismatchedCheckpoint: one has another size, such as an error buffer of a compressed optimizer.
    """
    found = {}
    for key, value in items(state):
        if isinstance(value, Tensor) and value.dim() and isinstance(key, str):
            if value.numel() not in numel:
                raise MismatchedCheckpoint(
                    f"the optimizer's {key!r:.60} has {value.numel()} elements where the parameters have {numel[0]}: "
                    "of an optimizer that is not read here"
                )
            found[key] = value
    # DeepSpeed's own Adagrad names its sum of squares like Adam's average of them
    return {"sum": found["exp_avg_sq"]} if set(found) == {"exp_avg_sq"} else found


def numel_of(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return prod(shape)
