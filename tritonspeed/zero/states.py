"""The optimizer's tensors on this rank, read and set wherever they live: in memory, in 8 bits, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tritonspeed.optim import AdamW
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.chunk import Chunk
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.late import LateUpdates
from tritonspeed.zero.tile import Tile


class ShardedStates:
    """Moments and their kin of every bucket. What is under way is waited for first.

    Args:
        inner: the optimizer that makes them.
        tiles_in: by the bucket's id.
        late: updates that may be under way.
        homes: the tiers; None is the device.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        tiles_in: dict[int, list[Tile]],
        late: LateUpdates,
        homes: Homes | None,
    ) -> None:
        self.inner, self.tiles_in, self.late, self.homes = inner, tiles_in, late, homes

    def views(self, bucket: Bucket, key: str, lo: int, hi: int) -> Iterator[tuple[Tensor, int]]:
        """The tensor ``key`` of the bucket's elements [lo, hi), as (values, first element), in order."""
        for chunk, state in self._within(bucket, key, lo, hi):
            start, end = max(lo, chunk.start), min(hi, chunk.end)
            yield state[start - chunk.start : end - chunk.start], start

    def set(self, bucket: Bucket, key: str, lo: int, values: Tensor) -> None:
        """Set what this rank has of the tensor ``key`` of the bucket's elements from ``lo`` on."""
        for chunk, state in self._within(bucket, key, lo, lo + values.numel(), changes=True):
            start, end = max(lo, chunk.start), min(lo + values.numel(), chunk.end)
            part = values[start - lo : end - lo]
            if isinstance(self.inner, AdamW):
                self.inner.set_state_values_(chunk.master, key, chunk.start, start - chunk.start, part)
            else:
                state[start - chunk.start : end - chunk.start].copy_(part)

    def _within(
        self, bucket: Bucket, key: str, lo: int, hi: int, changes: bool = False
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """The chunks that [lo, hi) meets, with the whole of their state: decoded, where it is in 8 bits.

        Args:
            changes: what the caller does to it before it asks for the next is kept.
        """
        self.late.finish()
        for tile in self.tiles_in[id(bucket)]:
            inside = [chunk for chunk in tile.chunks if max(lo, chunk.start) < min(hi, chunk.end)]
            if not inside:
                continue
            with tile.opened(changes):
                for chunk in inside:
                    if isinstance(self.inner, AdamW):
                        state = self.inner.state_values(chunk.master, key, chunk.start)
                    else:
                        state = self.inner.state.get(chunk.master, {}).get(key)
                    if isinstance(state, Tensor) and state.numel() == chunk.end - chunk.start:
                        yield chunk, state

    def bytes_of(self, bucket: Bucket) -> int:
        """Bytes in memory of one bucket's tensors on this rank."""
        states = [self.inner.state.get(c.master, {}) for tile in self.tiles_in[id(bucket)] for c in tile.chunks]
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim]
        return sum(t.nbytes for t in tensors if t.stride(0) or t.numel() <= 1)  # a placeholder has none

    def save(self) -> dict[str, Any]:
        """The optimizer's state dict of this rank's shard. What is on disk is read into memory."""
        self.late.finish()
        packed = self.inner.state_dict()
        numbers = {id(p): i for i, p in enumerate(p for group in self.inner.param_groups for p in group["params"])}
        for tile in self._tiles():
            if not tile.on_disk:
                continue
            with tile.opened():
                for chunk in tile.chunks:
                    state = self.inner.state.get(chunk.master, {})
                    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                    packed["state"][numbers[id(chunk.master)]] = copied
        return packed

    def load(self, packed: dict[str, Any]) -> None:
        """Take back what ``save`` gave; on disk it is one commit."""
        self.late.finish()
        self.inner.load_state_dict(packed)
        with self.homes.editing() if self.homes else nullcontext():
            for tile in self._tiles():
                tile.take_over(self.inner.state)

    def _tiles(self) -> Iterator[Tile]:
        for tiles in self.tiles_in.values():
            yield from tiles
