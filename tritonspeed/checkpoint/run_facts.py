"""Where the run stood, from what a checkpoint says of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tritonspeed.checkpoint.errors import CorruptCheckpoint
from tritonspeed.checkpoint.manifest import MOST_ELEMS
from tritonspeed.checkpoint.source import RunFacts

_AT_LEAST_ONE = {"world", "accumulation", "micro_batch"}
_MAY_BE_NONE = {"micro_batch", "optimizer", "scaler", "scheduler"}
_TYPES: dict[str, type] = {
    "optimizer": str,
    "param_groups": list,
    "scaler": dict,
    "scheduler": dict,
    "client_state": dict,
}


def run_facts(said: Any, world: int, where: str) -> RunFacts:
    """The fields of RunFacts that are there; others may be of a later version.

    Args:
        said: a dict by the names of its fields.
        world: where it does not say.
        where: for the error.

    Raises:
        CorruptCheckpoint: a field is of another type.
    """
    if not isinstance(said, dict):
        raise CorruptCheckpoint(f"{where}: {type(said).__name__} where a dict is expected")
    known: dict[str, Any] = {"world": world}
    for field in fields(RunFacts):
        if field.name not in said:
            continue
        value, wanted = said[field.name], _TYPES.get(field.name, int)
        least = 1 if field.name in _AT_LEAST_ONE else 0
        good = type(value) is wanted and (wanted is not int or least <= value <= MOST_ELEMS)
        if not good and not (value is None and field.name in _MAY_BE_NONE):
            raise CorruptCheckpoint(f"{where}: {field.name} is {value!r:.80}")
        known[field.name] = value
    groups = known.get("param_groups", [])
    if not all(isinstance(group, dict) for group in groups):
        raise CorruptCheckpoint(f"{where}: param_groups has members that are no dicts")
    return RunFacts(**known)
