"""Whether Triton is here, which card a tensor is on, and the one door through which every kernel is launched.

Where Triton is not installed (macOS, Windows), the kernels stay importable and only their CPU forms run.
``INTERPRETED`` is read once: a kernel is interpreted or compiled from the moment it is defined, so a later change of
the flag could not move it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspeed.kernels.cards import INTERPRETER, Card, read_card

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
        tl = SimpleNamespace(constexpr=object, float32="fp32", float64="fp64")

INTERPRETED: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)
DEVICES = ("cpu", "cuda", "xpu")

__all__ = [
    "DEVICES",
    "HAS_TRITON",
    "INTERPRETED",
    "Launched",
    "accumulator",
    "card_of",
    "check_device",
    "launch",
    "on_device_of",
    "recording",
    "takes_reference",
    "tl",
    "triton",
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


def takes_reference(tensor: Tensor) -> bool:
    """A CPU tensor takes the reference, unless kernels are interpreted, or launches recorded."""
    return tensor.device.type == "cpu" and not INTERPRETED and _recorded is None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever the pointers say."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def accumulator(dtype: torch.dtype) -> Any:
    """The type a kernel computes in, as its ``ACC: tl.constexpr``: fp64 for fp64 (gradcheck), else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch that was recorded instead of carried out."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


_recorded: list[Launched] | None = None
_pretended: Card | None = None


@contextmanager
def recording(card: Card) -> Iterator[list[Launched]]:
    """Collect launches instead of carrying them out, chosen as if the tensors were on this card."""
    global _recorded, _pretended
    before = _recorded, _pretended
    _recorded, _pretended = [], card
    try:
        yield _recorded
    finally:
        _recorded, _pretended = before


def card_of(tensor: Tensor) -> Card:
    """The card a launch on this tensor's device is chosen for."""
    if _pretended is not None:
        return _pretended
    device = tensor.device
    if device.type == "cpu":
        return INTERPRETER
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return read_card(device.type, index)


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int,
    num_stages: int | None = None,
    fp_fusion: bool = False,
    **constants: Any,
) -> None:
    """Launch a kernel: the only place where it is done.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along one to three axes; nothing is launched where one of them is 0.
        arguments: in the kernel's order, its ``tl.constexpr`` ones in ``constants`` by name.
        num_stages: depth of the software pipeline, where a kernel has one.
        fp_fusion: contract a · b + c into one rounding. Off, a full tile and a masked one cannot differ.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if _recorded is not None:
        _recorded.append(Launched(kernel, tuple(grid), arguments, constants, options))
        return
    kernel[tuple(grid)](*arguments, **constants, **options)
