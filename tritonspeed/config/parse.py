"""A dict of keys to the typed tree: names, types and ranges checked, every mistake reported at once."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from tritonspeed.config.coerce import coerce, nearest
from tritonspeed.config.keys import Spec, specs
from tritonspeed.config.optimizers import (
    canonical_optimizer,
    canonical_schedule,
    check_optimizer_params,
    check_schedule_params,
    refused_optimizer,
)
from tritonspeed.config.spelling import Moved, modernise

PARAMS = ("optimizer.params", "scheduler.params")


@dataclass(frozen=True)
class Given:
    """One value as the config gave it."""

    path: str
    """Its path in today's names."""
    spelled: str
    """Its path as written."""
    value: Any
    is_old: bool
    """Written in a spelling that DeepSpeed has left behind."""


@dataclass(frozen=True)
class Unknown:
    """A top-level key that nothing here and nothing in DeepSpeed reads."""

    name: str
    value: Any
    note: str


@dataclass
class Parse:
    """The state of one parse. `load` turns `mistakes` into one error and `unknown` into warnings."""

    kind: type
    given: list[Given] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    moved: dict[str, Moved] = field(default_factory=dict)

    def run(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `kind` from the config's dict."""
        tree, self.moved = modernise(tree, self.mistakes)
        values = self._block(tree, "", self.kind)
        if not self.mistakes:
            values |= self._choose(values)
        return values

    def _block(self, tree: dict[str, Any], prefix: str, kind: type) -> dict[str, Any]:
        known = spellings(self.kind)[prefix]
        values: dict[str, Any] = {}
        first: dict[str, tuple[str, Any]] = {}
        for name, value in tree.items():
            if is_comment(name):
                continue
            spec = known.get(name)
            if spec is None:
                self._unknown(name, value, prefix, known)
                continue
            if spec.name in first and first[spec.name][1] != value:
                other, was = first[spec.name]
                self.mistakes.append(
                    f"{prefix}{other} = {was!r} and {prefix}{name} = {value!r} are one key in two spellings: keep one"
                )
                continue
            first[spec.name] = (name, value)
            try:
                values[spec.name] = self._value(spec, value, prefix + name, name in spec.key.old)
            except ValueError as error:
                self.mistakes.append(str(error))
        return values

    def _value(self, spec: Spec, value: Any, spelled: str, is_old: bool) -> Any:
        if spec.block is not None:
            if value is None:
                return spec.default
            if not isinstance(value, dict):
                raise ValueError(f"{spelled} = {value!r} must be a block {{...}} of keys")
            before = len(self.given)
            inner = spec.block(**self._block(value, spec.path + ".", spec.block))
            if is_old:
                self._respell(before, spec.path, spelled)
            return inner
        converted = coerce(spec, value)
        if spec.path in PARAMS and isinstance(converted, dict):
            for name, each in converted.items():
                if not is_comment(name):
                    self.given.append(Given(f"{spec.path}.{name}", f"{spec.path}.{name}", each, False))
            return {name: each for name, each in converted.items() if not is_comment(name)}
        moved = self.moved.get(spec.path)
        if moved is not None:
            self.given.append(Given(spec.path, moved.spelled, moved.given, True))
        else:
            self.given.append(Given(spec.path, spelled, value, is_old))
        return converted

    def _respell(self, start: int, path: str, spelled: str) -> None:
        """Keys of a block under an old name were written under that name."""
        self.given[start:] = [
            Given(each.path, each.spelled.replace(path, spelled, 1), each.value, True) for each in self.given[start:]
        ]

    def _unknown(self, name: str, value: Any, prefix: str, known: dict[str, Spec]) -> None:
        elsewhere = _elsewhere(self.kind, name, prefix)
        hint = elsewhere if elsewhere and "." in name else nearest(name, known) or elsewhere
        if prefix:
            self.mistakes.append(f"{prefix}{name} is not a key of {prefix[:-1]}{hint}")
        else:
            self.unknown.append(Unknown(name, value, f"unknown key, it has no effect{hint}"))

    def _choose(self, values: dict[str, Any]) -> dict[str, Any]:
        """Optimizer and scheduler with their names in the usual spelling and their parameters checked."""
        chosen: dict[str, Any] = {}
        for name in ("optimizer", "scheduler"):
            block = values.get(name)
            if block is None:
                continue
            if block.type is None:
                if block.params:
                    self.mistakes.append(f"{name}.params are given without {name}.type: name it, or remove the block")
                chosen[name] = None
                continue
            try:
                kind = (canonical_optimizer if name == "optimizer" else canonical_schedule)(block.type)
            except ValueError as error:
                self.mistakes.append(str(error))
                continue
            params = {each: _plain_number(value) for each, value in block.params.items()}
            if name == "scheduler":
                self.mistakes += check_schedule_params(kind, params)
            elif refused_optimizer(kind) is None:  # the parameters of a refused one are nobody's business
                self.mistakes += check_optimizer_params(kind, params)
            chosen[name] = dataclasses.replace(block, type=kind, params=params)
        return chosen


def _plain_number(value: Any) -> Any:
    """A number that was written in quotes (YAML's `1e-5` is a string) as a number; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def is_comment(name: str) -> bool:
    """Keys that people use as comments: `_comment`, `//`, `#`."""
    return name.startswith(("_", "//", "#"))


@functools.cache
def spellings(kind: type) -> dict[str, dict[str, Spec]]:
    """For each block, by its path with a final dot ("" is the top): every spelling of every key in it."""
    blocks: dict[str, dict[str, Spec]] = {"": {}}
    for spec in specs(kind).values():
        if spec.block is not None:
            blocks[spec.path + "."] = {}
        prefix = spec.path[: len(spec.path) - len(spec.name)]
        blocks[prefix] |= dict.fromkeys(spec.names, spec)
    return blocks


def _elsewhere(kind: type, name: str, prefix: str) -> str:
    """Where a key that is unknown in this block does exist, as a hint; "" if nowhere."""
    block, _, rest = name.partition(".")
    if not prefix and rest and block + "." in spellings(kind):
        return f": a dot does not descend, write {block}: {{{rest}: ...}}"
    for other, known in spellings(kind).items():
        if name in known and other != prefix and name != "enabled":
            return f": it belongs {'inside ' + other[:-1] if other else 'at the top level'}"
    return ""
