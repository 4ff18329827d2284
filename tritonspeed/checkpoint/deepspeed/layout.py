"""Where DeepSpeed keeps each parameter's elements: which rank's file, which flat of it, from which element on.

    stages 1, 2   the parameters of a group one after the other, to a multiple of 2 · world; a rank has 1/world of it
    stage 3       the parameters of a sub-group one after the other, of each 1/world, rounded up

        |--- rank 0 ---|--- rank 1 ---|           | a | b | c | of rank 0, padded    | a | b | c | of rank 1
        |  a  | b |    c    | padding |

The order is that of ``param_shapes`` in the model's file. ``param_slice_mappings`` says the same of stages 1 and 2,
but not under "round_robin_gradients", where it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tritonspeed.checkpoint.manifest import MOST_ELEMS

ALIGNMENT = 2  # elements per rank: DeepSpeed's nccl_start_alignment_factor
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements [lo, hi) of a flattened parameter; the first is element ``start`` of flat ``flat`` of rank ``rank``."""

    rank: int
    flat: int
    lo: int
    hi: int
    start: int


@dataclass(frozen=True, slots=True)
class Place:
    """Of one parameter: its element i is element (before + i) mod share, plus ``after``, of rank (before + i) ÷ share.

    Attributes:
        flat: which.
        numel: its elements.
        share: what one rank has before the next one begins.
        before, after: where it begins in the whole flat (stages 1, 2), or in every rank's (stage 3).
    """

    flat: int
    numel: int
    share: int
    before: int = 0
    after: int = 0

    def extents(self, lo: int, hi: int) -> Iterator[Extent]:
        """Elements [lo, hi), rank by rank."""
        while lo < hi:
            rank, start = divmod(self.before + lo, self.share)
            end = min(hi, lo + self.share - start)
            yield Extent(rank, self.flat, lo, end, self.after + start)
            lo = end


@dataclass(frozen=True)
class Layout:
    """Of all trained parameters.

    Attributes:
        places: by name.
        groups: names of each flat, in order.
        shares, ends: of each flat, what a rank has of it with its padding, and the elements of all ranks without.
    """

    places: dict[str, Place]
    groups: tuple[tuple[str, ...], ...]
    shares: tuple[int, ...]
    ends: tuple[int, ...]

    def sizes(self, rank: int, flat: int) -> tuple[int, int]:
        """How many elements a rank's flat may have: with the padding at its end, and without."""
        share = self.shares[flat]
        return share, min(max(0, self.ends[flat] - rank * share), share)


def read_shapes(value: Any) -> list[Shapes]:
    """``param_shapes``: a dict for each flat.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, dict):  # versions before 0.4 had one group
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"param_shapes is a {type(value).__name__}, not a list")
    found = [{checked_name(name): checked_shape(shape, name) for name, shape in items(each)} for each in value]
    names = [name for each in found for name in each]
    if len(set(names)) != len(names):
        raise ValueError("a parameter is in param_shapes twice")
    return found


def items(value: Any) -> Any:
    """Of a dict.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where a dict is expected")
    return value.items()


def checked_name(value: Any) -> str:
    """A parameter's name.

    Raises:
        ValueError: it is no text, or an empty one.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.80} is no parameter's name")
    return value


def checked_count(value: Any, what: str, least: int = 0, most: int = MOST_ELEMS) -> int:
    """A whole number in [least, most].

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r:.80}, must be a whole number in [{least}, {most}]")
    return value


def checked_shape(value: Any, name: str) -> tuple[int, ...]:
    """A shape whose elements can be counted.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, tuple | list):
        raise ValueError(f"the shape of {name!r} is a {type(value).__name__}")
    shape = tuple(checked_count(n, f"a size of {name!r}") for n in value)
    checked_count(prod(shape), f"elements of {name!r}")
    return shape


def flat_layout(groups: Sequence[Shapes], paddings: Any, world: int) -> Layout:
    """Of stages 1 and 2.

    Args:
        groups: as ``read_shapes`` gives them.
        paddings: elements after each parameter, group by group ("parameter_alignment"); None is none.

    Raises:
        ValueError: the paddings do not belong to the parameters.
    """
    places: dict[str, Place] = {}
    shares, ends = [], []
    for flat, shapes in enumerate(groups):
        gaps = _gaps(paddings, flat, len(groups), len(shapes))
        end = sum(prod(shape) for shape in shapes.values()) + sum(gaps)
        share = -(-end // (ALIGNMENT * world)) * ALIGNMENT
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            places[name] = Place(flat, prod(shape), share, before=offset)
            offset += prod(shape) + gap
        shares.append(share)
        ends.append(end)
    return Layout(places, _names(groups), tuple(shares), tuple(ends))


def sharded_layout(groups: Sequence[Shapes], world: int) -> Layout:
    """Of stage 3; ``groups`` are sub-groups."""
    places: dict[str, Place] = {}
    shares = []
    for flat, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            places[name] = shared_place(prod(shape), world, flat, offset)
            offset += -(-prod(shape) // world)
        shares.append(offset)
    return Layout(places, _names(groups), tuple(shares), tuple(share * world for share in shares))


def shared_place(numel: int, world: int, flat: int = 0, offset: int = 0) -> Place:
    """One parameter of stage 3, whose share begins at element ``offset`` of every rank's flat."""
    return Place(flat, numel, -(-numel // world), after=offset)


def whole_layout(groups: Sequence[Shapes]) -> Layout:
    """Of stage 0 with masters: one rank has everything, group by group without padding between."""
    return sharded_layout(groups, 1)


def _names(groups: Sequence[Shapes]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(shapes) for shapes in groups)


def _gaps(paddings: Any, flat: int, num_groups: int, count: int) -> list[int]:
    if paddings is None:
        return [0] * count
    if not isinstance(paddings, list) or len(paddings) != num_groups or not isinstance(paddings[flat], list):
        raise ValueError("param_alignment_paddings has not one list for each group of parameters")
    if len(paddings[flat]) != count:
        raise ValueError(f"param_alignment_paddings has {len(paddings[flat])} numbers for {count} parameters")
    return [checked_count(gap, "a padding") for gap in paddings[flat]]
