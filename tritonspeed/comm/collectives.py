"""All-gather in place, reduce-scatter with an exact sum, and the small exchange of a step.

gloo's own all-gather copies twice and its reduce-scatter is an all-reduce underneath that adds in the wire's dtype.
Here both are one batch of point-to-point sends and receives straight into place, and the sum is taken locally in fp32,
in rank order: 64 MiB on 2 ranks took 37 ms against 146 (all-gather) and 35 against 212 (reduce-scatter) on two CPU
cores, and the fixed order is what makes every ZeRO stage give the same bits. NCCL keeps its own collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tritonspeed.comm.flight import first_difference
from tritonspeed.comm.mesh import Mesh
from tritonspeed.comm.shared import SharedWindows, Stream
from tritonspeed.comm.spans import Span

_TAGS = 1 << 20  # p2p tags are reused after this many operations, long after the first has ended

SUM_TILE_ELEMS = 128 * 1024  # 512 KiB of fp32 and the parts' tiles fit a core's second-level cache

# torch 2.13 renamed the single-tensor collectives and warns about the old names
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way. ``wait()`` returns when its result may be read and its inputs reused; twice is once."""

    __slots__ = ("_finish", "_mesh", "_span", "_works")

    def __init__(self, mesh: Mesh, works: list[dist.Work], finish: Callable[[], None] | None = None) -> None:
        self._mesh, self._works, self._finish = mesh, works, finish
        self._span: Span | None = None

    def observed(self, span: Span | None, *tensors: Tensor) -> Pending:
        """The same; ``span`` ends with it. ``tensors`` are what it reads and writes."""
        self._span = span
        if span is not None and self._mesh.backend == "nccl":
            self._mesh.spans.watch(span, self._works, *tensors)
        return self

    def wait(self) -> None:
        """Block (the host on gloo, the current stream on NCCL) until the result is there."""
        works, finish, self._works, self._finish = self._works, self._finish, [], None
        if not works and finish is None:
            return
        with self._mesh.flight.waiting():
            for work in works:
                if self._mesh.backend == "nccl":
                    work.wait()
                else:
                    work.wait(timedelta(seconds=self._mesh.timeout_s))
            if finish is not None:
                finish()
        if self._span is not None:
            self._span.close()


def _exchange_point_to_point(mesh: Mesh, sends: Sequence[Tensor], recvs: Sequence[Tensor]) -> list[dist.Work]:
    """Start sending ``sends[r]`` to, and receiving ``recvs[r]`` from, every other rank r. Receives go first."""
    tag = mesh.flight.seq % _TAGS
    works = []
    for rank in _others(mesh):
        if recvs[rank].numel():
            works.append(dist.irecv(recvs[rank], src=mesh.global_rank(rank), group=mesh.group, tag=tag))
    for rank in _others(mesh):
        if sends[rank].numel():
            works.append(dist.isend(sends[rank], dst=mesh.global_rank(rank), group=mesh.group, tag=tag))
    return [work for work in works if work is not None]  # None is for those outside the group, where nobody is


def all_gather_(mesh: Mesh, whole: Tensor, unit: str) -> Pending:
    """Fill ``whole`` on every rank from the slices the ranks own; this rank's slice is in place already.

    Args:
        whole: (world × S,), contiguous, any dtype; rank r owns ``whole[r·S:(r+1)·S]``.
        unit: the name under which the flight log and errors know this.
    """
    if mesh.world == 1:
        return Pending(mesh, [])
    mesh.flight.record("all-gather", unit, whole.numel())
    span = mesh.spans.collective("all-gather", unit, whole.nbytes)
    return _gather(mesh, whole).observed(span, whole)


def _gather(mesh: Mesh, whole: Tensor) -> Pending:
    slices = whole.view(mesh.world, -1)
    if (windows := mesh.windows()) is not None and (stream := windows.open(slices[0].nbytes, 1)) is not None:
        return _gather_shared(mesh, windows, stream, slices)
    if mesh.backend == "gloo":
        own = slices[mesh.rank]
        works = _exchange_point_to_point(mesh, [own] * mesh.world, list(slices.unbind()))
    else:
        works = [_all_gather_single(whole, slices[mesh.rank], group=mesh.group, async_op=True)]
    return Pending(mesh, works)


def reduce_scatter(mesh: Mesh, whole: Tensor, out: Tensor, accumulate: bool, unit: str) -> Pending:
    """Sum ``whole`` over the ranks in fp32, in rank order, and keep this rank's slice.

    Args:
        whole: (world × S,), contiguous, floating point: the wire's dtype. Not to be touched until the wait.
        out: (S,), fp32 (or fp64): receives the sum.
        accumulate: add to ``out`` rather than overwrite it.
        unit: the name under which the flight log and errors know this.

    Returns:
        The pending operation; the sum is taken inside its ``wait()``.
    """
    slices = whole.view(mesh.world, -1)
    own = slices[mesh.rank]
    if mesh.world == 1:
        return Pending(mesh, [], lambda: _sum_into(out, [own], accumulate))
    mesh.flight.record("reduce-scatter", unit, whole.numel())
    span = mesh.spans.collective("reduce-scatter", unit, whole.nbytes)
    return _reduce(mesh, slices, out, accumulate).observed(span, whole, out)


def _reduce(mesh: Mesh, slices: Tensor, out: Tensor, accumulate: bool) -> Pending:
    own = slices[mesh.rank]
    if (windows := mesh.windows()) is not None and (stream := windows.open(own.nbytes, mesh.world - 1)) is not None:
        return _reduce_shared(mesh, windows, stream, slices, out, accumulate)
    if mesh.backend == "gloo":
        received = slices.new_empty(mesh.world - 1, own.numel())
        parts = [own if r == mesh.rank else received[r - (r > mesh.rank)] for r in range(mesh.world)]
        works = _exchange_point_to_point(mesh, list(slices.unbind()), parts)
        return Pending(mesh, works, lambda: _sum_into(out, parts, accumulate))
    reduced = torch.empty_like(own)
    works = [_reduce_scatter_single(reduced, slices.view(-1), group=mesh.group, async_op=True)]
    return Pending(mesh, works, lambda: _sum_into(out, [reduced], accumulate))


def all_to_all(
    mesh: Mesh, sent: Tensor, sent_numels: Sequence[int], received: Tensor, received_numels: Sequence[int], unit: str
) -> Pending:
    """Send every rank a part of its own.

    Args:
        sent: (Σ sent_numels,), contiguous: the parts for rank 0, 1, ...; this rank's own is copied.
        received: (Σ received_numels,), contiguous: filled with the parts from rank 0, 1, ...
        unit: the name under which the flight log and errors know this.
    """
    parts, places = sent.split(list(sent_numels)), received.split(list(received_numels))
    places[mesh.rank].copy_(parts[mesh.rank])
    if mesh.world == 1:
        return Pending(mesh, [])
    mesh.flight.record("all-to-all", unit, 0)  # what a rank sends is its own affair: the history is to be the same
    span = mesh.spans.collective("all-to-all", unit, sent.nbytes)
    if mesh.backend == "gloo":
        return Pending(mesh, _exchange_point_to_point(mesh, parts, places)).observed(span)
    works = [
        dist.all_to_all_single(
            received, sent, list(received_numels), list(sent_numels), group=mesh.group, async_op=True
        )
    ]
    return Pending(mesh, [work for work in works if work is not None]).observed(span, sent, received)


def _gather_shared(mesh: Mesh, windows: SharedWindows, stream: Stream, slices: Tensor) -> Pending:
    raw = slices.view(torch.uint8)

    def read(index: int) -> None:
        lo, hi = stream.piece(index)
        for peer in _others(mesh):
            raw[peer][lo:hi].copy_(windows.peek(stream, index, peer, 0))

    return _run_stream(mesh, windows, stream, [raw[mesh.rank]], read)


def _reduce_shared(
    mesh: Mesh, windows: SharedWindows, stream: Stream, slices: Tensor, out: Tensor, accumulate: bool
) -> Pending:
    """Each rank posts its slices for the others, in rank order without its own, and adds what stands there for it."""
    rank, own = mesh.rank, slices[mesh.rank]
    raw = slices.view(torch.uint8)

    def read(index: int) -> None:
        lo, hi = (at // own.itemsize for at in stream.piece(index))
        parts = [
            own[lo:hi] if peer == rank else windows.peek(stream, index, peer, rank - (rank > peer)).view(own.dtype)
            for peer in range(mesh.world)
        ]
        _sum_into(out[lo:hi], parts, accumulate)

    return _run_stream(mesh, windows, stream, [raw[peer] for peer in range(mesh.world) if peer != rank], read)


def _run_stream(
    mesh: Mesh, windows: SharedWindows, stream: Stream, parts: list[Tensor], read: Callable[[int], None]
) -> Pending:
    """Post what fits at once; reading, and posting the rest, is what ``wait`` does."""
    for index in range(min(2, stream.num_pieces)):
        windows.post(stream, index, parts)

    def finish() -> None:
        for index in range(stream.num_pieces):
            read(index)
            windows.done(stream, index)
            if index + 2 < stream.num_pieces:
                windows.post(stream, index + 2, parts)

    return Pending(mesh, [], finish)


def _others(mesh: Mesh) -> list[int]:
    """The other ranks, each rank beginning with another one."""
    return [(mesh.rank + step) % mesh.world for step in range(1, mesh.world)]


def _sum_into(out: Tensor, parts: list[Tensor], accumulate: bool) -> None:
    """out (+)= Σ parts, added one after another in fp32 (or wider), so that the order of the ranks decides every bit.

    On a CPU tile by tile: the tile of ``out`` is still in cache when the next part is added to it.
    """
    tile = out.numel() if out.device.type != "cpu" else SUM_TILE_ELEMS
    for lo in range(0, out.numel(), max(tile, 1)):
        target, pieces = out[lo : lo + tile], [part[lo : lo + tile] for part in parts]
        if target.dtype.itemsize < 4 or (accumulate and len(pieces) > 1):
            # the ranks' sum first, then the accumulator: the order does not depend on what was accumulated before
            total = pieces[0].to(torch.promote_types(target.dtype, torch.float32), copy=True)
            for piece in pieces[1:]:
                total.add_(piece)
            if accumulate:
                total.add_(target)
            target.copy_(total)
        elif accumulate:
            target.add_(pieces[0])
        else:
            target.copy_(pieces[0])
            for piece in pieces[1:]:
                target.add_(piece)


def broadcast_(mesh: Mesh, tensor: Tensor, source: int, unit: str) -> None:
    """Overwrite ``tensor`` on every rank with rank ``source``'s; blocking."""
    if mesh.world == 1:
        return
    mesh.flight.record("broadcast", unit, tensor.numel())
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    payload = flat.view(torch.uint8) if flat.dtype.itemsize == 1 else flat  # gloo knows no fp8
    with mesh.spans.collective("broadcast", unit, tensor.nbytes) or nullcontext(), mesh.flight.waiting():
        dist.broadcast(payload, src=mesh.global_rank(source), group=mesh.group)
    if flat is not tensor:
        tensor.copy_(flat)


def broadcast_text(mesh: Mesh, text: str | None, source: int, unit: str) -> str:
    """Rank ``source``'s text, on every rank; the others pass None. Blocking.

    Raises:
        ValueError: rank ``source`` passes None.
    """
    if mesh.rank == source and text is None:
        raise ValueError(f"broadcast_text: rank {source} is the source of {unit!r} and has passed no text")
    raw = bytearray((text or "").encode()) if mesh.rank == source else bytearray()
    length = torch.tensor([len(raw)], dtype=torch.int64, device=mesh.device)
    broadcast_(mesh, length, source, unit)
    payload = torch.zeros(int(length.item()), dtype=torch.uint8, device=mesh.device)
    if raw:
        payload.copy_(torch.frombuffer(raw, dtype=torch.uint8))
    if payload.numel():
        broadcast_(mesh, payload, source, unit)
    return bytes(payload.tolist()).decode()


def gather_texts(mesh: Mesh, text: str, unit: str) -> list[str]:
    """Every rank's text, in rank order; blocking. For rare uses: as many broadcasts as there are ranks."""
    return [broadcast_text(mesh, text if mesh.rank == rank else None, rank, unit) for rank in range(mesh.world)]


def sum_(mesh: Mesh, tensor: Tensor, unit: str) -> None:
    """Add ``tensor`` over the ranks, in place, on every rank; blocking. For rare uses: it does not fix the order."""
    if mesh.world == 1:
        return
    mesh.flight.record("all-reduce", unit, tensor.numel())
    with mesh.spans.collective("all-reduce", unit, tensor.nbytes) or nullcontext(), mesh.flight.waiting():
        dist.all_reduce(tensor, group=mesh.group)


def exchange(mesh: Mesh, numbers: Tensor) -> Tensor:
    """Every rank's small vector, (world, n) in rank order; checks that the ranks have issued the same collectives.

    Args:
        numbers: (n,), float64, on the mesh's device.

    Raises:
        RuntimeError: the ranks' histories differ; names the first operation of each that does.
    """
    if mesh.world == 1:
        return numbers.unsqueeze(0)
    flight = mesh.flight
    halves = torch.tensor([flight.hash >> 32, flight.hash & 0xFFFFFFFF], dtype=numbers.dtype, device=numbers.device)
    mine = torch.cat([numbers, halves])
    table = mine.new_empty(mesh.world, mine.numel())
    with mesh.spans.collective("exchange", "", table.nbytes) or nullcontext(), flight.waiting():
        _all_gather_single(table.view(-1), mine, group=mesh.group)
    if not mesh.is_simulated and (table[:, -2:] != table[:1, -2:]).any():
        histories: list[str | None] = [None] * mesh.world
        dist.all_gather_object(histories, flight.history_json(), group=mesh.group)
        raise RuntimeError(
            "the ranks have not issued the same collectives: their models took different paths. First difference:\n"
            + first_difference([h or "[]" for h in histories])
            + "\nParameters that only some ranks use are fine; modules that only some ranks call belong into one unit:"
            " mark the module around them with ts.zero.set_z3_leaf_modules."
        )
    return table[:, :-2]


def read_scalars(mesh: Mesh, numbers: Tensor) -> list[float]:
    """The values on the host: the one host sync of a step. Under a fake process group there are none: zeros."""
    return [0.0] * numbers.numel() if mesh.is_simulated else numbers.tolist()
