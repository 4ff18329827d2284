"""Host memory that is lent and comes back, by size: page-locking a buffer takes longer than copying into it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from tritonspeed.offload.tiers import Handle

Key = tuple[str, int, torch.dtype]


class HostPool:
    """Buffers of host memory, kept until ``clear``.

    Which buffer is given follows from the order of calls, never from time: how many there will be can be counted
    beforehand.

    Args:
        count: told of (purpose, bytes) as a buffer is made, and with less than 0 as it goes.
    """

    def __init__(self, count: Callable[[str, int], None]) -> None:
        self._count = count
        self._free: dict[Key, deque[tuple[Tensor, Handle | None]]] = {}

    def lend(self, purpose: str, numel: int, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """(numel,) in host memory, the one that came back first; waits until whoever had it is done with it.

        Args:
            make: makes one, where none is free.
        """
        free = self._free.get((purpose, numel, dtype))
        if free:
            buffer, after = free.popleft()
            if after is not None:
                after.wait()
            return buffer
        buffer = make()
        self._count(purpose, buffer.nbytes)
        return buffer

    def take_back(self, purpose: str, buffer: Tensor, after: Handle | None = None) -> None:
        """What ``lend`` gave is free again, as soon as ``after`` has ended."""
        self._free.setdefault((purpose, buffer.numel(), buffer.dtype), deque()).append((buffer, after))

    def clear(self) -> None:
        """Let go of every buffer that is free."""
        for (purpose, _, _), free in self._free.items():
            for buffer, after in free:
                if after is not None:
                    after.wait()
                self._count(purpose, -buffer.nbytes)
        self._free.clear()
