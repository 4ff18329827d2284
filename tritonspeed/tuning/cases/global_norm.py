"""The sum of squares over the gradients of a block of the model."""

import torch

from tritonspeed.kernels.global_norm import sum_of_squares, sum_of_squares_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """One block's gradients as one flat buffer."""
    n = model.num_block_params

    def make(device: torch.device, seed: int) -> Inputs:
        return {"x": Draw(device, seed).normal((n,), dtype, 1e-3)}

    return [
        Case(
            "sum_of_squares", "forward", {"n": n}, dtype, num_bytes=n * dtype.itemsize, num_flops=2 * n, make=make,
            run=lambda inputs: sum_of_squares(inputs["x"]),
            reference=lambda inputs: sum_of_squares_reference([inputs["x"]]), num_summed=n,
        )
    ]  # fmt: skip
