"""A flat chunk that many tensors share, for kernels that need to know which element is whose.

    chunk      |a a a a a a a a a a a . . .|b b b . . .|c c c c c|        "." belongs to nobody
    segments   |----0----|--1---|          |-2-|       |----3----|        a program each

The map is a table on the device, made once: a launch per chunk serves any number of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 8192  # elements of a program: 32 bytes of sums and table for 180 to 320 KiB read and written
ALIGNMENT = 16  # elements: every tensor of a chunk starts at a multiple, so that loads are 16 bytes wide
CPU_CHUNK_ELEMS = 64 * 1024  # five fp32 arrays of it fit a core's second-level cache


@dataclass(frozen=True, eq=False)
class Intervals:
    """Which elements of a flat chunk belong to which tensor, as the kernels read it.

    Attributes:
        bounds: start and end of every tensor's elements, [s0, e0, s1, e1, ...].
        table: (segments, 3) int32 on the chunk's device: start / ``ALIGNMENT``, length, tensor.
        first: (T + 1,) int32: the first segment of each tensor.
    """

    bounds: list[int]
    table: Tensor
    first: Tensor

    @classmethod
    def of(cls, intervals: Sequence[tuple[int, int]], device: torch.device) -> "Intervals":
        """The map of these [start, end), which do not overlap.

        Raises:
            ValueError: a start that is no multiple of ``ALIGNMENT``.
        """
        rows, first = [], [0]
        for tensor, (start, end) in enumerate(intervals):
            if start % ALIGNMENT or end < start:
                raise ValueError(f"interval [{start}, {end}) must start at a multiple of {ALIGNMENT}")
            rows += [(at // ALIGNMENT, min(SEGMENT, end - at), tensor) for at in range(start, end, SEGMENT)]
            first.append(len(rows))
        table = torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)
        bounds = [bound for interval in intervals for bound in interval]
        return cls(bounds, table, torch.tensor(first, dtype=torch.int32, device=device))

    @property
    def num_tensors(self) -> int:
        return len(self.bounds) // 2


def cpu_tiles(bounds: list[int]) -> list[tuple[int, slice]]:
    """(tensor, elements) of every piece that a CPU works on at a time."""
    pairs = enumerate(zip(bounds[::2], bounds[1::2], strict=True))
    return [
        (tensor, slice(at, min(at + CPU_CHUNK_ELEMS, end)))
        for tensor, (start, end) in pairs
        for at in range(start, end, CPU_CHUNK_ELEMS)
    ]
