"""Each Triton kernel run on the GPU against its PyTorch reference: the proof behind `tritonspeed report`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Prepared = Callable[[], Tensor]
"""A kernel with its inputs in place: each call runs it and returns what it wrote."""

_NUM_ELEMS = 1_000_003  # odd, so that the masked tail runs too
_RELATIVE_TOLERANCE = 1e-5  # fp32, a handful of operations per element


@dataclass(frozen=True)
class KernelRun:
    """How a kernel did. Times in milliseconds; `difference` is the largest one relative to the reference's largest."""

    name: str
    passed: bool
    first_ms: float
    again_ms: float
    difference: float
    error: str


def run_kernels(device: str = "cuda") -> list[KernelRun]:
    """Run every kernel on `device`. A kernel that raises is a row with its error, not an exception."""
    kernels = (("adamw_", _prepare_adamw), ("sum_of_squares", _prepare_sum_of_squares))
    return [_check(name, prepare, device) for name, prepare in kernels]


def _prepare_adamw(device: str) -> Prepared:
    from tritonspeed.kernels import adamw_  # imports Triton, which a machine without a GPU need not have

    master, exp_avg, grad = (_numbers(seed).to(device) for seed in range(3))
    exp_avg_sq = _numbers(3).square().to(device)

    def call() -> Tensor:
        adamw_(master, exp_avg, exp_avg_sq, grad, step=2, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        return torch.stack((master, exp_avg, exp_avg_sq))

    return call


def _prepare_sum_of_squares(device: str) -> Prepared:
    from tritonspeed.kernels import sum_of_squares

    x = _numbers(4).to(device)
    return lambda: sum_of_squares(x)


def _numbers(seed: int) -> Tensor:
    return torch.randn(_NUM_ELEMS, generator=torch.Generator().manual_seed(seed))


def _check(name: str, prepare: Callable[[str], Prepared], device: str) -> KernelRun:
    try:
        expected = prepare("cpu")()  # CPU tensors take the reference
        call = prepare(device)
        first_ms, result = _timed(call, device)
        again_ms, _ = _timed(call, device)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        return KernelRun(name, False, 0.0, 0.0, 0.0, f"{type(error).__name__}: {first_line}")
    difference = ((result.cpu() - expected).abs().max() / expected.abs().max()).item()
    passed = difference <= _RELATIVE_TOLERANCE  # false for NaN
    return KernelRun(name, passed, first_ms, again_ms, difference, "")


def _timed(call: Prepared, device: str) -> tuple[float, Tensor]:
    """Milliseconds until the result is there. Of one call, launch included: a bench says what the kernel can do."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), result
