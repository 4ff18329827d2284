"""A chunk: a contiguous run of one rank slice whose parameters share an optimizer group.

    bucket    |p0 p0 p0 .|p1 .|p2 p2 p2 p2 p2 p2 p2 .|p3 . . .|        p1 without weight decay
    slices    |<------ rank 0 ------->|<------ rank 1 ------->|
    chunks    |----0-----|-1--|---2---|----------3------------|

Each is one flat fp32 parameter of the optimizer.

``sub_group_size`` cuts runs further, only where no number can follow the cut: at multiples of ``CUT_ELEMS`` from the
bucket's element 0, where neither a block of 8-bit moments nor a group of random words is split; and never into fewer
elements than an optimizer keeps in 8 bits. Where a group begins inside a block of 256, each of the two chunks has a
scale of its own for the part of the block that it holds: the same at every ``sub_group_size``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed.kernels.dynamic_code import MIN_ELEMS
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.layout import Piece, round_up, runs

CUT_ELEMS = 1024  # a multiple of the 256 of a block, and of every kernel's vector


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, end) of a bucket, updated as one flat fp32 parameter of the optimizer."""

    bucket: Bucket
    start: int
    end: int
    master: Parameter

    def gradient(self) -> Tensor:
        """The summed gradient of these elements, not yet unscaled, where it is between steps."""
        grad = self.bucket.grad
        assert grad is not None, "a step follows a reduction"
        return grad[self.start - self.bucket.owned[0] : self.end - self.bucket.owned[0]]

    def low_precision(self) -> Tensor | None:
        """Where the compute-dtype copy is written; None where the master is the parameter, or stage 3 casts later."""
        bucket = self.bucket
        if bucket.frees and bucket.shard is not None:
            return bucket.shard[self.start - bucket.own[0] : self.end - bucket.own[0]]
        if bucket.frees or (bucket.types.compute == bucket.types.master and bucket.rounds_master):
            return None
        return bucket.whole[self.start : self.end]

    def pieces(self) -> list[Piece]:
        """The parameters' parts in it, ``in_interval`` counted from the chunk's start; padding is in none."""
        return [piece for piece in self.bucket.layout.pieces(self.start, self.end) if piece.numel]


def cuts(start: int, end: int, max_elems: int) -> list[int]:
    """Where [start, end) is cut, both ends included.

    Args:
        max_elems: longest chunk wanted; the first and the last may have ``CUT_ELEMS`` and ``MIN_ELEMS`` more.
    """
    if not max_elems:
        return [start, end]
    step = round_up(max(max_elems, MIN_ELEMS), CUT_ELEMS)
    return [start, *range(round_up(start, CUT_ELEMS) + step, end - MIN_ELEMS + 1, step), end]


def blank(numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) of true shape without memory: one NaN, or 0, seen everywhere."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype).expand(numel)


def cut_chunks(
    bucket: Bucket, group_of_name: dict[str, int], max_elems: int, tile_ends: Sequence[int] = ()
) -> list[tuple[int, Chunk]]:
    """The optimizer's chunks of one bucket, each with the index of its optimizer group (-1: in none, left out).

    Args:
        max_elems: longest chunk (``sub_group_size``), as in ``cuts``; 0 is no bound.
        tile_ends: where to cut too: what is not resident is fetched between them.
    """
    assert bucket.trainable, "only trainable buckets are cut into chunks"
    found = []
    for lo, hi in bucket.slices:
        for group, start, end in runs(bucket.layout.spans, group_of_name, lo, hi):
            inside = [at for at in tile_ends if start < at < end]
            for first, last in pairwise([start, *inside, end]) if group >= 0 else ():
                for at, to in pairwise(cuts(first, last, max_elems)):
                    found.append((group, Chunk(bucket, at, to, Parameter(_master(bucket, at, to)))))
    return found


def _master(bucket: Bucket, lo: int, hi: int) -> Tensor:
    if bucket.master is None:
        return blank(hi - lo, bucket.types.master)
    return bucket.master[lo - bucket.owned[0] : hi - bucket.owned[0]]
