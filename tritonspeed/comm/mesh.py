"""Who is here: the process group, this rank's place in it, and the device it computes on."""

from __future__ import annotations

import atexit
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from tritonspeed.comm.flight import FlightRecorder
from tritonspeed.comm.shared import SharedWindows, open_windows
from tritonspeed.comm.spans import Spans

DEFAULT_TIMEOUT_S = 600  # a rank that waits longer than this is stuck, not slow


@dataclass(frozen=True)
class Mesh:
    """One data-parallel axis: the ranks that share a model.

    ``group`` is None for a single process that never started torch.distributed; every collective is then a no-op.
    """

    rank: int
    world: int
    device: torch.device
    backend: str  # "gloo", "nccl", "fake", or "none" for a single process
    group: dist.ProcessGroup | None = None
    flight: FlightRecorder = field(default_factory=FlightRecorder, compare=False)
    spans: Spans = field(default_factory=Spans, compare=False, repr=False)  # what took how long
    timeout_s: float = DEFAULT_TIMEOUT_S  # how long to wait for another rank
    _windows: list[SharedWindows | None] = field(default_factory=list, compare=False, repr=False)

    def windows(self) -> SharedWindows | None:
        """The memory that CPU ranks of one host share; None elsewhere. The first call is collective."""
        if self.backend != "gloo" or self.device.type != "cpu":
            return None
        if not self._windows:
            self._windows.append(open_windows(self.rank, self.world, self.group, self.timeout_s))
        return self._windows[0]

    @property
    def is_simulated(self) -> bool:
        """True under a fake process group: shapes and bytes are real, values are not."""
        return self.backend == "fake"

    def global_rank(self, rank: int) -> int:
        """The rank that ``torch.distributed`` knows ``rank`` of this mesh by."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1 and not self.is_simulated:
            with self.spans.collective("barrier", "", 0) or nullcontext():
                dist.barrier(group=self.group)


def is_initialized() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def local_device() -> torch.device:
    """The accelerator of this rank (LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def local_rank() -> int:
    """This rank's number on its host, as the launcher says (LOCAL_RANK); 0 without one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def backend_name() -> str:
    """The default process group's backend: "gloo", "nccl"."""
    return str(dist.get_backend())


def tuned_folder() -> str | None:
    """The folder of tuned launch configurations that the environment names (TRITONSPEED_CONFIG_DIR)."""
    return os.environ.get("TRITONSPEED_CONFIG_DIR") or None


def init_distributed(
    dist_backend: str | None = None,
    distributed_port: int = 29500,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    alone: bool = False,
) -> None:
    """Start the default process group from the environment a launcher sets; a no-op where it exists.

    Without a launcher (no RANK in the environment) this process is alone, and no group is made unless ``alone``.

    Args:
        dist_backend: "nccl", "gloo"; None takes nccl on GPUs and gloo on CPUs.
        distributed_port: used where MASTER_PORT is not set.
        timeout: how long a collective may take before it fails; None means 600 s.
        init_method, rank, world_size: as ``torch.distributed.init_process_group``; read from the environment if left
            out.
        alone: without a launcher make a group of this one process, for programs that want to find one.
    """
    if is_initialized():
        return
    store = None
    if init_method is None and "RANK" not in os.environ:
        if not alone:
            return
        store, rank, world_size = dist.HashStore(), 0, 1
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(distributed_port))
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timeout or timedelta(seconds=DEFAULT_TIMEOUT_S)
    global _timeout_s
    _timeout_s = timeout.total_seconds()
    dist.init_process_group(
        backend=dist_backend or ("nccl" if device.type == "cuda" else "gloo"),
        init_method=init_method,
        store=store,
        timeout=timeout,
        rank=rank,
        world_size=world_size,
    )


_meshes: dict[int, Mesh] = {}
_timeout_s: float = DEFAULT_TIMEOUT_S  # of the default process group, where we started it


def mesh_of(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> Mesh:
    """The mesh over ``group`` (None: everyone). Engines over one group share it, and so one flight log.

    Args:
        group: a process group, or an object with ``get_data_parallel_group()`` (Megatron's ``mpu``).
        device: where tensors live; None takes this rank's accelerator.
    """
    if not is_initialized():
        return Mesh(rank=0, world=1, device=device or local_device(), backend="none")
    if hasattr(group, "get_data_parallel_group"):
        group = group.get_data_parallel_group()
    group = group or dist.group.WORLD
    mesh = _meshes.get(id(group))
    if mesh is None or mesh.group is not group or (device is not None and mesh.device != device):
        backend = str(dist.get_backend(group))
        if device is None:
            device = local_device() if "nccl" in backend else torch.device("cpu")
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        store = dist.distributed_c10d._get_default_store() if world > 1 and backend != "fake" else None
        mesh = Mesh(rank, world, device, backend, group, FlightRecorder(rank, world, store), timeout_s=_timeout_s)
        if not _meshes:
            # a process group that outlives the interpreter's last statement may abort the process: let go of it before
            atexit.register(_let_go)
        _meshes[id(group)] = mesh
    return mesh


def shutdown() -> None:
    """End the default process group, where there is one, and forget its meshes."""
    _let_go()
    if is_initialized():
        dist.destroy_process_group()


def _let_go() -> None:
    """Drop what we hold of the process groups: engines may still hold their meshes."""
    for mesh in _meshes.values():
        mesh.flight.close()
        object.__setattr__(mesh, "group", None)
    _meshes.clear()
