"""The optimizer's tensors on this rank, read and set wherever they live: in memory, in 8 bits, on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tritonspeed.offload.disk import DiskFlat
from tritonspeed.optim import AdamW
from tritonspeed.optim.elementwise import ElementwiseOptimizer
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.chunk import Chunk
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.late import LateUpdates
from tritonspeed.zero.layout import Span
from tritonspeed.zero.tensor_files import PART_ELEMS
from tritonspeed.zero.tile import Tile

Names = set[str]  # of parameters
_CODE = "_code"  # what AdamW calls the codes of a moment in 8 bits


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

    def kinds(self, bucket: Bucket) -> dict[str, Names]:
        """The optimizer's tensors of a bucket, by name, each with the parameters that have it on this rank.

        What is kept in 8 bits goes by the name of what the codes and their scales stand for.
        """
        self.late.finish()
        found: dict[str, Names] = {}
        for tile in self.tiles_in[id(bucket)]:
            for chunk in tile.chunks:
                for key, value in self.inner.state.get(chunk.master, {}).items():
                    if isinstance(value, Tensor) and value.numel() == chunk.end - chunk.start and value.ndim:
                        names = {piece.span.name for piece in chunk.pieces()}
                        found.setdefault(key.removesuffix(_CODE), set()).update(names)
        return found

    def scalars(self, bucket: Bucket) -> list[tuple[dict[str, float], Names]]:
        """The optimizer's numbers of a bucket (``step``), each set of them with the parameters that have it."""
        self.late.finish()
        found: list[tuple[dict[str, float], Names]] = []
        for tile in self.tiles_in[id(bucket)]:
            for chunk in tile.chunks:
                state = self.inner.state.get(chunk.master, {})
                numbers = {key: float(value) for key, value in state.items() if _is_number(value)}
                names = {piece.span.name for piece in chunk.pieces()}
                known = next((with_them for have, with_them in found if have == numbers), None)
                if known is not None:
                    known.update(names)
                elif numbers:
                    found.append((numbers, names))
        return found

    def dtype(self, bucket: Bucket, key: str) -> torch.dtype:
        """What holds every value of the tensor ``key`` of a bucket as it is: fp32, of what is kept in 8 bits."""
        states = [self.inner.state.get(c.master, {}) for tile in self.tiles_in[id(bucket)] for c in tile.chunks]
        found = [torch.float32 for state in states if f"{key}{_CODE}" in state]
        found += [state[key].dtype for state in states if isinstance(state.get(key), Tensor)]
        return functools.reduce(torch.promote_types, found)

    def flat_of(self, bucket: Bucket, key: str) -> DiskFlat | None:
        """The files of the tensor ``key`` of a bucket; None where it is in memory."""
        return next((tile.flats[key] for tile in self.tiles_in[id(bucket)] if key in tile.flats), None)

    def restore(
        self,
        bucket: Bucket,
        keys: Mapping[str, Names],
        numbers: Mapping[str, Mapping[str, float]],
        read: Callable[[str, Span, int, int], Tensor],
    ) -> None:
        """Make a bucket's tensors anew, from values of another time and place.

        What a chunk has of a key it takes for those parameters that have it; for the others it is zero.

        Args:
            keys: {tensor's name: the parameters that there are values for}.
            numbers: {parameter: {"step": 12.0}}.
            read: (key, parameter, lo, hi) → its elements [lo, hi), (hi - lo,) of any dtype, on any device.
        """
        self.late.finish()
        for tile in self.tiles_in[id(bucket)]:
            with tile.opened(changes=True):
                for chunk in tile.chunks:
                    before = self.inner.state.pop(chunk.master, {})
                    pieces = chunk.pieces()
                    here = [key for key, names in keys.items() if any(p.span.name in names for p in pieces)]
                    given = [numbers.get(p.span.name, {}) for p in pieces]
                    # what has a file keeps it: a state that is no more is one of zeros
                    kept = [key.removesuffix(_CODE) for key in before if key in tile.kinds]
                    if _can_be_filled_again(before, here, given):
                        self.inner.state[chunk.master] = before
                        for key in here:
                            if sum(p.numel for p in pieces if p.span.name in keys[key]) < before[key].numel():
                                before[key].zero_()
                        self._set_numbers(chunk, given)
                    elif here or kept:
                        before.clear()  # memory: the old tensors go before the new ones come
                        self._make(chunk, [*here, *kept], given)
                    for key in here:
                        self._put(chunk, key, keys[key], read)

    def _make(self, chunk: Chunk, keys: list[str], numbers: list[Mapping[str, float]]) -> None:
        """The state of a chunk as before its first step, but for its numbers."""
        state: dict[str, Any] = self.inner.state[chunk.master]
        if isinstance(self.inner, ElementwiseOptimizer):
            self.inner.state_of(chunk.master, chunk.start)
            state = self.inner.state[chunk.master]
        else:
            state.update({key: torch.zeros_like(chunk.master.data) for key in keys})
        self._set_numbers(chunk, numbers)

    def _set_numbers(self, chunk: Chunk, numbers: list[Mapping[str, float]]) -> None:
        """The highest, where its parameters differ."""
        state = self.inner.state[chunk.master]
        for name in sorted({name for each in numbers for name in each}):
            value = torch.tensor(max(each[name] for each in numbers if name in each), dtype=torch.float32)
            state[name] = value.to(chunk.master.device) if self._counts_on_device else value

    @property
    def _counts_on_device(self) -> bool:
        """Whether torch's optimizers want their step counts beside the parameters."""
        return any(group.get("fused") or group.get("capturable") for group in self.inner.param_groups)

    def _put(self, chunk: Chunk, key: str, names: Names, read: Callable[[str, Span, int, int], Tensor]) -> None:
        """Values of the parameters ``names`` into a chunk's tensor, which is zeros."""
        state = self.inner.state[chunk.master]
        if f"{key}{_CODE}" in state:  # a block of 8 bits may hold several parameters: all of them at once
            values = torch.zeros(chunk.end - chunk.start)
            _fill(values, chunk, names, key, read)
            assert isinstance(self.inner, AdamW), "no other keeps codes"
            self.inner.set_state_values_(chunk.master, key, chunk.start, 0, values.to(chunk.master.device))
        elif isinstance(state.get(key), Tensor):
            _fill(state[key].view(-1), chunk, names, key, read)

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


def _fill(
    values: Tensor, chunk: Chunk, names: Container[str], key: str, read: Callable[[str, Span, int, int], Tensor]
) -> None:
    """Read a chunk's parameters into ``values``, (chunk,), part by part; those not in ``names`` stay as they are."""
    for p in chunk.pieces():
        if p.span.name not in names:
            continue
        for start in range(0, p.numel, PART_ELEMS):
            end = min(start + PART_ELEMS, p.numel)
            part = read(key, p.span, p.in_span + start, p.in_span + end)
            values[p.in_interval + start : p.in_interval + end].copy_(part)


def _can_be_filled_again(state: Mapping[str, Any], keys: list[str], numbers: list[Mapping[str, float]]) -> bool:
    """Whether a chunk's state has exactly the tensors that there are values for, and no number that is not given.

    New ones in their place would leave a heap of freed memory: 336 MiB beside 1 GiB of state, on two ranks.
    """
    given = {name for each in numbers for name in each}
    tensors = {key for key, value in state.items() if not _is_number(value)}
    return bool(tensors) and tensors == set(keys) and set(state) - tensors <= given


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, int | float) and not isinstance(value, bool)
