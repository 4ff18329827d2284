"""A tile: what is fetched, updated and stored together of one bucket's masters and moments.

    chunks   |------- 0 -------|- 1 -|------------- 2 -------------|        optimizer groups
    tiles    |------ 0 ------|------ 1 ------|------ 2 ------|- 3 -|        whole pages of files

Where everything is resident, a tile is a chunk. Where it is not, chunks are cut at the ends of tiles too, and between
steps their masters and states are placeholders of the true shape, without memory, that read as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tritonspeed.comm.spans import FETCH, FETCH_WAIT, STORE, Span
from tritonspeed.kernels.dynamic_code import MIN_ELEMS
from tritonspeed.offload import Tier
from tritonspeed.offload.disk import DiskFlat
from tritonspeed.offload.options import MIN_TILE_ELEMS
from tritonspeed.offload.stream import Buffer
from tritonspeed.offload.tiers import Handle
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.chunk import Chunk, blank, cut_chunks
from tritonspeed.zero.homes import PAGE_ELEMS, Homes
from tritonspeed.zero.layout import round_up, runs

States = MutableMapping[Tensor, dict[str, Any]]
PARAMETERS, MASTER, GRADIENT = "parameters", "master", "gradient"


def tile_ends(runs: Sequence[tuple[int, int, int]], lo: int, hi: int, tile_elems: int) -> list[int]:
    """Where [lo, hi) is cut into tiles, both ends included; whole pages from ``lo`` on.

    A cut that would leave a chunk of fewer elements than an optimizer keeps in 8 bits comes a page earlier: whether it
    keeps them so is not to follow the cut.

    Args:
        runs: (optimizer group, start, end), as ``layout.runs`` gives them.
        tile_elems: longest tile, a multiple of ``PAGE_ELEMS``.
    """

    def leaves_crumbs(at: int) -> bool:
        return any(
            start < at < end and end - start >= MIN_ELEMS and min(at - start, end - at) < MIN_ELEMS
            for _, start, end in runs
        )

    ends = [lo]
    while ends[-1] + tile_elems < hi:
        wanted = ends[-1] + tile_elems
        earlier = range(wanted, ends[-1], -PAGE_ELEMS)
        ends.append(next((at for at in earlier if not leaves_crumbs(at)), wanted))
    return [*ends, hi]


class Tile:
    """Elements [lo, hi) of a bucket, in whichever tier they live.

    Args:
        bucket: within whose ``owned`` they are.
        chunks: the optimizer's, inside them; the rest is padding, or parameters without optimizer.
        states: the optimizer's ``state``.
        flats: the bucket's files by kind; those of states are added as the optimizer makes them. Empty where masters
            are in memory.
        homes: where a file is made.
    """

    def __init__(
        self,
        bucket: Bucket,
        lo: int,
        hi: int,
        chunks: list[Chunk],
        states: States,
        flats: dict[str, DiskFlat],
        homes: Homes | None,
    ) -> None:
        self.bucket, self.lo, self.hi, self.chunks = bucket, lo, hi, chunks
        self.states, self.flats, self.homes = states, flats, homes
        self.on_disk = bucket.tier is Tier.DISK
        self.kinds: list[str] = [MASTER] if self.on_disk else []  # what there is of it on disk
        self._kinds_of: dict[int, list[str]] = {}
        self._buffer: Buffer | None = None
        self._handles: list[Handle] = []
        self._fetching: Span | None = None
        self._storing: Span | None = None
        self._is_ahead = False  # what is on disk is on its way already
        self._copies: list[tuple[Tensor, Tensor]] = []  # (host memory, where on the device it goes)
        self._gradient: Tensor | None = None  # where it has to come from the device first
        self.needs_buffer = is_staged(bucket, homes)
        self._copy_crosses = bucket.is_apart and not bucket.shard_crosses
        self.has_left = True
        self._has_gaps = sum(chunk.end - chunk.start for chunk in chunks) < hi - lo

    # in

    def fetch_ahead(self, buffer: Buffer | None) -> None:
        """Start reading what is on disk, before the gradient is complete."""
        self._read(buffer)
        self._is_ahead = True

    def forget(self) -> None:
        """What was read ahead is not wanted."""
        for handle in self._handles:
            with suppress(OSError):  # who wants it reads it again, and is told
                handle.wait()
        self._handles.clear()
        self._buffer, self._is_ahead = None, False

    def fetch(self, buffer: Buffer | None) -> None:
        """Start reading what is on disk, and the gradient where it stands on the device still."""
        if not self._is_ahead:
            self._read(buffer)
        self._is_ahead = False
        if buffer is not None and (grad := self._device_gradient()) is not None:
            assert self.homes is not None, "what is not resident has a home"
            self._gradient = self._place(GRADIENT, grad.dtype)
            self._handles.append(self.homes.crossings.down(grad, self._gradient))

    def _read(self, buffer: Buffer | None) -> None:
        self._buffer = buffer
        first = self.bucket.owned[0]
        if self.kinds:
            num_bytes = sum(self.flats[kind].dtype.itemsize for kind in self.kinds) * (self.hi - self.lo)
            self._fetching = self.bucket.mesh.spans.start(FETCH, self.bucket.name, num_bytes)
        for kind in self.kinds:
            place = self._place(kind, self.flats[kind].dtype)
            self._handles.append(self.flats[kind].fetch(self.lo - first, self.hi - first, place))

    def _device_gradient(self) -> Tensor | None:
        """What a rank has of every slice's sum (stage 0) cannot leave as it is reduced: it crosses tile by tile."""
        bucket = self.bucket
        if bucket.grad is None or self.homes is None or self.homes.shares_memory or bucket.owned == bucket.own:
            return None
        return bucket.grad[self.lo - bucket.owned[0] : self.hi - bucket.owned[0]]

    def gradient_of(self, chunk: Chunk) -> Tensor:
        """The summed gradient of a chunk, not yet unscaled, in the memory of its master."""
        if self._gradient is None:
            return chunk.gradient()
        return self._gradient[chunk.start - self.lo : chunk.end - self.lo]

    def _place(self, kind: str, dtype: torch.dtype) -> Tensor:
        assert self._buffer is not None, "a tile that is not resident has a buffer"
        return self._buffer.of(kind, dtype, self.hi - self.lo)

    def wait(self) -> None:
        """Until it is there; then the chunks' masters and states are views of the buffer."""
        if self._handles:
            with self.bucket.mesh.spans.span(FETCH_WAIT, self.bucket.name, on_host=True):
                for handle in self._handles:
                    handle.wait()
        self._handles.clear()
        if self._fetching is not None:
            self._fetching.close()
        if self.on_disk:
            self._bind()
        if self.bucket.shard_flat is not None and self._has_gaps:  # what no chunk writes is written to the file too
            types = self.bucket.types
            held = self._place(MASTER, types.master) if self.on_disk else self._resident_master()
            self._place(PARAMETERS, types.compute).copy_(held)

    def _resident_master(self) -> Tensor:
        assert self.bucket.master is not None, "a master that is not on disk is in memory"
        return self.bucket.master[self.lo - self.bucket.owned[0] : self.hi - self.bucket.owned[0]]

    def _bind(self) -> None:
        for chunk in self.chunks:
            here = slice(chunk.start - self.lo, chunk.end - self.lo)
            chunk.master.data = self._place(MASTER, self.flats[MASTER].dtype)[here]
            for kind in self._kinds_of.get(id(chunk), ()):
                self.states[chunk.master][kind] = self._place(kind, self.flats[kind].dtype)[here]

    def copy_of(self, chunk: Chunk) -> Tensor | None:
        """Where the compute-dtype copy of a chunk is written, in the memory of its master; None where there is none."""
        bucket = self.bucket
        if bucket.shard_flat is not None:
            return self._place(PARAMETERS, bucket.types.compute)[chunk.start - self.lo : chunk.end - self.lo]
        target = chunk.low_precision()
        if target is None or not self._copy_crosses:
            return target
        staged = self._place(PARAMETERS, target.dtype)[chunk.start - self.lo : chunk.end - self.lo]
        self._copies.append((staged, target))
        return staged

    # out

    def store(self) -> list[Handle]:
        """Start bringing back what was changed; masters and states are placeholders again."""
        handles: list[Handle] = []
        if self.needs_buffer:
            num_bytes = sum(self.flats[kind].dtype.itemsize for kind in self.kinds) * (self.hi - self.lo)
            num_bytes += sum(staged.nbytes for staged, _ in self._copies)
            self._storing = self.bucket.mesh.spans.start(STORE, self.bucket.name, num_bytes)
        for staged, target in self._copies:
            assert self.homes is not None, "what is staged has a home"
            handles.append(self.homes.crossings.up(staged, target))
        self._copies.clear()
        bucket = self.bucket
        if bucket.shard_flat is not None:
            first = bucket.own[0]
            handles.append(bucket.shard_flat.store(self.lo - first, self._place(PARAMETERS, bucket.types.compute)))
        if self.on_disk:
            self._take_states()
            for kind in self.kinds:
                flat = self.flats[kind]
                handles.append(flat.store(self.lo - bucket.owned[0], self._place(kind, flat.dtype)))
            self._unbind()
        return handles

    def _take_states(self) -> None:
        """What the optimizer has made or replaced goes into the buffer, a new kind into a file of its own."""
        for chunk in self.chunks:
            here = slice(chunk.start - self.lo, chunk.end - self.lo)
            for kind, state in self.states[chunk.master].items():
                if not isinstance(state, Tensor) or state.ndim == 0 or state.numel() != chunk.end - chunk.start:
                    continue
                place = self._place(kind, state.dtype)
                if kind not in self.kinds:
                    place.zero_()
                    self.kinds.append(kind)
                if kind not in self._kinds_of.setdefault(id(chunk), []):
                    self._kinds_of[id(chunk)].append(kind)
                if kind not in self.flats:
                    assert self.homes is not None, "what is on disk has a home"
                    bucket = self.bucket
                    self.flats[kind] = self.homes.on_disk(bucket.name, kind, state.dtype, bucket.layout, bucket.owned)
                if state.data_ptr() != place[here].data_ptr():
                    place[here].copy_(state)

    def _unbind(self) -> None:
        for chunk in self.chunks:
            chunk.master.data = blank(chunk.end - chunk.start, chunk.master.dtype)
            for kind in self._kinds_of.get(id(chunk), ()):
                self.states[chunk.master][kind] = blank(chunk.end - chunk.start, self.flats[kind].dtype)

    def leave(self) -> None:
        """It is back: the buffer is another's."""
        self._buffer = self._gradient = None
        self.has_left = True
        if self._storing is not None:
            self._storing.close()
            self._storing = None

    def take_over(self, states: States) -> None:
        """The optimizer has loaded states: what belongs on disk goes there.

        Args:
            states: the optimizer's ``state`` from now on.
        """
        self.states = states
        if not self.on_disk:
            return
        loaded = {id(chunk): dict(states[chunk.master]) for chunk in self.chunks if chunk.master in states}
        with self.opened(changes=True):
            for chunk in self.chunks:
                for kind, state in loaded.get(id(chunk), {}).items():
                    self.states[chunk.master][kind] = state

    @contextmanager
    def opened(self, changes: bool = False) -> Iterator[None]:
        """Masters and states in memory of their own, outside a step.

        Args:
            changes: what was changed is kept.
        """
        if not self.on_disk:
            yield
            return
        assert self.homes is not None, "what is on disk has a home"
        self._read(Buffer(self.hi - self.lo, self.homes.empty))
        self.wait()
        try:
            yield
            if changes:
                self._take_states()
                for kind in self.kinds:
                    flat = self.flats[kind]
                    flat.edit(self.lo - self.bucket.owned[0], self._place(kind, flat.dtype))
        finally:
            self._unbind()
            self.leave()


def is_staged(bucket: Bucket, homes: Homes | None) -> bool:
    """Whether a step needs memory of its own for a bucket: to read from disk into, to write to it or to a GPU from."""
    if bucket.tier is Tier.DISK or bucket.shard_flat is not None:
        return True
    return bucket.tier is Tier.HOST and homes is not None and not homes.shares_memory


def cut_tiles(
    bucket: Bucket, group_of_name: dict[str, int], max_elems: int, states: States, homes: Homes | None
) -> tuple[list[tuple[int, Chunk]], list[Tile]]:
    """A bucket's chunks, each with the index of its optimizer group, and its tiles.

    Args:
        group_of_name: the parameters' optimizer groups.
        max_elems: longest chunk (``sub_group_size``); 0 is no bound.
        states: the optimizer's ``state``.
    """
    if homes is None or not is_staged(bucket, homes):
        chunks = cut_chunks(bucket, group_of_name, max_elems)
        return chunks, [Tile(bucket, c.start, c.end, [c], states, {}, homes) for _, c in chunks]
    wanted = round_up(max_elems, PAGE_ELEMS) or homes.offload.tile_elems
    tile_elems = min(homes.offload.tile_elems, max(wanted, MIN_TILE_ELEMS))
    ends: list[int] = []
    for lo, hi in bucket.slices:
        ends += tile_ends(runs(bucket.layout.spans, group_of_name, lo, hi), lo, hi, tile_elems)
    chunks = cut_chunks(bucket, group_of_name, 0, ends)
    flats = {} if bucket.master_flat is None else {MASTER: bucket.master_flat}
    tiles = []
    for lo, hi in pairwise(ends):
        inside = [chunk for _, chunk in chunks if lo <= chunk.start < hi]
        if inside:
            tiles.append(Tile(bucket, lo, hi, inside, states, flats, homes))
    return chunks, tiles
