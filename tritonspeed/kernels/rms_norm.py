"""RMSNorm: scale each row to unit root mean square, then by a learned weight; optionally dropout and residual before.

    z = residual + dropout(x)                  dropout: x · k / (1 − p), k = 0 or 1 by (seed, row, column)
    y = x̂ · (o + w)        x̂ = z · r        r = 1 / sqrt(mean(z²) + eps)                                     per row
    dz = g_z + r · (h − x̂ · mean(h · x̂))    h = g · (o + w),  g and g_z the gradients of y and z
    dresidual = dz        dx = dz · k / (1 − p)        dw = Σ_rows g · x̂

The offset o is 1 for weights kept around zero, as Gemma's are.

Shapes   x, y, z, residual: (..., N), M rows; w: (N,); r: (M,)
Types    x, residual, w each fp32, bf16, fp16 or fp64; y in x's type, z in the residual's; r fp32 (fp64 for fp64)
Bytes    s = itemsize, to 16 Ki columns forward and backward (longer: ``norm_rows``, ``norm_gradients``), P programs:
         forward   2·M·N·s + N·s + 4·M            with residual   4·M·N·s + N·s + 4·M
         backward  3·M·N·s + N·s + 4·M + 8·P·N    with residual   4·M·N·s (5 with dropout) + the same rest
         (8192, 4096) bf16: forward 134 MB, 40 µs at 3.35 TB/s; backward 201 MB + 9 MB of partial sums (P = 264), 63 µs
Flops    forward 5·M·N, backward 10·M·N; dropout 18 integer operations an element more
Source   Zhang & Sennrich 2019, arXiv:1910.07467
Roof     not measured yet
"""

from typing import overload

import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels._triton import check_device, takes_reference
from tritonspeed.kernels.norm_function import apply_norm, check_norm, mixed_reference, seed_tensor
from tritonspeed.kernels.norm_rows import Norm


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maths above in PyTorch, with the kernels' dropout mask: what they must equal, and what CPU tensors take."""
    mixed, z = mixed_reference(x, residual, dropout_p, seed)
    y = F.rms_norm(mixed, mixed.shape[-1:], eps=eps)
    if weight is not None:
        y = y * (weight.to(mixed.dtype) + offset)
    y = y.to(x.dtype)
    return y if z is None else (y, z)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
    residual: None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Without a residual: y."""


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
    residual: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With a residual: y and z."""


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last axis, differentiable once in every tensor.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64, any strides.
        weight: (N,), optional, of any of these types.
        eps: added to the mean square, under the root.
        residual: x's shape; added before the norm.
        dropout_p: share of x's elements set to 0, before the residual is added.
        seed: of the dropout mask, 0 ≤ seed < 2⁶³, or () int64 on x's device; None draws one from torch's generator of
            that device, in the graph of torch.compile anew in every call.
        offset: added to the weight: 1 for weights kept around zero.

    Returns:
        y (..., N) in x's type; with a residual (y, z), z = residual + dropout(x) in the residual's type.

    Raises:
        ValueError: types, shapes or devices that do not fit, or dropout_p or seed out of range.
    """
    check_device("rms_norm", x)
    check_norm("rms_norm", x, residual, {"weight": weight}, dropout_p, seed)
    if takes_reference(x):
        return rms_norm_reference(
            x, weight, eps, residual=residual, dropout_p=dropout_p, seed=seed, offset=offset
        )  # fmt: skip
    norm = Norm(centred=False, eps=eps, offset=offset, dropout_p=dropout_p)
    return apply_norm(x, residual, weight, None, seed_tensor(seed, dropout_p, x), norm)
