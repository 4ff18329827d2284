"""Each Triton kernel run on the GPU against its PyTorch reference: the proof behind `tritonspeed report`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tritonspeed.tuning import Case

_RELATIVE_TOLERANCE = 1e-5  # fp32, a handful of operations per element; times √K behind a sum of K terms
_MISMATCHED_CODES = 1e-3  # of quantised values: a tie that the last bit of a scale decides


@dataclass(frozen=True)
class KernelRun:
    """How a kernel did. Times in milliseconds; `difference` is relative, in norm, to the reference."""

    name: str
    passed: bool
    first_ms: float
    again_ms: float
    difference: float
    error: str


def run_kernels(device: str = "cuda") -> list[KernelRun]:
    """Run every kernel on `device`, on small odd shapes. One that raises is a row with its error, not an exception."""
    from tritonspeed.tuning import MODELS, all_cases  # these import Triton, which a machine without a GPU need not have

    families = all_cases([MODELS["tiny"]], torch.float32)
    return [check_case(case, torch.device(device)) for family in families.values() for case in family]


def check_case(case: Case, device: torch.device) -> KernelRun:
    """Run one case and its reference on inputs of the same seed."""
    from tritonspeed.tuning.case import tensors_of
    from tritonspeed.tuning.verify import distances

    try:
        wanted = tensors_of(case.reference(case.make(device, 0)))
        inputs = case.make(device, 0)
        first_ms, result = _timed(lambda: case.run(inputs), device.type)
        found = distances(tensors_of(result), wanted)
        again_ms, _ = _timed(lambda: case.run(inputs), device.type)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        return KernelRun(case.label, False, 0.0, 0.0, 0.0, f"{type(error).__name__}: {first_line}")
    if isinstance(found, str):
        return KernelRun(case.label, False, 0.0, 0.0, 0.0, found)
    allowed = _RELATIVE_TOLERANCE * case.num_summed**0.5
    passed, difference = True, 0.0
    for output, off in zip(tensors_of(result), found, strict=True):
        if output.is_floating_point():
            relative = off.norm / max(off.reference_norm, torch.finfo(torch.float32).tiny)
            passed = passed and relative <= allowed and not off.num_elsewhere
        else:
            relative = off.norm
            passed = passed and relative <= _MISMATCHED_CODES
        difference = max(difference, relative)
    return KernelRun(case.label, passed, first_ms, again_ms, difference, "")


def _timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Milliseconds until the result is there. Of one call, launch included: a bench says what the kernel can do."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), result
