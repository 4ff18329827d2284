"""Where a parameter's elements are: integers only, no tensors, no ranks talking.

A bucket is one flat buffer. Each parameter starts on a 256-byte boundary; the bucket is padded so that every rank's
slice is a whole number of 4-KiB pages; rank r owns the contiguous slice r. Nothing else computes an offset.

    |p0 p0 p0 .|p1 .|p2 p2 p2 p2 p2 p2 p2 .|p3 . . . . . .|      "." padding, always zero
    |<----- rank 0 ----->|<----- rank 1 ----->|
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

PARAMETER_ALIGNMENT_BYTES = 256  # the widest vector access of any GPU, and a cache line
SLICE_ALIGNMENT_BYTES = 4096  # a page: what direct disk I/O asks for


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Span:
    """One parameter's place in its bucket. ``offset`` and ``numel`` count elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a parameter that falls into some interval of the bucket.

    ``in_span`` is where it starts within the parameter, ``in_interval`` where it starts within the interval.
    """

    span: Span
    in_span: int
    in_interval: int
    numel: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The map of one bucket over ``world`` ranks. ``numel`` includes the padding and is a multiple of ``world``."""

    spans: tuple[Span, ...]
    world: int
    numel: int
    itemsize: int

    @property
    def slice_numel(self) -> int:
        """Elements that one rank owns."""
        return self.numel // self.world

    def interval(self, rank: int) -> tuple[int, int]:
        """[lo, hi) of ``rank``'s slice, in elements of the bucket."""
        return rank * self.slice_numel, (rank + 1) * self.slice_numel

    def pieces(self, lo: int, hi: int) -> list[Piece]:
        """The parameters' parts inside [lo, hi), in order."""
        found = []
        for span in self.spans:
            start, end = max(lo, span.offset), min(hi, span.end)
            if start < end:
                found.append(Piece(span, start - span.offset, start - lo, end - start))
        return found


def lay_out(parameters: Iterable[tuple[str, Sequence[int]]], itemsize: int, world: int) -> Layout:
    """Place parameters one after another.

    Args:
        parameters: (name, shape) in order.
        itemsize: bytes of one element in the compute dtype.
        world: ranks that share the bucket.
    """
    alignment = max(1, PARAMETER_ALIGNMENT_BYTES // itemsize)
    spans, offset = [], 0
    for name, shape in parameters:
        numel = prod(shape)
        spans.append(Span(name, tuple(shape), offset, numel))
        offset = round_up(offset + numel, alignment)
    page = world * max(1, SLICE_ALIGNMENT_BYTES // itemsize)
    return Layout(tuple(spans), world, max(round_up(offset, page), page), itemsize)


def runs(spans: Sequence[Span], key: dict[str, int], lo: int, hi: int) -> list[tuple[int, int, int]]:
    """Cut [lo, hi) where the key of the parameters changes: [(key, start, end)], padding with what precedes it.

    Optimizer groups (with and without weight decay, say) become few contiguous runs of one flat buffer.
    """
    found: list[tuple[int, int, int]] = []
    for i, span in enumerate(spans):
        end = spans[i + 1].offset if i + 1 < len(spans) else hi
        start, end = max(lo, span.offset), min(hi, max(end, span.end))
        if start >= end:
            continue
        if found and found[-1][0] == key[span.name]:
            found[-1] = (key[span.name], found[-1][1], end)
        else:
            found.append((key[span.name], start, end))
    return found
