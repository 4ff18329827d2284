"""What is known before anything is updated: the global norm, and where a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.reduce import Reducer


def measure(
    buckets: Sequence[Bucket], mesh: Mesh, reducer: Reducer[Bucket], divisor: float
) -> tuple[float, str | None]:
    """(global norm of the averaged unscaled gradient, first parameter that is not finite or None). Collective.

    Args:
        buckets: the trainable ones, in departure order.
        reducer: what it still holds back is sent first, if any rank's holds something.
        divisor: makes the sum over ranks the gradient of the unscaled, averaged loss.
    """
    rows = _gather_facts(buckets, mesh, reducer)
    if any(row[-1] for row in rows):  # some rank got gradients after their bucket had left: all ranks send again
        reducer.flush()
        rows = _gather_facts(buckets, mesh, reducer)
    squares = [row[:-1] for row in rows]
    finite = all(math.isfinite(x) for row in squares for x in row)
    total = math.fsum(x for row in squares for x in row) if finite else math.inf
    norm = math.sqrt(total) / divisor
    return norm, None if math.isfinite(norm) else _first_not_finite(buckets, mesh, squares[mesh.rank])


def _gather_facts(buckets: Sequence[Bucket], mesh: Mesh, reducer: Reducer[Bucket]) -> list[list[float]]:
    """One row per rank: Σg² of its slice of every bucket, then how many of its buckets still hold gradients."""
    zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
    squares = [zero if (s := b.squares()) is None else s.to(mesh.device) for b in buckets]
    unsent = torch.full((), float(reducer.num_unsent), dtype=torch.float64, device=mesh.device)
    table = comm.exchange(mesh, torch.stack([*squares, unsent]))
    values = comm.read_scalars(mesh, table.flatten())  # the step's one host sync
    width = len(buckets) + 1
    return [values[i : i + width] for i in range(0, len(values), width)]


def _first_not_finite(buckets: Sequence[Bucket], mesh: Mesh, squares: list[float]) -> str:
    """The first parameter, in departure order, whose gradient is not finite on the rank that owns the place."""
    number, names = math.inf, [s.name for b in buckets for s in b.layout.spans]
    for bucket, square in zip(buckets, squares, strict=True):
        grad = bucket.own_grad()
        if grad is None or math.isfinite(square):
            continue
        for piece in bucket.layout.pieces(*bucket.own):
            if not grad[piece.in_interval : piece.in_interval + piece.numel].isfinite().all():
                number = min(number, names.index(piece.span.name))
    mine = torch.tensor([number], dtype=torch.float64, device=mesh.device)
    found = min(comm.read_scalars(mesh, comm.exchange(mesh, mine).flatten()))
    return names[int(found)] if math.isfinite(found) else "the sum of squares of all of them"
