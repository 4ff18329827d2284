"""What checkpointed regions start from, in host memory between forward and backward.

With regions 1 .. n of b bytes of inputs each, which nobody else holds:

    host      n·b    at the end of forward: a buffer has exactly its tensor's size
    device    2·b    at the end of forward: the last two regions' are still there, and backward begins with them
              2·b    in backward: one region's in use, and the one's before it on its way back

A copy to the host runs on a stream of its own, after what made the tensor. The device's memory is let go of two
regions later, when the compute stream has been told to wait for the copy: neither the host nor an allocator waits.
Backward asks for one region's inputs, which starts the region's before it on their way.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tritonspeed.offload.memory import host_empty

REGIONS_LEAVING = 2  # a copy has the next region's compute to run under, and one region more before anyone waits

Event = torch.cuda.Event
_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}


@dataclass(eq=False)
class _Buffer:
    """Host memory, and when the last copy from or to it has ended (None: it has)."""

    elems: Tensor
    busy: Event | None = None


@dataclass(eq=False)
class Region:
    """The inputs of one checkpointed region that are away.

    Attributes:
        previous: the region saved before it: backward wants it next.
        copies: as long as somebody wants them.
    """

    previous: weakref.ref[Region] | None
    copies: list[weakref.ref[HostCopy]] = field(default_factory=list)


@dataclass(eq=False)
class HostCopy:
    """One tensor on the host, or on its way there or back.

    Attributes:
        like: the tensor on the meta device: shape, strides, dtype.
        device: where it came from.
        buffer: its elements, (extent,) of memory, or (numel,) where it has gaps.
        region: that saved it first.
        storage: while this is held, no other storage has its address.
        version: how often it had been written to.
        leaving: the tensor, and what of it is being copied, until the copy has been waited for.
        ahead: its elements on the device again, and when they will be there.
        is_stale: it was written to while it was being copied.
    """

    like: Tensor
    device: torch.device
    buffer: _Buffer
    region: Region
    storage: StorageWeakRef
    version: int
    leaving: tuple[Tensor, Tensor] | None
    ahead: tuple[Tensor, Event | None] | None = None
    is_stale: bool = False


class HostInputs:
    """Takes tensors to the host and gives them back: the two halves of ``saved_tensors_hooks``.

    On a CPU the host's memory is the device's, and tensors stay as they are.

    Args:
        copies_on_cpu: copy there all the same.

    Attributes:
        host_bytes: of tensors that are away now.
        peak_host_bytes: the most there was at once; buffers kept for the next step stay within it.
    """

    def __init__(self, copies_on_cpu: bool = False) -> None:
        self.copies_on_cpu = copies_on_cpu
        self.host_bytes = self.peak_host_bytes = 0
        self._free: list[_Buffer] = []
        self._region: weakref.ref[Region] | None = None
        self._num_regions = 0
        self._starts_region = True
        self._leaving: deque[tuple[int, HostCopy]] = deque()
        self._known: weakref.WeakValueDictionary[tuple[object, ...], HostCopy] = weakref.WeakValueDictionary()

    # to the host

    def begin_region(self) -> None:
        """What is packed from now on belongs together."""
        self._starts_region = True
        self._num_regions += 1
        while self._leaving and self._leaving[0][0] <= self._num_regions - REGIONS_LEAVING:
            _let_go(self._leaving.popleft()[1])

    def pack(self, x: Tensor) -> HostCopy | tuple[Tensor, int]:
        """``x`` on its way to the host, or itself with its version where it stays."""
        if not self._moves(x):
            return x, x._version
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype)
        known = self._known.get(key)
        if known is None:  # else several regions start from it: a mask, say
            known = self._known[key] = self._take(x, storage)
        return known

    def _moves(self, x: Tensor) -> bool:
        """Activations do. Parameters come and go by themselves; integers are small, and masks of them smaller."""
        if type(x) is not Tensor or not x.is_floating_point() or not x.numel() or (x.is_leaf and x.requires_grad):
            return False
        return x.layout is torch.strided and (x.device.type == "cuda" or self.copies_on_cpu)

    def _take(self, x: Tensor, storage: StorageWeakRef) -> HostCopy:
        x = x.detach()
        elems = x.as_strided((_extent(x),), (1,)) if _extent(x) <= x.numel() else x.contiguous().view(-1)
        buffer = self._buffer_for(elems)
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        copy = HostCopy(like, x.device, buffer, self._region_of_now(), storage, x._version, (x, elems))
        copy.region.copies.append(weakref.ref(copy))
        buffer.busy = _start_copy(elems, buffer.elems, "down", after=buffer.busy)
        self._leaving.append((self._num_regions, copy))
        weakref.finalize(copy, self._give_back, buffer)
        return copy

    def _region_of_now(self) -> Region:
        region = self._region() if self._region is not None else None
        if region is None or self._starts_region:
            region = Region(weakref.ref(region) if region is not None else None)
            self._region, self._starts_region = weakref.ref(region), False
        return region

    # back

    def unpack(self, packed: HostCopy | tuple[Tensor, int]) -> Tensor:
        """The tensor that ``pack`` was given, with its strides.

        Raises:
            RuntimeError: it was written to in place before its copy had been made.
        """
        if isinstance(packed, tuple):
            x, version = packed
            _check_version(x._version != version, x)
            return x
        x = self._arrive(packed)
        before = packed.region.previous() if packed.region.previous is not None else None
        for ref in before.copies if before is not None else ():
            copy = ref()
            if copy is not None and copy.leaving is None and copy.ahead is None:
                copy.ahead = _start_return(copy)
        return x

    def _arrive(self, copy: HostCopy) -> Tensor:
        if copy.leaving is not None:  # it has not left yet
            x, _ = copy.leaving
            self._leaving.remove(next(each for each in self._leaving if each[1] is copy))
            _let_go(copy)
            _check_version(copy.is_stale, x)
            return x
        _check_version(copy.is_stale, copy.like)
        elems, event = copy.ahead or _start_return(copy)
        copy.ahead = None
        if event is not None:
            torch.cuda.current_stream(copy.device).wait_event(event)
        shape, stride = copy.like.shape, copy.like.stride()
        if elems.numel() == _extent(copy.like):
            return elems.as_strided(shape, stride)
        return torch.empty_strided(shape, stride, dtype=elems.dtype, device=elems.device).copy_(elems.view(shape))

    # buffers

    def _buffer_for(self, elems: Tensor) -> _Buffer:
        """One of an earlier step, or a new one in the place of those that fit nothing any more."""
        self.host_bytes += elems.nbytes
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        for i, each in enumerate(self._free):
            if each.elems.numel() == elems.numel() and each.elems.dtype == elems.dtype:
                return self._free.pop(i)
        while self._free and self.host_bytes + sum(each.elems.nbytes for each in self._free) > self.peak_host_bytes:
            oldest = self._free.pop(0)
            if oldest.busy is not None:
                oldest.busy.synchronize()
        return _Buffer(host_empty(elems.numel(), elems.dtype, pin=elems.device.type == "cuda"))

    def _give_back(self, buffer: _Buffer) -> None:
        if buffer.busy is not None:  # a backward that ended early leaves a copy on its way to memory that goes now
            torch.cuda.current_stream().wait_event(buffer.busy)
        self.host_bytes -= buffer.elems.nbytes
        self._free.append(buffer)

    def clear(self) -> None:
        """Let go of what no backward will ask for, and of the buffers kept for the next step."""
        while self._leaving:
            _let_go(self._leaving.popleft()[1])
        for each in self._free:
            if each.busy is not None:
                each.busy.synchronize()
        self._free.clear()
        self.peak_host_bytes = self.host_bytes


def _extent(x: Tensor) -> int:
    """Elements of memory from the first of ``x`` to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


def _check_version(changed: bool, x: Tensor) -> None:
    if changed:
        raise RuntimeError(
            f"an input of a checkpointed region, of shape {tuple(x.shape)} and {x.dtype}, was written to in place after"
            " the region had been computed, and backward cannot compute it again: write to a clone"
        )


def _let_go(copy: HostCopy) -> None:
    """The device's memory may be used again by whatever the compute stream does from here on."""
    assert copy.leaving is not None, "what is let go of had been held"
    copy.is_stale = copy.leaving[0]._version != copy.version
    if copy.buffer.busy is not None:
        torch.cuda.current_stream(copy.device).wait_event(copy.buffer.busy)
    copy.leaving = None


def _start_return(copy: HostCopy) -> tuple[Tensor, Event | None]:
    elems = torch.empty(copy.buffer.elems.numel(), dtype=copy.like.dtype, device=copy.device)
    copy.buffer.busy = _start_copy(copy.buffer.elems, elems, "up", after=copy.buffer.busy)
    return elems, copy.buffer.busy


def _start_copy(source: Tensor, target: Tensor, way: str, after: Event | None) -> Event | None:
    """Copy on the stream of this way, after what the current stream has been given and after an event."""
    device = source.device if source.device.type == "cuda" else target.device
    if device.type != "cuda":
        target.copy_(source)
        return None
    stream = _streams.get((device, way)) or _streams.setdefault((device, way), torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    if after is not None:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    return event
