"""How far a result may be from the exact one: from its type and the number of terms added up. The only such table.

A value rounded once is off by at most u = eps / 2 of its type. A sum of K terms wanders by about u_acc · √K, where
u_acc belongs to the type it is accumulated in. ``MARGIN`` roundings of each are allowed: operations chain a few.

    rtol = MARGIN · (u(dtype) + u(accumulator) · √K)          atol = rtol · magnitude
"""

import torch
from torch import Tensor

MARGIN = 4
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in _FLOATS}


def tolerance(
    dtype: torch.dtype, num_summed: int = 1, *, accumulator: torch.dtype | None = None, magnitude: float = 1.0
) -> dict[str, float]:
    """Keyword arguments for ``torch.testing.assert_close``.

    Args:
        dtype: what the result is stored in.
        num_summed: terms of the longest sum on its way, 1 for an elementwise result.
        accumulator: what that sum is kept in; default fp32, or fp64 for fp64.
        magnitude: size of the terms, for results that cancel to near zero.
    """
    accumulator = accumulator or (torch.float64 if dtype == torch.float64 else torch.float32)
    relative = MARGIN * (UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF[accumulator] * num_summed**0.5)
    return {"rtol": relative, "atol": relative * magnitude}


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64, 0 for two empty or two zero tensors."""
    difference = (got.double() - want.double()).norm().item()
    return difference / want.double().norm().item() if difference else 0.0
