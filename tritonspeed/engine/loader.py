"""The data loader that ``initialize`` makes of a dataset, and that knows where in it a run stands.

Samples of an epoch are numbered as all ranks see them together: rank r of N takes r, r + N, r + 2·N, ... So a position
is a number of samples over all ranks, and means the same at another world size or micro batch.

``iter()`` draws a seed for workers from torch's generator. A run that is continued in the middle of an epoch has done
so before it was saved: it is made to draw the same seed again, and its generators are then put back where they stood.
What a dataset draws in the main process goes on exactly; a worker's generator starts as at the beginning of the epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from tritonspeed.checkpoint.randomness import random_state, set_random_state

log = logging.getLogger("tritonspeed")

CPU = torch.device("cpu")


class _Sampler(DistributedSampler):
    """A rank's indices of an epoch from its sample ``begin`` on; ``len`` is the whole epoch's."""

    begin = 0

    def __iter__(self) -> Iterator[Any]:
        indices = super().__iter__()
        for _ in range(self.begin):
            next(indices, None)
        return indices


@dataclass(frozen=True)
class _Position:
    """Where an epoch stands.

    Attributes:
        epoch: of the sampler.
        samples: handed out, over all ranks.
        random: states of the generators before ``iter()``; None where the epoch has not begun.
    """

    epoch: int = 0
    samples: int = 0
    random: dict[str, Any] | None = None


class TrainingLoader(DataLoader):
    """Micro batches of this rank's part of a dataset, shuffled alike on every rank.

    Args:
        dataset: with ``len`` and items, or an ``IterableDataset``, which splits itself over the ranks.
        batch_size: samples in a micro batch of one rank.
        world, rank: that share the data.
        drop_last: leave out what does not fill a micro batch on every rank.
        collate_fn, num_workers, pin_memory: torch's.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        sampler: Any = None
        if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            sampler = _Sampler(dataset, world, rank, shuffle=True, drop_last=drop_last)
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self._world, self._rank, self._micro_batch = world, rank, batch_size
        self._own_sampler: _Sampler | None = sampler
        self._position = _Position()
        self._resume: _Position | None = None  # loaded, and waiting for iter()
        self._counted = object()  # of the epoch whose batches count

    # position

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, for a checkpoint: behind the last batch that was handed out, trained on or not."""
        position = self._resume or self._position
        return {
            "epoch": position.epoch,
            "samples": position.samples,
            "dataset": self._num_dataset(),
            "random": position.random,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next ``iter()`` goes on behind the last batch that had been handed out; at its end, with nothing.

        That holds while the sampler's epoch is the saved one, which is set here; with another it starts anew.

        Raises:
            ValueError: ``state`` is not what ``state_dict`` gives.
        """
        counts = [state.get("epoch"), state.get("samples")]
        random = state.get("random")
        if any(type(n) is not int or n < 0 for n in counts) or not isinstance(random, dict | None):
            raise ValueError(
                f"not the position of a data loader: epoch {counts[0]!r}, samples {counts[1]!r}, must be whole numbers,"
                " and the random state a dict"
            )
        position = _Position(state["epoch"], state["samples"], random)
        saved, now = state.get("dataset"), self._num_dataset()
        if saved != now and self._rank == 0:
            log.warning(
                "the data was saved with a dataset of %s samples, and this one has %s: it goes on at the same position,"
                " but not in the same order",
                *(n if n is not None else "unknown many" for n in (saved, now)),
            )
        exact = self._samples_of_rank(position.samples) * self._world
        is_over = self._own_sampler is not None and position.samples >= len(self._own_sampler) * self._world
        if exact != position.samples and not is_over and self._rank == 0:
            log.warning(
                "%d samples had been handed out, which world size %d%s cannot continue at: it goes on at sample %d",
                position.samples,
                self._world,
                "" if self._own_sampler is not None else f" with micro batches of {self._micro_batch}",
                exact,
            )
        if self._own_sampler is not None:
            self._own_sampler.set_epoch(position.epoch)
        self._resume, self._counted = position, object()

    def _num_dataset(self) -> int | None:
        return len(self._own_sampler.dataset) if self._own_sampler is not None else None  # type: ignore[arg-type]

    def _samples_of_rank(self, samples: int) -> int:
        """A rank's samples up to a position, or up to the next one that it can continue at: an iterable is read in
        whole micro batches."""
        unit = 1 if self._own_sampler is not None else self._micro_batch
        return -(-samples // (self._world * unit)) * unit

    def _epoch(self) -> int:
        return self._own_sampler.epoch if self._own_sampler is not None else 0

    # batches

    def __iter__(self) -> Any:
        resume, self._resume = self._resume, None
        if resume is not None and resume.epoch != self._epoch():
            resume = None
        begin = self._samples_of_rank(resume.samples) if resume is not None else 0
        if self._own_sampler is not None:
            self._own_sampler.begin = begin = min(begin, len(self._own_sampler))
        here = random_state(CPU)
        before = resume.random if resume is not None else None
        if before is not None:
            set_random_state(before, CPU)
        try:
            batches = super().__iter__()
            if self._own_sampler is None:
                for _ in range(begin // self._micro_batch):
                    next(batches, None)
        finally:
            if before is not None:
                set_random_state(here, CPU)
        self._position = _Position(self._epoch(), begin * self._world, before or here)
        self._counted = object()
        return _Epoch(self, batches, self._counted)

    def _handed(self, token: object) -> None:
        """One more batch. Of two epochs that are open at a time, the one that began last counts."""
        if token is not self._counted:
            return
        old = self._position
        samples = old.samples + self._micro_batch * self._world
        if self._own_sampler is not None:
            samples = min(samples, len(self._own_sampler) * self._world)
        self._position = _Position(old.epoch, samples, old.random)

    def _ended(self, token: object) -> None:
        if token is self._counted:
            self._position = _Position(self._epoch())


class _Epoch:
    """The batches of an epoch, counted as they are handed out."""

    def __init__(self, loader: TrainingLoader, batches: Iterator[Any], token: object) -> None:
        self._loader, self._batches, self._token = loader, batches, token

    def __iter__(self) -> _Epoch:
        return self

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._loader._ended(self._token)
            raise
        self._loader._handed(self._token)
        return batch
