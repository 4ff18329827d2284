"""What became of each key: honoured, mapped, inert or refused, with a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.config.keys import Spec, specs, value_at
from tritonspeed.config.optimizers import INERT, OWN_DEFAULTS, refused_optimizer
from tritonspeed.config.parse import PARAMS, Given, Unknown
from tritonspeed.config.schema import Knobs

Verdict = Literal["honoured", "mapped", "inert", "refused"]


@dataclass(frozen=True)
class Answer:
    """One row of the table that `tritonspeed check` prints."""

    key: str
    """Its path, in the words of the config."""
    given: Any
    """The value as written; None for a default that is listed because it matters."""
    resolved: Any
    """The value in use, in today's key."""
    verdict: Verdict
    note: str
    """What it does; for a mapped key after today's name; why nothing, if inert; what to do instead, if refused."""


def inert_reason(spec: Spec, config: Knobs) -> str | None:
    """Why a key changes nothing in this config, or None."""
    reason = spec.key.inert
    return reason(config) if callable(reason) else reason


def refusal_of(spec: Spec, value: Any, config: Knobs) -> str | None:
    """Why a key's value is refused in this config and what to write instead, or None."""
    refusal = spec.key.refuse(value) if spec.key.refuse is not None else None
    return spec.key.conflict(config) if refusal is None and spec.key.conflict is not None else refusal


def answer(config: Knobs, spec: Spec, given: Given | None, how: str = "") -> Answer:
    """The row of one key; `how` says where a filled-in value came from."""
    value = value_at(config, spec.path)
    shown = spec.path if given is None else given.spelled
    refusal = refusal_of(spec, value, config)
    is_old = given is not None and given.is_old
    means = f"now {spec.path}: " if is_old else ""
    source = f" ({how})" if how else ""
    reason = inert_reason(spec, config)
    says = ("off: " if value is False and spec.hint is bool else "") + spec.key.says(value)
    if refusal is not None:
        verdict, note = "refused", refusal
    elif is_old:
        verdict, note = "mapped", (reason or says)
    elif reason is not None:
        verdict, note = "inert", reason
    else:
        verdict, note = "honoured", says
    return Answer(shown, None if given is None else given.value, value, verdict, means + note + source)


def param_answer(config: Knobs, given: Given, how: str = "") -> Answer:
    """The row of one entry of optimizer.params or scheduler.params."""
    block, name = given.path.split(".")[0], given.path.rpartition(".")[2]
    kind = getattr(config, block).type
    value = value_at(config, given.path)
    source = f" ({how})" if how else ""
    verdict: Verdict = "honoured"
    note = f"passed to {kind}{source}"
    if block == "optimizer" and refused_optimizer(kind):
        verdict, note = "inert", f"waits for {kind}, which is refused"
    elif kind == "AdamW" and name == "adam_w_mode":
        verdict, note = "inert", "AdamW decouples the weight decay whatever this says; use type Adam to choose"
    elif kind in OWN_DEFAULTS and name in INERT:
        verdict, note = "inert", INERT[name]
    return Answer(given.spelled, given.value, value, verdict, note)


def answers(
    config: Knobs, given: tuple[Given, ...], unknown: tuple[Unknown, ...], notes: Mapping[str, str]
) -> list[Answer]:
    """A row for every key that was given, for unknown ones, and for defaults that are news to many."""
    known = specs(type(config))
    rows = []
    for each in given:
        how = notes.get(each.path, "")
        is_param = each.path.rpartition(".")[0] in PARAMS
        rows.append(param_answer(config, each, how) if is_param else answer(config, known[each.path], each, how))
    rows += [Answer(each.name, each.value, None, "inert", each.note) for each in unknown]
    there = {each.path for each in given}
    rows += [
        answer(config, spec, None, notes.get(path, "default"))
        for path, spec in known.items()
        if spec.key.always and path not in there
    ]
    return rows
