"""Which tensors an optimizer keeps for each parameter: what a checkpoint must have for it.

Ours say so. Of any other a copy with the same settings steps one element, and what it then has is what it keeps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tritonspeed.optim.elementwise import ElementwiseOptimizer
from tritonspeed.zero import ZeroOptimizer
from tritonspeed.zero.bucket import Bucket


def kept_kinds(stepper: ZeroOptimizer, bucket: Bucket) -> dict[str, set[str]]:
    """Parameter → names of the optimizer's tensors of it, as far as it is this rank's; empty sets where there are none.

    An optimizer that cannot be copied is taken to keep what it keeps now: nothing before its first step.
    """
    inner = stepper.inner
    found: dict[str, set[str]] = {}
    for chunk in stepper.chunks_of(bucket):
        settings = stepper.settings_of(chunk)
        if isinstance(inner, ElementwiseOptimizer):
            names = inner.kinds(settings, chunk.end - chunk.start)
        else:
            names = _tried(inner, settings)
        for piece in chunk.pieces():
            found[piece.span.name] = names
    return found


def _tried(inner: torch.optim.Optimizer, settings: dict[str, Any]) -> set[str]:
    """What a copy of the optimizer keeps for one element that it has stepped."""
    one = torch.nn.Parameter(torch.ones(1))
    trial = type(inner).__new__(type(inner))
    with torch.enable_grad():
        torch.optim.Optimizer.__init__(trial, [one], {})
    trial.__setstate__({"defaults": copy.deepcopy(inner.defaults), "state": trial.state, "param_groups": []})
    trial.param_groups.append({**{k: copy.deepcopy(v) for k, v in settings.items() if k != "params"}, "params": [one]})
    one.grad = torch.ones(1)
    trial.step()
    return {name for name, value in trial.state[one].items() if isinstance(value, torch.Tensor) and value.ndim}
