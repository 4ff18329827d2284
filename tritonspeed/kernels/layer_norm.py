"""LayerNorm: bring each row to mean 0 and variance 1, then scale and shift it; optionally dropout and residual before.

    z = residual + dropout(x)                  dropout: x · k / (1 − p), k = 0 or 1 by (seed, row, column)
    y = x̂ · w + b          x̂ = (z − mean(z)) · r          r = 1 / sqrt(mean((z − mean(z))²) + eps)          per row
    dz = g_z + r · (h − x̂ · mean(h · x̂) − mean(h))        h = g · w,  g and g_z the gradients of y and z
    dresidual = dz        dx = dz · k / (1 − p)        dw = Σ_rows g · x̂        db = Σ_rows g

Shapes   x, y, z, residual: (..., N), M rows; w, b: (N,); mean, r: (M,)
Types    x, residual, w, b: fp32, bf16, fp16 or fp64; y in x's type, z in the residual's; mean, r fp32 (fp64 for fp64)
Bytes    s = itemsize, to 16 Ki columns forward and backward (longer: ``norm_rows``, ``norm_gradients``), P programs:
         forward   2·M·N·s + 2·N·s + 8·M            with residual   4·M·N·s + 2·N·s + 8·M
         backward  3·M·N·s + 2·N·s + 8·M + 16·P·N   with residual   4·M·N·s (5 with dropout) + the same rest
         (8192, 4096) bf16: forward 134 MB, 40 µs at 3.35 TB/s; backward 201 MB + 17 MB of partial sums (P = 264), 65 µs
Flops    forward 8·M·N, backward 14·M·N; dropout 18 integer operations an element more
Source   Ba, Kiros & Hinton 2016, arXiv:1607.06450
Roof     not measured yet
"""

from typing import overload

import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels._triton import check_device, takes_reference
from tritonspeed.kernels.norm_function import apply_norm, check_norm, mixed_reference, seed_tensor
from tritonspeed.kernels.norm_rows import Norm


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maths above in PyTorch, with the kernels' dropout mask: what they must equal, and what CPU tensors take."""
    mixed, z = mixed_reference(x, residual, dropout_p, seed)
    w, b = (None if p is None else p.to(mixed.dtype) for p in (weight, bias))
    y = F.layer_norm(mixed, mixed.shape[-1:], w, b, eps).to(x.dtype)
    return y if z is None else (y, z)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Without a residual: y."""


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With a residual: y and z."""


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last axis, differentiable once in every tensor.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64, any strides.
        weight, bias: (N,), each optional and of any of these types.
        eps: added to the variance, under the root.
        residual: x's shape; added before the norm.
        dropout_p: share of x's elements set to 0, before the residual is added.
        seed: of the dropout mask, 0 ≤ seed < 2⁶³, or () int64 on x's device; None draws one from torch's generator of
            that device, in the graph of torch.compile anew in every call.

    Returns:
        y (..., N) in x's type; with a residual (y, z), z = residual + dropout(x) in the residual's type.

    Raises:
        ValueError: types, shapes or devices that do not fit, or dropout_p or seed out of range.
    """
    check_device("layer_norm", x)
    check_norm("layer_norm", x, residual, {"weight": weight, "bias": bias}, dropout_p, seed)
    if takes_reference(x):
        return layer_norm_reference(x, weight, bias, eps, residual=residual, dropout_p=dropout_p, seed=seed)
    norm = Norm(centred=True, eps=eps, offset=0.0, dropout_p=dropout_p)
    return apply_norm(x, residual, weight, bias, seed_tensor(seed, dropout_p, x), norm)
