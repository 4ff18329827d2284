"""`load` a config, `resolve` it for a world and a model, and ask it for its `answers`."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from tritonspeed.config.answers import Answer, answers
from tritonspeed.config.auto import ModelFacts, fill
from tritonspeed.config.batch import implied_world_size
from tritonspeed.config.keys import AUTO, value_at
from tritonspeed.config.parse import Given, Parse, Unknown
from tritonspeed.config.read import Source, read
from tritonspeed.config.schema import Knobs

CLIPPING_DEFAULT = "DeepSpeed's default since June 2026; before it was 0, off"


class ConfigWarning(UserWarning):
    """A config is usable, but says something that has no effect."""


@dataclass(frozen=True)
class Origin:
    """Where the values of a config came from."""

    given: tuple[Given, ...] = ()
    unknown: tuple[Unknown, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    """How `resolve` arrived at a value, by path."""


@dataclass(frozen=True)
class Config(Knobs):
    """A ds_config.json, typed. Frozen: `resolve` returns another one."""

    origin: Origin = field(default_factory=Origin, repr=False, compare=False)

    def resolve(self, world_size: int, facts: ModelFacts | None = None, *, allow_refused: bool = False) -> "Config":
        """This config with every "auto" filled and the batch triad complete, for `world_size` data-parallel ranks.

        ValueError: the triad does not multiply out, or (unless `allow_refused`, for those who only look) a key asks
        for what is not built; the error then lists every such key with the alternative.
        """
        config, notes = fill(self, world_size, facts or ModelFacts())
        if not self.is_given("gradient_clipping"):
            notes["gradient_clipping"] = CLIPPING_DEFAULT
        config = replace(config, origin=replace(self.origin, notes={**self.origin.notes, **notes}))
        refused = [each for each in config.answers() if each.verdict == "refused"]
        if refused and not allow_refused:
            lines = "\n".join(f"  {each.key} = {each.given!r}: {each.note}" for each in refused)
            raise ValueError(f"the config asks for what is not supported:\n{lines}")
        return config

    def answers(self) -> list[Answer]:
        """What became of each key, in the order of the config; unknown keys and notable defaults come last."""
        return answers(self, self.origin.given, self.origin.unknown, self.origin.notes)

    def is_given(self, path: str) -> bool:
        """Whether the config set this key (by its path in today's names) to a value, rather than null or "auto"."""
        return any(each.path == path and each.value not in (None, AUTO) for each in self.origin.given)

    def note(self, path: str) -> str:
        """How `resolve` arrived at the value of this key; "" if it was given or is a plain default."""
        return self.origin.notes.get(path, "")

    def as_dict(self) -> dict[str, Any]:
        """What the config set, in today's names, with the values in use: nested dicts, as the file has them."""
        tree: dict[str, Any] = {}
        for each in self.origin.given:
            *blocks, name = each.path.split(".")
            place = tree
            for block in blocks:
                place = place.setdefault(block, {})
            if name not in place:  # an open block holds its entries already
                place[name] = value_at(self, each.path)
        return tree

    def get(self, key: str, default: Any = None) -> Any:
        """A block or value of ``as_dict``: programs that expect the dict of a ds_config.json read this too."""
        return self.as_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.as_dict()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.as_dict()

    @property
    def implied_world_size(self) -> int | None:
        """The world size at which the given batch sizes multiply out, where all three are given."""
        return implied_world_size(
            self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        )


def load(source: Source | Config) -> Config:
    """A config from a path, a dict, hjson text, base64 of it, or None for all defaults. A `Config` passes through.

    ValueError lists every mistake: unknown keys in blocks, wrong types, contradictions. Unknown keys at the top
    level only warn (`ConfigWarning`): DeepSpeed ignores them, and programs rely on it.
    """
    if isinstance(source, Config):
        return source
    parse = Parse(Config)
    values = parse.run(read(source))
    if parse.mistakes:
        count = len(parse.mistakes)
        lead = "" if count == 1 else f"{count} mistakes in the config:\n  "
        raise ValueError(lead + "\n  ".join(parse.mistakes))
    for each in parse.unknown:
        warnings.warn(f"{each.name}: {each.note}", ConfigWarning, stacklevel=2)
    return Config(**values, origin=Origin(tuple(parse.given), tuple(parse.unknown)))
