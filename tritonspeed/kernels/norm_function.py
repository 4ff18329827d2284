"""LayerNorm and RMSNorm as one pair of operators and one autograd function; what their arguments must be."""

from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._autograd import once_differentiable
from tritonspeed.kernels._ops import register
from tritonspeed.kernels.norm_gradients import Wanted, launch_norm_backward
from tritonspeed.kernels.norm_rows import Norm, dropout_reference, launch_norm_forward, statistics_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, *norm: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, z, mean, rstd = launch_norm_forward(
        x.contiguous(), _contiguous(residual), _contiguous(weight), _contiguous(bias), seed, Norm(*norm)
    )
    return y, _or_empty(z, x), _or_empty(mean, x), rstd


def _forward_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, *norm: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    z = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    rstd = x.new_empty(_num_rows(x), dtype=statistics_dtype(x, residual))
    return y, z, torch.empty_like(rstd) if norm[0] else x.new_empty(0), rstd


def _backward(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, centred: bool, eps: float, offset: float, dropout_p: float, *wanted: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = launch_norm_backward(
        dy.contiguous(), _contiguous(dz), z.contiguous(), _contiguous(weight), _contiguous(bias), seed,
        mean if centred else None, rstd, Norm(centred, eps, offset, dropout_p), Wanted(*wanted),
    )  # fmt: skip
    dx, dresidual, dweight, dbias = (_or_empty(grad, z) for grad in grads)
    return dx, dresidual, dweight, dbias


def _backward_cpu(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, centred: bool, eps: float, offset: float, dropout_p: float, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``norm_gradients`` in PyTorch, for who calls the op itself: autograd on a CPU takes the reference."""
    wanted = Wanted(*options)
    g, x_hat = dy.to(rstd.dtype), z.to(rstd.dtype)
    if seed is not None and not wanted.has_residual:
        x_hat = dropout_reference(x_hat, dropout_p, seed)
    column = (*z.shape[:-1], 1)
    x_hat = (x_hat - mean.view(column)) * rstd.view(column) if centred else x_hat * rstd.view(column)
    h = g if weight is None else g * (weight.to(g.dtype) + offset)
    grad = h - x_hat * (h * x_hat).mean(-1, keepdim=True)
    grad = (grad - h.mean(-1, keepdim=True) if centred else grad) * rstd.view(column)
    if dz is not None:
        grad = grad + dz
    before = grad if seed is None else dropout_reference(grad, dropout_p, seed)
    sums = [part.flatten(0, -2).sum(0) for part in (g * x_hat, g)]
    dweight, dbias = (
        None if w is None or not wanted.parameters else total.to(w.dtype)
        for w, total in zip((weight, bias), sums, strict=True)
    )
    dx, dresidual = (
        None if dtype is None else part.to(dtype, copy=True)
        for dtype, part in ((wanted.dx, before), (wanted.dresidual, grad))
    )
    return _or_empty(dx, z), _or_empty(dresidual, z), _or_empty(dweight, z), _or_empty(dbias, z)


def _backward_shapes(
    dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, centred: bool, eps: float, offset: float, dropout_p: float,
    dx: torch.dtype | None, dresidual: torch.dtype | None, parameters: bool, has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [z.new_empty(0) if dtype is None else z.new_empty(z.shape, dtype=dtype) for dtype in (dx, dresidual)]
    columns = [z.new_empty(0) if w is None or not parameters else w.new_empty(w.shape) for w in (weight, bias)]
    return rows[0], rows[1], columns[0], columns[1]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()  # a gradient may be an expanded scalar: stride 0


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x  # an operator cannot return None


def _num_rows(x: Tensor) -> Any:
    return x.shape[:-1].numel() if x.shape[-1] != 0 else 0


register(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, bool centred, float eps,"
    " float offset, float dropout_p) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    _forward,
    _forward_shapes,
)
register(
    "norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? bias, Tensor? seed, Tensor mean,"
    " Tensor rstd, bool centred, float eps, float offset, float dropout_p, ScalarType? dx, ScalarType? dresidual,"
    " bool parameters, bool has_residual) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_shapes,
    _backward_cpu,
)


class _NormFunction(torch.autograd.Function):
    """y, or y and z with a residual, from x, residual, weight, bias, seed and a ``Norm``."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, norm):
        y, z, mean, rstd = torch.ops.tritonspeed.norm_forward(
            x, residual, weight, bias, seed, norm.centred, norm.eps, norm.offset, norm.dropout_p
        )
        ctx.norm, ctx.x_dtype, ctx.has_residual = norm, x.dtype, residual is not None
        ctx.save_for_backward(x if residual is None else z, weight, bias, seed, mean, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dz=None):
        z, weight, bias, seed, mean, rstd = ctx.saved_tensors
        norm, (needs_x, needs_residual, needs_weight, needs_bias, *_) = ctx.norm, ctx.needs_input_grad
        if dy is None:  # only z was used
            dy = torch.zeros_like(z, dtype=ctx.x_dtype)
        # without dropout x and residual have one gradient, written twice only where it is rounded to two types
        one_for_both = ctx.has_residual and seed is None and z.dtype == ctx.x_dtype
        wanted = Wanted(
            dx=ctx.x_dtype if needs_x and not one_for_both else None,
            dresidual=z.dtype if ctx.has_residual and (needs_residual or (one_for_both and needs_x)) else None,
            parameters=needs_weight or needs_bias,
            has_residual=ctx.has_residual,
        )
        dx, dresidual, dweight, dbias = torch.ops.tritonspeed.norm_backward(
            dy, dz, z, weight, bias, seed, mean, rstd, norm.centred, norm.eps, norm.offset, norm.dropout_p,
            wanted.dx, wanted.dresidual, wanted.parameters, wanted.has_residual,
        )  # fmt: skip
        return (
            (dresidual if one_for_both else dx) if needs_x else None,
            dresidual if needs_residual else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            None,
            None,
        )


def apply_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: Norm
) -> Any:
    """The kernels, differentiable once: y, and z with a residual."""
    return _NormFunction.apply(x, residual, weight, bias, seed, norm)


def mixed_reference(
    x: Tensor, residual: Tensor | None, dropout_p: float, seed: int | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What is normalised, in fp32 or fp64, and z = residual + dropout(x) in the residual's type."""
    mixed = x.to(statistics_dtype(x, residual))
    if dropout_p:
        mixed = dropout_reference(mixed, dropout_p, seed_tensor(seed, dropout_p, x))
    if residual is None:
        return mixed, None
    z = (residual.to(mixed.dtype) + mixed).to(residual.dtype)
    return z.to(mixed.dtype), z


def seed_tensor(seed: int | Tensor | None, dropout_p: float, x: Tensor) -> Any:
    """The seed where the kernel reads it, on x's device: nothing waits for the device, a CUDA graph may hold it.

    None draws from torch's generator of that device; torch.compile keeps the draw in its graph, so every call of the
    compiled function draws anew.
    """
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=x.device)


def check_norm(
    operation: str,
    x: Tensor,
    residual: Tensor | None,
    parameters: dict[str, Tensor | None],
    dropout_p: float,
    seed: int | Tensor | None,
) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: which argument, what it must be, and how to get there.
    """
    if not x.ndim:
        raise ValueError(f"{operation}: x has no axis to normalise over, its shape is (): pass (..., N)")
    given = {"x": x, "residual": residual, **parameters}
    wanted_shapes = {"residual": tuple(x.shape), **dict.fromkeys(parameters, tuple(x.shape[-1:]))}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype}, must be float32, bfloat16, float16 or float64: convert it with"
                f" {name}.to(...)"
            )
        if tensor.device != x.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, x on {x.device}: move one to the other")
        if name != "x" and tensor.shape != wanted_shapes[name]:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}, must be {wanted_shapes[name]}, because x has"
                f" {tuple(x.shape)}: " + ("expand it" if name == "residual" else "the norm is over x's last axis")
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{operation}: dropout_p is {dropout_p}, must be in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.shape != () or seed.dtype != torch.int64 or seed.device != x.device:
            raise ValueError(
                f"{operation}: seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}, must be one int64,"
                f" shape (), on {x.device}: pass an int, or torch.full((), seed, device=x.device)"
            )
    elif seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"{operation}: seed is {seed}, must be in [0, 2**63)")
