"""Tile after tile through few buffers: the next ones on their way in, the last ones on their way back.

    buffer 0   fetch 0   update 0   store 0   fetch 3   ...
    buffer 1             fetch 1    update 1  store 1
    buffer 2                        fetch 2   update 2

One buffer makes it serial, two overlap reading or writing with the update, three both. What is resident takes no
buffer, and its fetch and store are nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tritonspeed.offload.tiers import Handle


class Buffer:
    """Host memory for one tile: a tensor of ``num_elems`` for each kind, made when it is first asked for.

    Args:
        num_elems: of the longest tile.
        empty: (numel, dtype) → a tensor in host memory that begins on a page.
    """

    def __init__(self, num_elems: int, empty: Callable[[int, torch.dtype], Tensor]) -> None:
        self.num_elems, self._empty = num_elems, empty
        self._tensors: dict[str, Tensor] = {}

    def of(self, kind: str, dtype: torch.dtype, numel: int) -> Tensor:
        """(numel,) for ``kind``, the same memory every time."""
        held = self._tensors.get(kind)
        if held is None or held.dtype != dtype:
            held = self._tensors[kind] = self._empty(self.num_elems, dtype)
        return held[:numel]


class Staged(Protocol):
    """What is asked of a tile."""

    needs_buffer: bool

    def fetch_ahead(self, buffer: Buffer | None) -> None:
        """Start what of ``fetch``, which follows with the same buffer, needs no gradient."""

    def forget(self) -> None:
        """What was fetched ahead is not wanted; the buffer is another's."""

    def fetch(self, buffer: Buffer | None) -> None:
        """Start bringing it into the buffer."""

    def wait(self) -> None:
        """Until it may be worked on."""

    def store(self) -> Iterable[Handle]:
        """Start bringing it back."""

    def leave(self) -> None:
        """It is back."""


T = TypeVar("T", bound=Staged)


class Ring(Generic[T]):
    """The buffers, and the order of events.

    Args:
        num_buffers: tiles in memory at once.
        make: makes a buffer.
    """

    def __init__(self, num_buffers: int, make: Callable[[], Buffer]) -> None:
        self.num_buffers, self._make = num_buffers, make
        self._made: list[Buffer] = []
        self._ahead: deque[tuple[T, Buffer | None]] = deque()

    def fetch_ahead(self, tiles: Iterable[T]) -> None:
        """Start reading the first of them: a later ``stream`` that comes to them goes on from there."""
        self.forget()
        free = list(self._made)
        for tile in islice(tiles, self.num_buffers):
            buffer = (free.pop() if free else self._one_more()) if tile.needs_buffer else None
            tile.fetch_ahead(buffer)
            self._ahead.append((tile, buffer))

    def forget(self) -> list[Buffer]:
        """Drop what was fetched ahead, and give its buffers."""
        free = []
        while self._ahead:
            tile, buffer = self._ahead.popleft()
            tile.forget()
            if buffer is not None:
                free.append(buffer)
        return free

    def _one_more(self) -> Buffer:
        self._made.append(self._make())
        return self._made[-1]

    def stream(self, tiles: Iterable[T]) -> Iterator[T]:
        """Every tile in order, once it may be worked on; it is stored when the next one is asked for.

        Which is fetched and waited for when depends on their numbers alone, never on time: the same on every rank.
        """
        source = iter(tiles)
        ahead = self._ahead
        free = [made for made in self._made if all(held is not made for _, held in ahead)]
        coming: deque[tuple[T, Buffer | None]] = deque()
        leaving: deque[tuple[T, list[Handle], Buffer | None]] = deque()
        most_leaving = max(1, (self.num_buffers - 1) // 2)
        waiting: T | None = next(source, None)

        def fetch_ahead() -> T | None:
            tile = waiting
            while tile is not None and len(coming) < self.num_buffers:
                if ahead and ahead[0][0] is tile:
                    buffer = ahead.popleft()[1]
                else:
                    if any(other is tile for other, _ in ahead):  # not in the order that was thought of
                        free.extend(self.forget())
                    buffer = None
                    if tile.needs_buffer:
                        if not free:
                            free.extend([self._one_more()] if len(self._made) < self.num_buffers else self.forget())
                        if not free:
                            break
                        buffer = free.pop()
                tile.fetch(buffer)
                coming.append((tile, buffer))
                tile = next(source, None)
            return tile

        def reclaim() -> None:
            tile, handles, buffer = leaving.popleft()
            for handle in handles:
                handle.wait()
            tile.leave()
            if buffer is not None:
                free.append(buffer)

        while True:
            waiting = fetch_ahead()
            if not coming:
                if not leaving:
                    return
                reclaim()
                continue
            tile, buffer = coming.popleft()
            tile.wait()
            yield tile
            leaving.append((tile, list(tile.store()), buffer))
            while len(leaving) > most_leaving or (leaving and leaving[0][2] is None):
                reclaim()
