"""Ranks and what they send each other: the only importer of ``torch.distributed``.

``mesh``         who is here: process groups, ranks, the device of this rank
``collectives``  all-gather in place, reduce-scatter with an exact fp32 sum, small exchanges
``flight``       what every rank has issued: a rolling hash, a log of the last operations, a watchdog
``spans``        what took how long on this rank, while somebody listens
"""

from tritonspeed.comm.collectives import (
    Pending,
    all_gather_,
    all_to_all,
    broadcast_,
    broadcast_text,
    exchange,
    gather_texts,
    read_scalars,
    reduce_scatter,
    sum_,
)
from tritonspeed.comm.mesh import (
    Mesh,
    backend_name,
    init_distributed,
    is_initialized,
    local_rank,
    mesh_of,
    shutdown,
    tuned_folder,
)
from tritonspeed.comm.spans import Span, Spans

__all__ = [
    "Mesh",
    "Pending",
    "Span",
    "Spans",
    "all_gather_",
    "all_to_all",
    "backend_name",
    "broadcast_",
    "broadcast_text",
    "exchange",
    "gather_texts",
    "init_distributed",
    "is_initialized",
    "local_rank",
    "mesh_of",
    "read_scalars",
    "reduce_scatter",
    "shutdown",
    "sum_",
    "tuned_folder",
]
