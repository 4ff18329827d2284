"""What stands around the quantised matmuls: checks of their arguments, rows and padding, the gradient of x."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels._autograd import once_differentiable
from tritonspeed.kernels._triton import check_device

WIDE_DTYPES = (torch.float16, torch.bfloat16)


def check_types(operation: str, **tensors: tuple[Tensor | None, tuple[torch.dtype, ...]]) -> None:
    """Each tensor has one of its types and is where x is; x comes first."""
    (x, _), *_others = tensors.values()
    assert x is not None, "the others are compared with x"
    check_device(operation, x)
    for name, (tensor, allowed) in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{operation}: {name} is {tensor.dtype}, must be {wanted}: convert it with {name}.to(...)")
        if tensor.device != x.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, x on {x.device}: move one to the other")


def check_shapes(
    operation: str, x: Tensor, n: int, k: int, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> None:
    """x (..., K) fits a weight of n rows and k elements, of which up to a group less one are padding."""
    if scales.dim() != 2 or scales.shape[1] != n or not scales.shape[0] or k % (32 * scales.shape[0]):
        raise ValueError(
            f"{operation}: scales {tuple(scales.shape)} must be (G, {n}) with groups {k} / G of a multiple of 32: pass"
            " codes and scales of one PackedWeight"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"{operation}: zeros {tuple(zeros.shape)} must have the shape of scales {tuple(scales.shape)}")
    padding = k - x.shape[-1] if x.dim() else -1
    allowed = k // scales.shape[0] if scales.shape[0] > 1 else 32
    if not 0 <= padding < allowed:
        raise ValueError(
            f"{operation}: x is {tuple(x.shape)}, the weight ({n}, {k}) with less than {allowed} elements of padding:"
            " x's last axis must be the weight's in_features"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{operation}: bias {tuple(bias.shape)} must be ({n},), one for each row of the weight")


def rows_of(x: Tensor, k: int) -> Tensor:
    """(..., K) → (M, k) contiguous, zeros where the weight is padded."""
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((x.shape[:-1].numel(), 0))
    return F.pad(flat, (0, k - flat.shape[1])) if flat.shape[1] < k else flat.contiguous()


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x · wᵀ + bias in w's type, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype))


class _Product(torch.autograd.Function):
    """y = op(x, weight, bias), with the gradients of x and bias; the weight is codes and has none."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Callable[..., Tensor],
        values: Callable[..., Tensor],
        x: Tensor,
        bias: Tensor | None,
        *weight: Any,
    ) -> Tensor:
        ctx.values, ctx.weight, ctx.dtypes = values, weight, (x.dtype, None if bias is None else bias.dtype)
        ctx.in_features = x.shape[-1]
        return product(x, *weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        dx = dbias = None
        if ctx.needs_input_grad[2]:
            w = ctx.values(*ctx.weight, ctx.dtypes[0])
            dx = (grad.reshape(-1, w.shape[0]) @ w).view(*grad.shape[:-1], w.shape[1])[..., : ctx.in_features]
        if ctx.needs_input_grad[3]:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return None, None, dx, dbias, *[None] * len(ctx.weight)


def product_of(
    product: Callable[..., Tensor],
    values: Callable[..., Tensor],
    x: Tensor,
    bias: Tensor | None,
    weight: Sequence[Tensor | None],
) -> Tensor:
    """Call an op, through autograd where a gradient is asked for.

    Args:
        product: (x, *weight, bias) → y.
        values: (*weight, dtype) → the weight as floats, (N, K).
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return _Product.apply(product, values, x, bias, *weight) if needs_grad else product(x, *weight, bias)
