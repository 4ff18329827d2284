"""Rotary: queries and keys of one sequence as a projection leaves them, turned there and back."""

import torch
from torch import Tensor

from tritonspeed.kernels.rotary import rotary
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Every number of tokens forward; the largest back, interleaved and in place as well."""
    most = max(model.tokens)
    return [
        *(_case(model, tokens, dtype) for tokens in model.tokens),
        _case(model, most, dtype, conjugate=True),
        _case(model, most, dtype, interleaved=True),
        _case(model, most, dtype, in_place=True),
    ]


def _plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(B, S, H, D) as models write it: x · cos + rotated x · sin with full tables."""
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        wide_cos, wide_sin = (table.repeat_interleave(2, -1) for table in (cos, sin))
    else:
        x1, x2 = x.chunk(2, -1)
        rotated = torch.cat((-x2, x1), -1)
        wide_cos, wide_sin = (torch.cat((table, table), -1) for table in (cos, sin))
    return (x * wide_cos.unsqueeze(-2) + rotated * wide_sin.unsqueeze(-2)).to(x.dtype)


def _case(
    model: ModelShapes, tokens: int, dtype: torch.dtype, *, conjugate: bool = False, interleaved: bool = False,
    in_place: bool = False,
) -> Case:  # fmt: skip
    heads, dim = model.heads + model.kv_heads, model.head_dim

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        angles = draw.uniform((tokens, dim // 2), torch.float32, -3.0, 3.0)
        q, k = (draw.normal((1, tokens, num, dim), dtype) for num in (model.heads, model.kv_heads))
        return {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin()}

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))
        if conjugate:
            return torch.ops.tritonspeed.rotary(q, k, cos, sin, 1, dim, interleaved, True)
        return rotary(q, k, cos, sin, interleaved=interleaved, in_place=in_place)

    def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))
        turning = -sin if conjugate else sin
        return _plain(q, cos, turning, interleaved), _plain(k, cos, turning, interleaved)

    return Case(
        "rotary", "backward" if conjugate else "forward", {"tokens": tokens, "heads": heads, "dim": dim}, dtype,
        variant="interleaved" if interleaved else "in place" if in_place else "",
        num_bytes=2 * tokens * heads * dim * dtype.itemsize + 4 * tokens * dim, num_flops=3 * tokens * heads * dim,
        make=make, run=run, reference=reference,
    )  # fmt: skip
