"""Generators of model parallel regions: named states, each going on where its last region ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MODEL_PARALLEL = "model-parallel-rng"
SEED_OFFSET = 2718  # Megatron's, so that a seed means the same


class RandomStates:
    """Named states of the device's default generator (the CPU's where there is no GPU).

    Example:
        >>> states.add("model-parallel-rng", seed + rank)
        >>> with states.fork():
        ...     y = dropout(x)  # other random numbers on every rank of the model parallel group
    """

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._seeds: set[int] = set()

    def reset(self) -> None:
        """Forget all of them."""
        self._states, self._seeds = {}, set()

    def get_states(self) -> dict[str, Tensor]:
        """State by name, a copy."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Go on from these."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Name the state that ``seed`` gives.

        Raises:
            ValueError: the name or the seed is taken.
        """
        if seed in self._seeds or name in self._states:
            raise ValueError(f"random state {name!r} with seed {seed}: the name or the seed is taken, choose another")
        before = _device_module().get_rng_state()
        _device_module().manual_seed(seed)
        self._states[name] = _device_module().get_rng_state()
        self._seeds.add(seed)
        _device_module().set_rng_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from this state inside, and from the default again after.

        Raises:
            ValueError: no state has this name.
        """
        if name not in self._states:
            raise ValueError(
                f"no random state is named {name!r}: add(name, seed) first, or model_parallel_cuda_manual_seed"
            )
        before = _device_module().get_rng_state()
        _device_module().set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = _device_module().get_rng_state()
            _device_module().set_rng_state(before)


_states = RandomStates()


def get_cuda_rng_tracker() -> RandomStates:
    """The one of this process."""
    return _states


def model_parallel_cuda_manual_seed(seed: int, model_parallel_rank: int = 0) -> None:
    """Seed the default generator with ``seed``, and the model parallel one by rank."""
    _states.reset()
    _device_module().manual_seed(seed)
    _states.add(MODEL_PARALLEL, seed + SEED_OFFSET + model_parallel_rank)


def _device_module() -> Any:
    return torch.cuda if torch.cuda.is_available() else torch
