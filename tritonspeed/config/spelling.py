"""Old spellings that changed shape, not only name: each is rewritten to today's keys before parsing.

Plain renames are declared with their key (`Key.old`). Here are the ones of 2020 and 2021 where a switch became a
block. What was rewritten is remembered, so that the answer shows the words that were used.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moved:
    """A value under its new path: the path and value that the config gave, and why it became this."""

    spelled: str
    given: Any


OLD_SHAPES: dict[str, str] = {
    "zero_optimization: true | false": "zero_optimization.stage 1 | 0",
    "allgather_size": "zero_optimization.allgather_bucket_size",
    "fp32_allreduce": "communication_data_type fp32",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer.device cpu",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param.device cpu",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param.device cpu",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory of both offload blocks",
}
"""Old form → what it means today, for the written reference."""


def modernise(tree: dict[str, Any], mistakes: list[str]) -> tuple[dict[str, Any], dict[str, Moved]]:
    """The tree in today's shape, and what was moved, by its new path. Contradictions are added to `mistakes`."""
    tree = dict(tree)
    moved: dict[str, Moved] = {}
    zero = tree.get("zero_optimization")
    if isinstance(zero, bool):
        moved["zero_optimization.stage"] = Moved("zero_optimization", zero)
        zero = {"stage": int(zero)}
    if "allgather_size" in tree:
        size = tree.pop("allgather_size")
        zero = {} if zero is None else zero
        if isinstance(zero, dict):
            _put(zero, "allgather_bucket_size", size, "zero_optimization", "allgather_size", size, moved, mistakes)
    if isinstance(zero, dict):
        tree["zero_optimization"] = _modernise_offload(dict(zero), moved, mistakes)
    if "fp32_allreduce" in tree:
        given = tree.pop("fp32_allreduce")
        if not isinstance(given, bool):
            mistakes.append(f"fp32_allreduce = {given!r} must be true or false")
        _put(tree, "communication_data_type", "fp32" if given else None, "", "fp32_allreduce", given, moved, mistakes)
    return tree, moved


def _modernise_offload(zero: dict[str, Any], moved: dict[str, Moved], mistakes: list[str]) -> dict[str, Any]:
    both = ("offload_optimizer", "offload_param")
    switches = [
        ("cpu_offload", ("offload_optimizer",), "device"),
        ("cpu_offload_param", ("offload_param",), "device"),
        ("cpu_offload_params", ("offload_param",), "device"),
        ("cpu_offload_use_pin_memory", both, "pin_memory"),
    ]
    for old, blocks, name in switches:
        if old not in zero:
            continue
        given = zero.pop(old)
        if given is None:
            continue
        if not isinstance(given, bool):
            mistakes.append(f"zero_optimization.{old} = {given!r} must be true or false")
            continue
        value = given if name == "pin_memory" else ("cpu" if given else "none")
        for each in blocks:
            inner = zero.get(each)
            zero[each] = dict(inner) if isinstance(inner, dict) else {}
            path = f"zero_optimization.{each}"
            _put(zero[each], name, value, path, f"zero_optimization.{old}", given, moved, mistakes)
    return zero


def _put(
    target: dict[str, Any],
    name: str,
    value: Any,
    prefix: str,
    spelled: str,
    given: Any,
    moved: dict[str, Moved],
    mistakes: list[str],
) -> None:
    path = f"{prefix}.{name}".lstrip(".")
    if target.get(name, value) != value:
        mistakes.append(f"{spelled} = {given!r} contradicts {path} = {target[name]!r}: keep one of the two")
        return
    if name not in target:
        target[name] = value
        moved[path] = Moved(spelled, given)
