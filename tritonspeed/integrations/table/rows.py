"""What a row of the table is, and the words it is written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["honoured", "inert", "refused"]


@dataclass(frozen=True, slots=True)
class Name:
    """One row.

    Attributes:
        target: "module:attribute" of the object behind the name; None where there is none.
        verdict: what using it does.
        note: why nothing, or what instead.
    """

    target: str | None
    verdict: Verdict
    note: str = ""


Rows = dict[str, Name]


def here(target: str, note: str = "") -> Name:
    """A native object under DeepSpeed's name."""
    return Name(target, "honoured", note)


def inert(target: str, note: str) -> Name:
    """Accepted; ``note`` says why it has no effect."""
    return Name(target, "inert", note)


def refused(note: str) -> Name:
    """Not provided; ``note`` says what to do instead."""
    return Name(None, "refused", note)


def same(module: str, names: str) -> Rows:
    """Rows for objects that have the same name on both sides; ``names`` separated by spaces."""
    return {name: here(f"{module}:{name}") for name in names.split()}


def without(note: str, names: str) -> Rows:
    """Rows for names that are refused for one reason; separated by spaces."""
    return {name: refused(note) for name in names.split()}
