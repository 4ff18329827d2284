"""One flat run of values that a rank has to save: what its file will say, and where its values are now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonspeed.offload.disk import DiskFlat
from tritonspeed.offload.held import Held
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import PageFile

MASTER, PARAMETERS, GRADIENT, OUTBOX = "master", "parameters", "gradient", "outbox"
"""Kinds that are not the optimizer's: fp32 masters; parameters that do not follow from them; gradients in
accumulation, summed over the ranks; this rank's own, not summed yet."""

SNAPSHOT_BYTES = 64 * 2**20  # copied at a time


@dataclass(frozen=True)
class Record:
    """A flat of one bucket and kind, as this rank saves it.

    Attributes:
        file: bucket, kind, dtype, elements, and which parameters' elements stand where; rank and world.
        read: elements [lo, hi) of the flat, (hi - lo,), ``file.dtype``, on any device: a view where it can.
        flat: files of the disk tier whose committed slot is exactly this flat; None where it is in memory.
        held: that slot, kept as it is (``snapshot`` does, or ``flat.hold()``): ``held.place(path)`` instead of writing
            the file, ``held.digests()`` of it, ``held.release()`` at the end.
    """

    file: PageFile
    read: Callable[[int, int], Tensor]
    flat: DiskFlat | None = None
    held: Held | None = None

    def snapshot(self, empty: Callable[[int, torch.dtype], Tensor] = host_empty) -> Record:
        """The same values in host memory of their own, which training does not touch; on disk, in the slot they are in.

        Args:
            empty: (elements, dtype) → host memory.
        """
        if self.flat is not None:
            slot = self.flat.hold()
            return replace(self, read=slot.read, held=slot)
        held, step = empty(self.file.numel, self.file.dtype), SNAPSHOT_BYTES // self.file.dtype.itemsize
        for lo in range(0, self.file.numel, step):
            hi = min(lo + step, self.file.numel)
            held[lo:hi].copy_(self.read(lo, hi), non_blocking=held.is_pinned())
        return replace(self, read=lambda lo, hi: held[lo:hi])
