"""Which launch configuration a kernel takes: pinned, tuned by the user, shipped, or worked out.

    pin  →  user's store  →  shipped store  →  heuristic             the first that has an answer for (card, features)

Nothing is ever timed here: tuning is asked for explicitly (``tritonspeed tune``) and leaves a file, this reads it. So
the same call takes the same configuration on every rank and in every run. A ``Launch`` is a frozen dataclass of ints;
*features* are what a good one depends on besides the card: the row's length, a power of two for the rows, the type.

Which stores: those of ``use_stores``; until it is called, the user's default folder and the shipped one
(``kernels.store``), opened when the first configuration is asked for.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch

from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.source_hash import source_hash

Feature = int | str | bool
L = TypeVar("L")


class Store(Protocol):
    """Where tuned configurations are kept."""

    def lookup(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The configuration's fields, or None: nothing was tuned for these, or the kernel has changed since."""


class Tunable(Generic[L]):
    """One launch decision of one kernel file.

    Args:
        name: "layer_norm_forward": the key in the stores and in ``tritonspeed tune --kernel``.
        kernels: the ``@triton.jit`` functions that the configuration goes to; a change of their source ends its life.
        launch: the dataclass of the configuration.
        heuristic: (card, **features) → a configuration that is always valid.
        candidates: (card, **features) → what a tuner should try; those that spill are dropped by it.
    """

    def __init__(
        self,
        name: str,
        kernels: Sequence[Any],
        launch: type[L],
        heuristic: Callable[..., L],
        candidates: Callable[..., list[L]],
    ) -> None:
        assert name not in TUNABLES, f"two tunables are called {name}"
        self.name, self.kernels, self.launch = name, tuple(kernels), launch
        self.heuristic, self.candidates = heuristic, candidates
        self._resolved: dict[tuple[Any, ...], L] = {}
        self._pinned: tuple[L, dict[str, Feature] | None] | None = None
        TUNABLES[name] = self

    def resolve(self, card: Card, **features: Feature) -> L:
        """The configuration for these features on this card."""
        for listener in _listeners:
            listener(self, card, features)
        if self._pinned is not None and self._pinned[1] in (None, features):
            return self._pinned[0]
        key = (card, *features.items())
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = self._look_up(card, features)
        return found

    def _look_up(self, card: Card, features: dict[str, Feature]) -> L:
        for store in stores_in_use():
            fields = store.lookup(card, self.name, self.source, features_key(features))
            if fields is not None and fields.keys() == self.fields:  # else the decision has got other fields since
                return self.launch(**fields)
        return self.heuristic(card, **features)

    @cached_property
    def source(self) -> str:
        """A hash of the kernels' source and of all they call."""
        return source_hash(*self.kernels)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names that a configuration consists of."""
        return frozenset(field.name for field in dataclasses.fields(self.launch))  # type: ignore[arg-type]

    @contextmanager
    def pinned(self, launch: L, features: dict[str, Feature] | None = None) -> Iterator[None]:
        """Take this configuration, whatever the stores say: for these features, or for all."""
        before, self._pinned = self._pinned, (launch, features)
        try:
            yield
        finally:
            self._pinned = before

    def forget(self) -> None:
        """Ask the stores again at the next call."""
        self._resolved.clear()


TUNABLES: dict[str, Tunable[Any]] = {}
_stores: list[Store] | None = None  # None: nobody has chosen yet
_listeners: list[Callable[[Tunable[Any], Card, dict[str, Feature]], None]] = []


def use_stores(stores: Sequence[Store]) -> None:
    """Where configurations are looked up from now on, in this order."""
    global _stores
    _stores = list(stores)
    for tunable in TUNABLES.values():
        tunable.forget()


def are_chosen() -> bool:
    """Whether ``use_stores`` was called, or the default stores are open already."""
    return _stores is not None


def stores_in_use() -> list[Store]:
    """Where configurations are looked up: the first call opens the default ones if no others were chosen."""
    global _stores
    if _stores is None:
        from tritonspeed.kernels.store import default_stores  # it stands on this file

        _stores = list(default_stores())
    return _stores


@contextmanager
def listening(listener: Callable[[Tunable[Any], Card, dict[str, Feature]], None]) -> Iterator[None]:
    """Hear of every decision: how a tuner learns which tunables a call depends on, and with which features."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def features_key(features: dict[str, Feature]) -> str:
    """{"n": 4096, "dtype": "bf16"} → "n=4096,dtype=bf16"."""
    return ",".join(f"{name}={value}" for name, value in features.items())


def fields_of(launch: Any) -> dict[str, int]:
    """A configuration as it stands in a store."""
    return dataclasses.asdict(launch)


_DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name of a type, as it stands in features and signatures."""
    return _DTYPE_NAMES[dtype]


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for n ≤ 1: how row counts and lengths are bucketed."""
    return 1 << max(0, n - 1).bit_length()
