"""Where every element of a parameter is: which file of which rank, and where in it.

A kind and a parameter are cut into places, one after another over the ranks; an outbox is whole on each rank.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tritonspeed.checkpoint.data_file import DataFile
from tritonspeed.checkpoint.errors import CorruptCheckpoint
from tritonspeed.checkpoint.record import MASTER, OUTBOX, PARAMETERS
from tritonspeed.checkpoint.source import ParameterFacts


@dataclass(frozen=True, slots=True)
class Place:
    """Elements [lo, hi) of a parameter, at least one, from element ``start`` of a file's flat on."""

    lo: int
    hi: int
    file: DataFile
    start: int

    def in_bytes(self, lo: int, hi: int) -> tuple[int, int]:
        """Where in the flat elements [lo, hi) of the parameter are."""
        size = self.file.record.dtype.itemsize
        return (self.start + lo - self.lo) * size, (self.start + hi - self.lo) * size

    def blocks(self, start: int, end: int) -> range:
        """Which blocks of the file have bytes [start, end) of the flat, at least one."""
        blocks = self.file.blocks
        first = bisect_right(blocks, start, key=lambda block: block.lo) - 1
        return range(first, bisect_left(blocks, end, lo=first, key=lambda block: block.lo))


Shared = dict[tuple[str, str], list[Place]]
Own = dict[tuple[int, str], list[Place]]


def find_places(
    files: Sequence[Sequence[DataFile]], parameters: Mapping[str, ParameterFacts], where: str
) -> tuple[Shared, Own]:
    """From the files of all ranks: {(kind, parameter): places in order}, {(rank, parameter): places of its outbox}.

    Args:
        files: by rank.
        parameters: everything that a layout names is one of them, and within it.
        where: for errors.

    Raises:
        CorruptCheckpoint: elements of something are in no file, or in two; a trained parameter has no values.
    """
    shared: Shared = {}
    own: Own = {}
    for rank, of_rank in enumerate(files):
        for file in of_rank:
            kind = file.record.kind
            for i in file.layout:
                is_own = kind == OUTBOX
                places = own.setdefault((rank, i.name), []) if is_own else shared.setdefault((kind, i.name), [])
                if i.hi > i.lo:
                    places.append(Place(i.lo, i.hi, file, i.start))
    for (kind, name), places in shared.items():
        _check_whole(f"{kind} of {name!r}", prod(parameters[name].shape), places, where)
    for (rank, name), places in own.items():
        _check_whole(f"{OUTBOX} of rank {rank} of {name!r}", prod(parameters[name].shape), places, where)
    for name, facts in parameters.items():
        if facts.trainable and prod(facts.shape) and not {(MASTER, name), (PARAMETERS, name)} & shared.keys():
            raise CorruptCheckpoint(f"{where}: no file has values of the trained parameter {name!r}")
    return shared, own


def _check_whole(what: str, numel: int, places: list[Place], where: str) -> None:
    """Sorts them; together they must be the whole parameter, and no element twice."""
    places.sort(key=lambda place: place.lo)
    end, before = 0, None
    for place in places:
        if place.lo > end:
            raise CorruptCheckpoint(f"{where}: {what}: [{end}, {place.lo}) is in no file")
        if place.lo < end and before is not None:
            here, there = place.file.path, before.file.path
            raise CorruptCheckpoint(f"{here}: {what}: [{place.lo}, {min(end, place.hi)}) is in {there} too")
        end, before = place.hi, place
    if end != numel:
        raise CorruptCheckpoint(f"{where}: {what}: [{end}, {numel}) is in no file")
    dtypes = {place.file.record.dtype for place in places}
    if len(dtypes) > 1 and not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        raise CorruptCheckpoint(f"{where}: {what} is in files of {', '.join(sorted(map(str, dtypes)))}")


def within(places: Sequence[Place], lo: int, hi: int) -> Iterator[Place]:
    """Those that share an element with [lo, hi), in order."""
    for place in places[max(0, bisect_right(places, lo, key=lambda place: place.lo) - 1) :]:
        if place.lo >= hi:
            return
        if max(lo, place.lo) < min(hi, place.hi):
            yield place
