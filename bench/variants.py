"""The peers of each case: PyTorch eager and compiled for all, other packages where they are installed.

A peer is ``prepare(inputs) → call``: what need not be timed (a forward before its backward, a conversion of weights)
happens in ``prepare``. It imports its package there, so that a package that is missing is one absent variant.
"""

from collections.abc import Callable
from typing import Any

import torch

from bench.peers_kernels import Prepare, peers_of
from tritonspeed.tuning.case import Case, Inputs, backward_only


def variants_of(case: Case, device: torch.device) -> dict[str, Prepare]:
    """Name → how to prepare it, without ours."""
    found = {"torch eager": _eager(case)}
    if device.type == "cuda":  # on a CPU Inductor wants a C++ compiler and half a minute a case
        found["torch.compile"] = _compiled(case)
    return found | peers_of(case)


def _eager(case: Case) -> Prepare:
    def prepare(inputs: Inputs) -> Callable[[], Any]:
        return _prepared(case, inputs, case.reference, lambda function: function)

    return prepare


def _compiled(case: Case) -> Prepare:
    # no CUDA graphs: they would copy the inputs, which come from buffers in rotation
    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)

    whole = compile_it(case.reference)

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        return _prepared(case, inputs, whole, compile_it)

    return prepare


def _prepared(case: Case, inputs: Inputs, whole: Callable[..., Any], wrap: Callable[..., Any]) -> Callable[[], Any]:
    """The call to time: the whole reference, or only its backward where it is made of a forward and a backward."""
    if case.direction == "backward":
        with backward_only(wrap):
            backward: Any = case.reference(inputs)
        if callable(backward):
            return backward
    return lambda: whole(inputs)
