"""Copies between a GPU and page-locked host memory, under what the GPU computes meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspeed.offload.tiers import Done, Handle

_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}


class _Copied:
    """A copy under way on a stream of its own. It keeps both ends alive, so no allocator is told of the stream."""

    def __init__(self, event: torch.cuda.Event, *ends: Tensor) -> None:
        self._event, self._ends = event, ends

    def wait(self) -> None:
        """Until it is there: the host may read or overwrite its end, any stream the other one."""
        self._event.synchronize()
        self._ends = ()


def cross(source: Tensor, target: Tensor) -> Handle:
    """Start copying ``source`` to ``target``, of one shape, either of them on a GPU; between CPU tensors, copy.

    The copy comes after what the current stream has been given so far. Until ``wait``, leave both alone.
    """
    device = source.device if source.device.type == "cuda" else target.device
    if device.type != "cuda":
        target.copy_(source)
        return Done()
    key = (device, "down" if target.device.type == "cpu" else "up")
    stream = _streams.get(key) or _streams.setdefault(key, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    return _Copied(event, source, target)
