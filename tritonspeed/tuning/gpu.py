"""What else uses the GPU, and what a measurement must say of the machine it was taken on."""

import os
import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

from tritonspeed.kernels._triton import HAS_TRITON, triton
from tritonspeed.tuning.timing import device_name
from tritonspeed.version import __version__

QUERY_TIMEOUT_S = 20


def nvidia_smi(*query: str) -> list[list[str]] | None:
    """The rows that ``nvidia-smi`` answers with, without units; None where it is not there or fails."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def other_processes(uuid: str, own_pid: int, has_context: bool, rows: list[list[str]] | None) -> list[str]:
    """Process numbers of the others on this GPU, from the rows of a query of gpu_uuid, pid.

    In a container the numbers are the host's: where our own is missing though we hold a context, one of them is us.
    """
    here = [pid for gpu, pid in rows or [] if gpu.removeprefix("GPU-") == uuid.removeprefix("GPU-")]
    if str(own_pid) in here:
        return [pid for pid in here if pid != str(own_pid)]
    return here[1:] if has_context else here


def check_alone(device: torch.device) -> None:
    """Refuse to time beside somebody else's work: their kernels would choose our configurations.

    Raises:
        ValueError: another process computes on this GPU.
    """
    if torch.version.hip is not None:
        return  # AMD's tools do not say it in a form that is the same everywhere
    has_context = torch.cuda.is_initialized() and torch.cuda.memory_reserved(device) > 0
    rows = nvidia_smi("--query-compute-apps=gpu_uuid,pid")
    others = other_processes(str(torch.cuda.get_device_properties(device).uuid), os.getpid(), has_context, rows)
    if others:
        raise ValueError(
            f"{device} is used by {len(others)} other process{'es' if len(others) > 1 else ''} (pid"
            f" {', '.join(others)}), whose work would decide what looks fast: end them, or choose another GPU with"
            " CUDA_VISIBLE_DEVICES"
        )


def header(device: torch.device) -> dict[str, Any]:
    """Date, versions, driver and device: what every stored measurement begins with."""
    drivers = nvidia_smi("--query-gpu=driver_version") if device.type == "cuda" else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": drivers[0][0] if drivers else None,
        "tritonspeed": __version__,
        "torch": str(torch.__version__),
        "triton": str(triton.__version__) if HAS_TRITON else None,
    }
