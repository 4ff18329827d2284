"""Lion, Adagrad and AdamW with 8-bit moments over one flat chunk, as large as a block of the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels.adagrad import adagrad_, adagrad_reference
from tritonspeed.kernels.adamw_8bit import adamw_8bit_, adamw_8bit_reference
from tritonspeed.kernels.dynamic_code import num_blocks
from tritonspeed.kernels.lion import lion_, lion_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.cases.adamw import HYPER
from tritonspeed.tuning.shapes import ModelShapes

LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
ADAGRAD = {"step": 10, "lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """One block's parameters each: 20 n, 20 n and 16 n bytes with a 16-bit gradient and copy."""
    n = model.num_block_params

    def lion_states(draw: Draw) -> Inputs:
        return {"exp_avg": draw.normal((n,), torch.float32, 1e-3)}

    def adagrad_states(draw: Draw) -> Inputs:
        return {"sum_of_squares": draw.uniform((n,), torch.float32, 1e-7, 1e-5)}

    def adamw_8bit_states(draw: Draw) -> Inputs:
        blocks = (num_blocks(0, n),)
        return {
            "exp_avg_code": draw.integers(0, 256, (n,), torch.uint8),
            "exp_avg_scale": draw.uniform(blocks, torch.float32, 1e-4, 1e-3),
            "exp_avg_sq_code": draw.integers(0, 256, (n,), torch.uint8),
            "exp_avg_sq_scale": draw.uniform(blocks, torch.float32, 1e-7, 1e-6),
        }

    return [
        _case("lion_", (n, 8, 10), dtype, lion_states, lion_, lion_reference, LION),
        _case("adagrad_", (n, 8, 8), dtype, adagrad_states, adagrad_, adagrad_reference, ADAGRAD),
        _case("adamw_8bit_", (n, 4 + 1 / 16, 80), dtype, adamw_8bit_states, adamw_8bit_, adamw_8bit_reference, HYPER),
    ]


def _case(
    name: str,
    sizes: tuple[int, float, int],
    dtype: torch.dtype,
    states: Callable[[Draw], Inputs],
    step_: Callable[..., None],
    reference_: Callable[..., None],
    options: dict[str, Any],
) -> Case:
    """One optimizer. ``sizes``: elements, bytes read and written of the states for each, flops for each."""
    n, state_bytes, flops = sizes
    has_copy = dtype != torch.float32

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "master": draw.normal((n,), torch.float32, 0.02),
            **states(draw),
            "grad": draw.normal((n,), dtype, 1e-3),
            "param_out": draw.zeros((n,), dtype) if has_copy else None,
        }

    def call(function: Callable[..., None], inputs: Inputs) -> list[Tensor]:
        function(**inputs, **options)
        return [x for name, x in inputs.items() if name != "grad" and x is not None]

    return Case(
        name, "forward", {"n": n}, dtype, num_bytes=round(n * (8 + state_bytes + dtype.itemsize * (1 + has_copy))),
        num_flops=flops * n, make=make, run=lambda inputs: call(step_, inputs),
        reference=lambda inputs: call(reference_, inputs),
    )  # fmt: skip
