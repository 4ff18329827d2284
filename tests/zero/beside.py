"""A GPU's memory, played on a CPU: host memory is apart from the device's, and copies are as late as they may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from tritonspeed.offload import crossing
from tritonspeed.zero.homes import Homes


class LateCrossing(crossing.Crossing):
    """A copy that shows as late as it may: on the device when a stream waits for it, on the host when the host does.
    Before, its target holds NaN, as if nothing had come."""

    def __init__(self, goes_up: bool, source: Tensor, target: Tensor) -> None:
        super().__init__()
        self.goes_up, self.source, self.target = goes_up, source, target
        target.fill_(float("nan"))

    def wait(self) -> None:
        if self.source is not None:
            with torch.no_grad():
                self.target.copy_(self.source)
        self.source = None

    def join(self) -> None:
        if self.goes_up:
            self.wait()
        elif self.source is not None:
            freed, self.source = self.source, self.source.clone()
            freed.fill_(float("nan"))  # the next owner of that memory writes to it

    def following(self):
        if dist.is_initialized() and dist.get_world_size() > 1:  # a collective reads the slice
            self.wait()
        return nullcontext()


class LateCrossings(crossing.Crossings):
    """Counts as its base does."""

    def _start(self, way, source, target, device):
        self._ways[way].add(source.nbytes, 0.0)
        return LateCrossing(way == crossing.UP, source, target)


@contextmanager
def host_apart(late: bool = False) -> Iterator[None]:
    """Models that are sharded inside copy whatever they would copy beside a GPU.

    Args:
        late: each copy at the last moment that the code allows, instead of at once.
    """
    old = Homes.__init__

    def init(self, *args, **kwargs):
        old(self, *args, **kwargs)
        self.shares_memory = False
        if late:
            self.crossings = LateCrossings()

    Homes.__init__ = init
    try:
        yield
    finally:
        Homes.__init__ = old
