"""What every rank does for itself, done together: a failure of one is a failure of all, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tritonspeed import comm
from tritonspeed.checkpoint import errors
from tritonspeed.comm import Mesh

T = TypeVar("T")


def together(mesh: Mesh, work: Callable[[], T]) -> T:
    """``work()`` on every rank. Collective; ``work`` itself talks to nobody.

    Raises:
        CheckpointError: on every rank, of the kind that the first rank met that failed; where another one failed, its
            number is named. What is no CheckpointError is raised as it is on the rank that met it.
    """
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = work()
    except Exception as error:  # the others are told before it is raised
        failure = error
    failed = torch.full((1,), float(failure is not None), dtype=torch.float64, device=mesh.device)
    comm.sum_(mesh, failed, "checkpoint: agree")
    if not comm.read_scalars(mesh, failed)[0]:
        return result  # type: ignore[return-value]
    said = comm.gather_texts(mesh, _described(failure), "checkpoint: failures")
    if failure is not None and not isinstance(failure, errors.CheckpointError):
        raise failure
    rank = next(i for i, text in enumerate(said) if text)
    kind, _, text = said[rank].partition("\n")
    made = getattr(errors, kind, errors.CheckpointError)
    raise made(text if rank == mesh.rank else f"rank {rank}: {text}") from failure


def _described(failure: BaseException | None) -> str:
    if failure is None:
        return ""
    if isinstance(failure, errors.CheckpointError):
        return f"{type(failure).__name__}\n{failure}"
    return f"CheckpointError\n{type(failure).__name__}: {failure}"


def same_text(mesh: Mesh, text: str, unit: str) -> tuple[str, bool]:
    """(rank 0's text, whether every rank has the same). Collective."""
    first = comm.broadcast_text(mesh, text if mesh.rank == 0 else None, 0, unit)
    differs = torch.full((1,), float(first != text), dtype=torch.float64, device=mesh.device)
    comm.sum_(mesh, differs, unit)
    return first, not comm.read_scalars(mesh, differs)[0]
