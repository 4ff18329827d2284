"""What the sources here have in common: values by parameter and kind, each at its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.deepspeed.layout import Place
from tritonspeed.checkpoint.errors import CheckpointError, CorruptCheckpoint
from tritonspeed.checkpoint.source import ParameterFacts, RunFacts

Held = tuple[Place, Callable[[int], Tensor]]
"""Where a parameter's elements are, and a rank's flat of them, opened when it is asked for."""


class HeldSource:
    """A ``Source`` whose values are in flats of tensors.

    Attributes:
        held: name → kind → where.
        numbers: name → the optimizer's.
        buffers: by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.parameters: dict[str, ParameterFacts] = {}
        self.facts = RunFacts()
        self.held: dict[str, dict[str, Held]] = {}
        self.numbers: dict[str, dict[str, float]] = {}
        self.buffers: dict[str, Tensor] = {}

    def kinds(self, name: str) -> frozenset[str]:
        """See ``Source``."""
        return frozenset(self.held.get(name, ()))

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """See ``Source``; a view of the file where one flat has it all."""
        numel = prod(self.parameters[name].shape)
        if kind not in self.held[name] or not 0 <= lo <= hi <= numel:
            there = ", ".join(sorted(self.held[name])) or "nothing"
            raise ValueError(f"{kind} [{lo}, {hi}) of {name!r}: it has {numel} elements of {there}")
        place, flat_of = self.held[name][kind]
        if lo == hi:
            return torch.empty(0, dtype=flat_of(0).dtype if numel else torch.float32)
        parts = [flat_of(e.rank)[e.start : e.start + e.hi - e.lo] for e in place.extents(lo, hi)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if found.numel() != hi - lo:
            raise CorruptCheckpoint(f"{self.path}: {kind} of {name!r} is not all there")
        return found

    def read_own(self, kind: str, rank: int, name: str, lo: int, hi: int) -> Tensor | None:
        """None: gradients were not saved."""
        return None

    def scalars(self, name: str) -> Mapping[str, float]:
        """See ``Source``."""
        return self.numbers.get(name, {})

    def rank_state(self, rank: int) -> dict[str, Any]:
        """The buffers, of rank 0: others' were not saved, or are the same."""
        return {"buffers": self.buffers} if rank == 0 else {}

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """What is found wrong within becomes ``CorruptCheckpoint``, and every error says the path."""
        try:
            yield
        except CheckpointError as error:
            if str(self.path) in str(error):
                raise
            raise type(error)(f"{self.path}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
            said = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
            raise CorruptCheckpoint(f"{self.path} is no {what}: {said:.300}") from error


def whole(value: Tensor, check: Callable[[Tensor], Tensor] = lambda value: value) -> Held:
    """A tensor that has all of a parameter, checked when it is asked for."""
    return Place(0, value.numel(), max(1, value.numel())), lambda rank: check(value).reshape(-1)
