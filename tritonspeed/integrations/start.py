"""torch.distributed as scripts start it through ``deepspeed``: always a process group, which Accelerate sees too.

[Note: Accelerate on a CPU] Accelerate picks a backend for GPUs before it asks DeepSpeed to start the process group. On
a CPU that is None, it keeps it, and takes itself for a single process on every rank: data is not split, and its gathers
fail. Real DeepSpeed has the same fault. Telling its shared state which backend was started is the cure.
"""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from typing import Any

from tritonspeed import comm, engine


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start the default process group, with DeepSpeed's arguments; a no-op where it exists.

    Args:
        dist_backend: "nccl" or "gloo"; None chooses by the device.
        auto_mpi_discovery: accepted: ranks are told by a launcher's variables, and a process without them is alone.
        distributed_port: used where MASTER_PORT is not set.
        verbose: accepted.
        timeout: how long a collective may take.
        init_method, rank, world_size: as in ``torch.distributed.init_process_group``.
        dist_init_required: False starts nothing.
        config: accepted.
    """
    if dist_init_required is not False:
        comm.init_distributed(
            dist_backend, distributed_port, timeout, init_method, rank=rank, world_size=world_size, alone=True
        )
    _tell_accelerate()


@functools.wraps(engine.initialize)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """``tritonspeed.initialize``; where no launcher started this process, in a process group of its own."""
    if kwargs.get("dist_init_required") is not False:
        init_distributed(distributed_port=kwargs.get("distributed_port", 29500))
    return engine.initialize(*args, **kwargs)


def is_initialized() -> bool:
    """Whether a default process group exists."""
    return comm.is_initialized()


def get_local_rank() -> int:
    """This rank's number on its host."""
    return comm.local_rank()


def _tell_accelerate() -> None:
    """See [Note: Accelerate on a CPU]."""
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    if state is not None and comm.is_initialized() and state._shared_state.get("backend", "") is None:
        state._shared_state["backend"] = comm.backend_name()
