"""Blocks of a checkpoint's files in memory, checked: the few that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from tritonspeed.checkpoint.data_file import DataFile
from tritonspeed.offload.memory import host_empty

HELD_BYTES = 64 * 2**20


class Blocks:
    """Gives blocks, and keeps as many as fit.

    Args:
        held_bytes: in memory at once; one block always is.
        on_bytes: told of the bytes of each block that was read.
    """

    def __init__(self, held_bytes: int = HELD_BYTES, on_bytes: Callable[[int], None] | None = None) -> None:
        self.held_bytes, self._on_bytes = held_bytes, on_bytes
        self._held: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def get(self, file: DataFile, index: int) -> Tensor:
        """A block's bytes; nobody may write to them."""
        key = (id(file), index)
        if key not in self._held:
            needed = file.buffer_bytes(index)
            while self._held and sum(held.numel() for held in self._held.values()) + needed > self.held_bytes:
                self._held.popitem(last=False)
            block = file.read_block(index, host_empty(needed, torch.uint8))
            self._held[key] = block
            if self._on_bytes is not None:
                self._on_bytes(block.numel())
        self._held.move_to_end(key)
        return self._held[key]

    def close(self) -> None:
        """Let go of the memory."""
        self._held.clear()
