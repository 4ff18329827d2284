"""Whether Triton is here. Where it is not (macOS, Windows), the kernels stay importable and only their CPU forms run.

``INTERPRETED`` is read once: a kernel is interpreted or compiled from the moment it is defined, so a later change of
the flag could not move it.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    HAS_TRITON = True
    triton: Any = import_module("triton")  # a kernel takes numbers where its signature says tl.constexpr
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:

        def _leave_undefined(kernel=None, **options: object):
            return kernel if kernel is not None else _leave_undefined

        HAS_TRITON = False
        triton = SimpleNamespace(jit=_leave_undefined)
        tl = SimpleNamespace(constexpr=object)

INTERPRETED: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)
DEVICES = ("cpu", "cuda", "xpu")

__all__ = [
    "DEVICES",
    "HAS_TRITON",
    "INTERPRETED",
    "check_device",
    "launch_options",
    "on_device_of",
    "tl",
    "triton",
    "warp_size",
]


def check_device(operation: str, tensor: Tensor) -> None:
    """Refuse a device that has neither a kernel nor a CPU form.

    Raises:
        ValueError: the device is none of ``DEVICES``, or it is a GPU and Triton is not installed.
    """
    kind = tensor.device.type
    if kind not in DEVICES:
        raise ValueError(
            f"{operation}: the tensors are on {tensor.device}, kernels exist for {', '.join(DEVICES)}: move them"
        )
    if kind != "cpu" and not HAS_TRITON:
        raise ValueError(
            f"{operation}: the tensors are on {tensor.device} but Triton is not installed here:"
            " `pip install triton` (Linux), or move them to the CPU"
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever the pointers say."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def launch_options(num_warps: int) -> dict[str, Any]:
    """Options of every launch: no contraction into multiply-adds, which could tell a full tile from a masked one."""
    return {"num_warps": num_warps, "enable_fp_fusion": False}


def warp_size() -> int:
    """Threads that march together on the current device: 32, or 64 on AMD's CDNA."""
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
