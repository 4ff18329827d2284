"""Optimizers whose update of an element needs its whole tensor: what ranks tell each other so that slices suffice.

    norms       LAMB: each rank adds up its own part of every tensor's squared norms; one small all-gather; the parts
                are added in rank order, so that every rank has the same bits
    matrices    Muon: the direction of every matrix goes to one rank, its owner, which orthogonalises it and sends back
                to each rank the part that it owns: two all-to-alls, each of which carries a slice's own size

A step goes in rounds of buckets: ``begin``, then ``update`` for every chunk that it ``takes``, then ``end``. Where
every rank owns everything (stage 0, one rank) nothing is sent, and the numbers are the same to the last bit: norms are
summed slice by slice all the same, and a matrix does not care who computes it. docs/decisions/013 has the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tritonspeed import comm
from tritonspeed.kernels.intervals import Intervals
from tritonspeed.optim import Lamb, Muon
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.chunk import Chunk
from tritonspeed.zero.layout import Layout, Span
from tritonspeed.zero.ledger import Ledger

ROUND_ELEMS = 64 * 2**20  # of matrices for each rank in a round: 128 MiB of bf16 that leave it, and as many that come
Chunks = dict[int, list[Chunk]]  # by the bucket's id


class WholeStep(Protocol):
    """What ``ZeroOptimizer`` asks of either kind."""

    rounds: list[list[Bucket]]

    def begin(self, buckets: Sequence[Bucket], scale: Tensor) -> None:
        """Learn of these buckets' tensors what the slices do not have; collective."""

    def takes(self, chunk: Chunk) -> bool:
        """Whether the chunk is updated by ``update``; else it is elementwise."""

    def update(self, chunk: Chunk, param_out: Tensor | None) -> None:
        """Weights and their low-precision copy."""

    def end(self) -> None:
        """Let go of what the round held."""


def needs_whole(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer is one of those that are stepped by this file."""
    return isinstance(optimizer, Lamb | Muon)


def whole_step_of(
    optimizer: torch.optim.Optimizer,
    chunks: Chunks,
    group_of_name: dict[int, dict[str, int]],
    buckets: list[Bucket],
    ledger: Ledger,
) -> WholeStep | None:
    """What steps this optimizer's whole tensors; None for an elementwise one.

    Args:
        chunks: this rank's, by the bucket's id.
        group_of_name: by the bucket's id, each parameter's optimizer group.
        buckets: in departure order.
        ledger: where memory that only a step holds is entered.
    """
    if not buckets:
        return None
    if isinstance(optimizer, Lamb):
        return SharedNorms(optimizer, chunks, buckets)
    if isinstance(optimizer, Muon):
        return SharedMatrices(optimizer, chunks, group_of_name, buckets, ledger)
    return None


class SharedNorms:
    """LAMB's two squared norms per tensor, over all slices.

    Tensors are numbered through all buckets; a chunk's are consecutive, for a chunk ends where the group does.
    """

    def __init__(self, optimizer: Lamb, chunks: Chunks, buckets: list[Bucket]) -> None:
        self.optimizer, self.chunks, self.rounds = optimizer, chunks, [buckets]
        self._mesh = buckets[0].mesh
        spans = [(id(bucket), span.name) for bucket in buckets for span in bucket.layout.spans if span.numel]
        self._number = {span: i for i, span in enumerate(spans)}
        self._maps: dict[int, Intervals] = {}
        self._norms: Tensor | None = None

    def begin(self, buckets: Sequence[Bucket], scale: Tensor) -> None:
        """Moments of every chunk; (world, T, 2) norms by slice, then (T, 2) of the tensors."""
        mesh = self._mesh
        by_slice = torch.zeros(mesh.world, len(self._number), 2, dtype=torch.float64, device=mesh.device)
        for bucket in buckets:
            for chunk in self.chunks[id(bucket)]:
                part = self.optimizer.measure_flat_(chunk.master, chunk.gradient(), scale, self._map_of(chunk))
                by_slice[chunk.start // bucket.layout.slice_numel, self._tensors_of(chunk)].add_(part)
        if not _owns_all(buckets):
            comm.all_gather_(mesh, by_slice.view(-1), "norms of tensors").wait()
        self._norms = by_slice.sum(0)

    def takes(self, chunk: Chunk) -> bool:
        return True

    def update(self, chunk: Chunk, param_out: Tensor | None) -> None:
        assert self._norms is not None, "a round has begun"
        norms = self._norms[self._tensors_of(chunk)]
        self.optimizer.step_scaled_(chunk.master, norms, self._map_of(chunk), param_out)

    def end(self) -> None:
        self._norms = None

    def _map_of(self, chunk: Chunk) -> Intervals:
        if id(chunk) not in self._maps:
            intervals = [(p.in_interval, p.in_interval + p.numel) for p in chunk.pieces()]
            self._maps[id(chunk)] = Intervals.of(intervals, chunk.master.device)
        return self._maps[id(chunk)]

    def _tensors_of(self, chunk: Chunk) -> slice:
        first = next((self._number[id(chunk.bucket), p.span.name] for p in chunk.pieces()), 0)
        return slice(first, first + self._map_of(chunk).num_tensors)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix, and the rank that orthogonalises it.

    Attributes:
        place: of its bucket among all.
        layout, span: where it is in the bucket.
        group: of the optimizer.
        owner: a rank.
    """

    place: int
    layout: Layout
    span: Span
    group: int
    owner: int

    def in_slice(self, rank: int) -> tuple[int, int]:
        """[lo, hi) of its elements in ``rank``'s slice, in elements of the bucket; empty where lo = hi."""
        lo, hi = self.layout.interval(rank)
        start = min(max(lo, self.span.offset), self.span.end)
        return start, max(start, min(hi, self.span.end))

    def numel_in(self, rank: int) -> int:
        """How many of its elements ``rank`` has."""
        lo, hi = self.in_slice(rank)
        return hi - lo


@dataclass(frozen=True, slots=True)
class Round:
    """Buckets that are stepped together, and their matrices."""

    buckets: slice
    matrices: list[Matrix]

    def held_elems(self, rank: int, shards: bool) -> int:
        """The most that a rank holds of it, in what matrices are orthogonalised in; the products' workspace apart.

        Args:
            shards: the optimizer's state is sharded; else every rank has every matrix.
        """
        layouts = {m.place: m.layout for m in self.matrices}.values()
        if not shards or all(layout.world == 1 for layout in layouts):
            return sum(layout.numel for layout in layouts)
        mine = sum(m.numel_in(rank) for m in self.matrices)
        theirs = sum(m.span.numel for m in self.matrices if m.owner == rank)
        return mine + max(sum(layout.slice_numel for layout in layouts), 2 * theirs)


def matrix_flops(shape: tuple[int, ...]) -> int:
    """What one iteration of Newton-Schulz costs, up to a factor: the measure of a fair share."""
    small, large = min(shape), max(shape)
    return 3 * small * small * large + small**3


def assign(shapes: Sequence[tuple[int, ...]], loads: list[int]) -> list[int]:
    """The owner of each matrix: the largest first, each to whom has least to do; the same on every rank.

    Args:
        shapes: of one round.
        loads: what each rank had to do in the rounds before, updated: it decides between equals.
    """
    now, owners = [0] * len(loads), [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -matrix_flops(shapes[i])):
        owners[i] = min(range(len(loads)), key=lambda rank: (now[rank], loads[rank], rank))
        now[owners[i]] += matrix_flops(shapes[i])
    loads[:] = [load + more for load, more in zip(loads, now, strict=True)]
    return owners


def plan_rounds(spans: Sequence[Sequence[tuple[Span, int]]], layouts: Sequence[Layout], world: int) -> list[Round]:
    """Consecutive buckets up to ``ROUND_ELEMS``, and who orthogonalises what: a function of the layout alone.

    Args:
        spans: of each bucket, its matrices and their optimizer groups.
        layouts: of each bucket, in departure order.
    """
    cuts, held = [0], 0
    for place, numel in enumerate(sum(span.numel for span, _ in found) for found in spans):
        if held and held + numel > ROUND_ELEMS * world:
            cuts.append(place)
            held = 0
        held += numel
    rounds, loads = [], [0] * world
    for start, end in zip(cuts, [*cuts[1:], len(spans)], strict=True):
        here = [(place, *each) for place in range(start, end) for each in spans[place]]
        owners = assign([span.shape for _, span, _ in here], loads)
        matrices = [
            Matrix(place, layouts[place], span, group, owner)
            for (place, span, group), owner in zip(here, owners, strict=True)
        ]
        rounds.append(Round(slice(start, end), matrices))
    return rounds


class SharedMatrices:
    """Muon's directions on their way to whole matrices, and the orthogonalised ones on their way back."""

    def __init__(
        self,
        optimizer: Muon,
        chunks: Chunks,
        group_of_name: dict[int, dict[str, int]],
        buckets: list[Bucket],
        ledger: Ledger,
    ) -> None:
        self.optimizer, self.chunks, self.ledger, self._mesh = optimizer, chunks, ledger, buckets[0].mesh
        self._buckets = buckets
        spans = [self._spans_of(bucket, group_of_name[id(bucket)]) for bucket in buckets]
        plan = plan_rounds(spans, [bucket.layout for bucket in buckets], self._mesh.world)
        self.rounds = [buckets[each.buckets] for each in plan]
        self._matrices: dict[int, list[Matrix]] = {}  # by the bucket's id
        for matrix in (matrix for each in plan for matrix in each.matrices):
            self._matrices.setdefault(id(buckets[matrix.place]), []).append(matrix)
        self._updates: dict[tuple[int, str], Tensor] = {}
        self._held_bytes = 0

    def _spans_of(self, bucket: Bucket, group_of_name: dict[str, int]) -> list[tuple[Span, int]]:
        groups = self.optimizer.param_groups
        spans = [(span, group_of_name[span.name]) for span in bucket.layout.spans if span.numel]
        return [(span, group) for span, group in spans if group >= 0 and groups[group]["use_muon"]]

    def takes(self, chunk: Chunk) -> bool:
        return self.optimizer.uses_muon(chunk.master)

    def begin(self, buckets: Sequence[Bucket], scale: Tensor) -> None:
        """Momentum and directions of every chunk, and the orthogonalised matrices' own parts."""
        buckets = [bucket for bucket in buckets if id(bucket) in self._matrices]
        if not buckets:
            return
        matrices = [matrix for bucket in buckets for matrix in self._matrices[id(bucket)]]
        directions = {id(bucket): self._directions(bucket, scale) for bucket in buckets}
        if _owns_all(buckets):
            self._hold(sum(flat.numel() for flat in directions.values()))
            wholes = [directions[self._key(m)[0]][m.span.offset : m.span.end] for m in matrices]
            self._orthogonalise_(matrices, wholes)
            self._updates = {self._key(m): whole for m, whole in zip(matrices, wholes, strict=True)}
        else:
            self._exchange(matrices, directions)

    def _key(self, matrix: Matrix) -> tuple[int, str]:
        return id(self._buckets[matrix.place]), matrix.span.name

    def _directions(self, bucket: Bucket, scale: Tensor) -> Tensor:
        """What is to be orthogonalised, over all that this rank owns of the bucket."""
        lo, hi = bucket.owned
        flat = torch.empty(hi - lo, dtype=self.optimizer.ns_dtype, device=self._mesh.device)
        for chunk in self.chunks[id(bucket)]:
            if self.takes(chunk):
                out = flat[chunk.start - lo : chunk.end - lo]
                self.optimizer.direct_flat_(chunk.master, chunk.gradient(), scale, out)
        return flat

    def _exchange(self, matrices: list[Matrix], directions: dict[int, Tensor]) -> None:
        """My parts of every matrix to its owner; the parts of mine, orthogonalised, back to theirs."""
        mesh, me = self._mesh, self._mesh.rank
        mine = [m for m in matrices if m.owner == me]
        theirs = sorted((m for m in matrices if m.numel_in(me)), key=lambda m: m.owner)  # stable: in order for each
        parts = []
        for matrix in theirs:
            lo, hi = matrix.in_slice(me)
            first = matrix.layout.interval(me)[0]
            parts.append(directions[self._key(matrix)[0]][lo - first : hi - first])
        sent_numels = [sum(m.numel_in(me) for m in theirs if m.owner == rank) for rank in range(mesh.world)]
        received_numels = [sum(m.numel_in(rank) for m in mine) for rank in range(mesh.world)]
        some = next(iter(directions.values()))
        self._hold(sum(flat.numel() for flat in directions.values()) + sum(sent_numels))
        sent = torch.cat([some[:0], *parts])
        directions.clear()
        parts.clear()
        self._hold(sum(sent_numels) + 2 * sum(received_numels))  # the matrices stand beside what they came in
        received = some.new_empty(sum(received_numels))
        comm.all_to_all(mesh, sent, sent_numels, received, received_numels, "matrices to their owners").wait()
        places: list[list[Tensor]] = [[] for _ in mine]  # of each matrix its parts, in rank order: the matrix's own
        for rank, flat in enumerate(received.split(received_numels)):
            for place, part in zip(places, flat.split([m.numel_in(rank) for m in mine]), strict=True):
                place.append(part)
        wholes = [torch.cat(place) for place in places]
        self._orthogonalise_(mine, wholes)
        for place, whole in zip(places, wholes, strict=True):
            for part, update in zip(place, whole.split([part.numel() for part in place]), strict=True):
                part.copy_(update)
        comm.all_to_all(mesh, received, received_numels, sent, sent_numels, "matrices to their slices").wait()
        updates = sent.split([m.numel_in(me) for m in theirs])
        self._updates = {self._key(m): part for m, part in zip(theirs, updates, strict=True)}

    def _orthogonalise_(self, matrices: Sequence[Matrix], wholes: Sequence[Tensor]) -> None:
        """In place, flat; group by group."""
        for group in sorted({m.group for m in matrices}):
            places = [i for i, m in enumerate(matrices) if m.group == group]
            shaped = [wholes[i].view(matrices[i].span.shape) for i in places]
            self.optimizer.orthogonalise_(self.optimizer.param_groups[group], shaped)

    def update(self, chunk: Chunk, param_out: Tensor | None) -> None:
        """Weights and their low-precision copy, matrix by matrix: the step's length goes with a matrix's shape."""
        bucket, (lo, _) = chunk.bucket, chunk.bucket.owned
        for piece in chunk.pieces():
            here = slice(piece.in_interval, piece.in_interval + piece.numel)
            held = self._updates[id(bucket), piece.span.name]
            first = piece.in_span - max(0, lo - piece.span.offset)  # what is held of it begins where this rank's does
            out = None if param_out is None else param_out[here]
            update = held[first : first + piece.numel]
            self.optimizer.step_matrix_(chunk.master, here, update, piece.span.shape, out)

    def end(self) -> None:
        self._updates = {}
        self._hold(0)

    def _hold(self, num_elems: int) -> None:
        """Enter in the ledger what a round holds now."""
        num_bytes = num_elems * self.optimizer.ns_dtype.itemsize
        self.ledger.add("communication", num_bytes - self._held_bytes)
        self._held_bytes = num_bytes


def _owns_all(buckets: Sequence[Bucket]) -> bool:
    return all(bucket.owned == (0, bucket.layout.numel) for bucket in buckets)
