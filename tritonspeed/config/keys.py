"""What a key is: its meaning, unit, spellings and the answer it gets. One declaration per key, next to its field.

The schema is a tree of frozen dataclasses. A field's name, annotation and default are the key's name, type and
default; `key(...)` hangs the rest on it. Validation (`parse`), the table of answers (`answers`) and the written
reference (`document`) all walk the same declarations, so they cannot disagree.

A key's verdict follows from its declaration, in this order:

    refused    `refuse(value)` or `conflict(config)` returns a sentence: what to write instead
    mapped     it was given in an old spelling
    inert      `inert` is a sentence, or a function of the config that returns one: why it changes nothing here
    honoured   otherwise
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["fp32", "fp16", "bf16"]
"""The three names a config uses for floating types; `coerce` accepts torch's names for them too."""

AUTO = "auto"
"""The sentinel of a value that someone else fills in: Hugging Face, or `Config.resolve`."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What the declaration of one key says beyond name, type and default."""

    note: str | Callable[[Any], str]
    """What the value does here, as a phrase; a function receives the value, and its docstring is the general phrase."""
    unit: str = ""
    """"elements", "bytes", "steps", ...: sizes in elements and bytes are floored when given as a float."""
    aliases: tuple[str, ...] = ()
    """Other names that DeepSpeed itself accepts today."""
    old: tuple[str, ...] = ()
    """Names that it accepted once: mapped, and said so."""
    inert: str | Callable[[Any], str | None] | None = None
    """Why the key has no effect here; a function receives the whole config, and its docstring is the rule."""
    refuse: Callable[[Any], str | None] | None = None
    """The alternative to a value that is not supported; None for a value that is. Its docstring is the rule."""
    conflict: Callable[[Any], str | None] | None = None
    """What else in the config forbids this key's value, with the remedy: a function of the config, like `refuse`."""
    auto: str = ""
    """What "auto" becomes, where that is not simply the default."""
    low: float | None = None
    high: float | None = None
    always: bool = False
    """Answered even when the config does not name it: its default is news to many."""

    def says(self, value: Any) -> str:
        """The note for this value."""
        return self.note(value) if callable(self.note) else self.note

    @property
    def general(self) -> str:
        """The note for any value, as the written reference has it."""
        return (self.note.__doc__ or "").strip() if callable(self.note) else self.note


def key(default: Any, note: str | Callable[[Any], str], **more: Any) -> Any:
    """A dataclass field that carries a `Key`. A dict or list default is copied for each instance."""
    metadata = {"key": Key(note=note, **more)}
    if isinstance(default, dict | list):
        return field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def block(kind: type, note: str, *, absent: bool = False, **more: Any) -> Any:
    """A dataclass field that holds a nested block of keys; None when the config lacks it, if `absent`."""
    metadata = {"key": Key(note=note, **more)}
    return field(default=None, metadata=metadata) if absent else field(default_factory=kind, metadata=metadata)


@dataclass(frozen=True)
class Spec:
    """One key in its place: the declaration, with the path and the types resolved."""

    path: str
    key: Key
    hint: Any
    """The annotation, Optional stripped."""
    optional: bool
    block: type | None
    """The dataclass of a nested block, None for a value."""
    default: Any
    parents: tuple["Spec", ...]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling, the current one first."""
        return (self.name, *self.key.aliases, *self.key.old)

    @property
    def choices(self) -> tuple[Any, ...]:
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is Literal else ()

    @property
    def is_open(self) -> bool:
        """A block whose contents are not checked key by key."""
        return self.hint is dict or typing.get_origin(self.hint) is dict

    def type_name(self) -> str:
        """The type as a reader of the reference would write it."""
        if self.choices:
            return " | ".join(repr(c) if isinstance(c, str) else str(c) for c in self.choices)
        return "block" if self.is_open else str(getattr(self.hint, "__name__", self.hint))


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return (rest[0], True) if len(rest) == 1 else (hint, len(rest) < len(typing.get_args(hint)))
    return hint, False


def _walk(kind: type, prefix: str, parents: tuple[Spec, ...]) -> Iterator[Spec]:
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        declared = each.metadata.get("key")
        if declared is None:
            continue
        hint, optional = _strip_optional(hints[each.name])
        nested = hint if dataclasses.is_dataclass(hint) else None
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        spec = Spec(prefix + each.name, declared, hint, optional, nested, default, parents)
        yield spec
        if nested is not None:
            yield from _walk(nested, spec.path + ".", (*parents, spec))


@functools.cache
def specs(kind: type) -> dict[str, Spec]:
    """Every key under the dataclass `kind`, blocks included, by its path, in the order of declaration."""
    return {spec.path: spec for spec in _walk(kind, "", ())}


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted path, or None where a block on the way is absent. Descends into open blocks too."""
    for name in path.split("."):
        if config is None:
            return None
        config = config.get(name) if isinstance(config, dict) else getattr(config, name)
    return config


def replace_at(config: Any, path: str, value: Any) -> Any:
    """A copy of the frozen tree with the value at a dotted path replaced."""
    name, _, rest = path.partition(".")
    if rest:
        value = replace_at(config[name] if isinstance(config, dict) else getattr(config, name), rest, value)
    if isinstance(config, dict):
        return {**config, name: value}
    return dataclasses.replace(config, **{name: value})


def stage3_only(config: Any) -> str | None:
    """acts at stage 3"""
    stage = config.zero_optimization.stage
    return None if stage == 3 else f"acts at stage 3, this is stage {stage}"


def unless(*allowed: Any, use: str) -> Callable[[Any], str | None]:
    """Refuse every value but these (and "auto" and null), with the alternative `use`."""

    def refuse(value: Any) -> str | None:
        return None if value is None or value == AUTO or value in allowed else use

    refuse.__doc__ = f"refused unless {' or '.join(str(a).lower() for a in allowed) or 'null'}: {use}"
    return refuse


def above(limit: float, use: str) -> Callable[[Any], str | None]:
    """Refuse numbers larger than `limit`."""

    def refuse(value: Any) -> str | None:
        return use if isinstance(value, int | float) and value > limit else None

    refuse.__doc__ = f"refused above {limit:g}: {use}"
    return refuse


def switched_on(use: str) -> Callable[[Any], str | None]:
    """Refuse a block that turns its feature on: any `enabled: true` in it, at any depth."""

    def on(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        return value.get("enabled") is True or any(on(inner) for inner in value.values())

    def refuse(value: Any) -> str | None:
        return use if on(value) else None

    refuse.__doc__ = f"refused with enabled: true: {use}"
    return refuse


def present(use: str) -> Callable[[Any], str | None]:
    """Refuse a block that is there at all, unless it is empty or says `enabled: false`."""

    def refuse(value: Any) -> str | None:
        return use if value and not (isinstance(value, dict) and value.get("enabled") is False) else None

    refuse.__doc__ = f"refused when present: {use}"
    return refuse
