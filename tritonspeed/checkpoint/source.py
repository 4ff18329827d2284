"""A checkpoint to read from, whoever wrote it: values by parameter, kind and interval.

    stored            ours, of any world size, stage and tier
    deepspeed files   DeepSpeed's, per rank or universal
    plain             Hugging Face weights: parameters alone

Nobody who restores asks which it is, at which world size it was written, or how it was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter as it was saved.

    Attributes:
        shape: of the whole parameter.
        dtype: what modules compute with.
        trainable: whether it had a master.
        aliases: the other names of a tied parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFacts:
    """Where the run stood.

    Attributes:
        global_steps, global_samples, micro_steps, skipped_steps: the engine's counters.
        world: ranks that shared the model.
        accumulation, micro_batch: micro-steps per step; samples per micro-step and rank.
        num_accumulated: micro-steps since the last step: gradients of so many are in the checkpoint.
        optimizer: name of its class; None where there was none.
        param_groups: its settings, each with the names of its parameters under "params" (None where unknown).
        scaler: the loss scaler's ``state_dict``; None is unknown.
        scheduler: the schedule's ``state_dict``; None where there was none.
        client_state: what the caller gave to be kept.
    """

    global_steps: int = 0
    global_samples: int = 0
    micro_steps: int = 0
    skipped_steps: int = 0
    world: int = 1
    accumulation: int = 1
    micro_batch: int | None = None
    num_accumulated: int = 0
    optimizer: str | None = None
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    client_state: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """What a checkpoint gives. Reading opens files as they are needed; ``close`` lets go of them.

    Kinds are ``record``'s (master, parameters, gradient) and the optimizer's names of its states (exp_avg, ...).
    Where the values of a kind were kept in another dtype, they come in that dtype; the reader converts.
    """

    @property
    def path(self) -> Path:
        """For messages."""
        ...

    @property
    def parameters(self) -> Mapping[str, ParameterFacts]:
        """Every parameter, by its first name."""
        ...

    @property
    def facts(self) -> RunFacts:
        """Where the run stood."""
        ...

    def kinds(self, name: str) -> frozenset[str]:
        """What there is of a parameter."""
        ...

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened parameter, (hi - lo,), on the CPU, checked; "gradient" is the sum over
        all ranks.

        Raises:
            CorruptCheckpoint: the bytes are not what was written.
        """
        ...

    def read_own(self, kind: str, rank: int, name: str, lo: int, hi: int) -> Tensor | None:
        """The same of what rank ``rank`` alone had (outbox); None where it had none."""
        ...

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers of a parameter: {"step": 12.0}."""
        ...

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What rank ``rank`` kept for itself: random states, data position, buffers; empty where nothing is known."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...
