"""Softmax over rows of any length: scaled, masked, causal, forward and backward.

    t = scale · x + mask          a boolean mask keeps t where it is True and puts −∞ elsewhere
    y = exp(t − max t) / Σ exp(t − max t)                               per row
    dx = scale · y · (g − Σ y·g)          dmask = dx / scale, summed over the axes that mask was broadcast along

A row in which nothing is left (every t is −∞) gives zeros and takes no gradient; torch.softmax gives NaN there.
Causal: query i of Q sees the keys j ≤ i + (K − Q), so that the last query sees all of them; the rest is not read.

Shapes   x, y, g, dx: (..., N), M rows   mask: broadcastable to x
Types    fp32, fp16, bf16 or fp64, computed in fp32 (fp64); mask bool or any float
Bytes    forward  2·M·N·itemsize + the mask's once        backward  3·M·N·itemsize
Flops    forward  5·M·N, one of them an exponential        backward  4·M·N
Source   Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867
Roof     not measured yet                                               (device, date, % of HBM, shape)

A row that fits in registers is read once, several short ones by one program. A longer one is read twice, the second
time backwards: what was read last is still in the L2. ``softmax_rows`` says what a row's body and edge are.
"""

from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._autograd import once_differentiable
from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import (
    INTERPRETED,
    accumulator,
    card_of,
    check_device,
    launch,
    on_device_of,
    takes_reference,
    tl,
    triton,
)
from tritonspeed.kernels.rounding import as_scalar, load, store_rounded
from tritonspeed.kernels.softmax_rows import (
    SoftmaxLaunch,
    check_mask,
    edge_columns,
    exp,
    lowest,
    mask_layout,
    mask_row,
    span,
)
from tritonspeed.kernels.tuned import Tunable, dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def softmax_reference(x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What the kernels must equal, over the last axis; also what CPU tensors take."""
    t = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) * scale
    if mask is not None:
        t = t.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else t + mask.to(t.dtype)
    if causal:
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(x.shape[-1] - x.shape[-2] + 1)
        t = t.masked_fill(hidden, -torch.inf)
    nothing_left = (t == -torch.inf).all(-1, keepdim=True)
    y = torch.softmax(t.masked_fill(nothing_left, 0.0), -1).masked_fill(nothing_left, 0.0)
    return y.to(x.dtype)


@triton.jit
def _scores(x_ptr, mask_ptr, mask_start, column, reads, inside, scale, ACC: tl.constexpr, EVICT: tl.constexpr):
    """t where it is inside, else −∞; ``x_ptr`` are addresses, ``reads`` those that are read."""
    t = load(x_ptr, reads, ACC, EVICT) * scale
    if mask_ptr is not None:
        if mask_ptr.dtype.element_ty == tl.uint8:
            keep = tl.load(mask_ptr + mask_start + column, mask=reads, other=0)
            inside = inside & (keep != 0)
        else:
            t += load(mask_ptr + mask_start + column, reads, ACC, "evict_last")
    return tl.where(inside, t, float("-inf"))


@triton.jit(do_not_specialize=["N", "query_len", "size1", "size2", "step0", "step1", "step2", "M"])
def _softmax_rows_kernel(
    x_ptr, mask_ptr, y_ptr, N, query_len, size1, size2, step0, step1, step2, scale, M,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, ODD: tl.constexpr, CAUSAL: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    scale = as_scalar(scale, ACC)
    if not ODD:
        N = N // V * V  # the same number, with a divisor that the compiler sees
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: M·N may pass 2³¹
    exists = row < M
    body_start, head, body, visible = span(row, N, query_len, V, ODD, CAUSAL)  # [ROWS, 1]
    mask_start = row * 0
    if mask_ptr is not None:
        mask_start = mask_row(row, size1, size2, step0, step1, step2) * N

    lane = tl.arange(0, BLOCK)[None, :]
    writes = exists & (lane // V < body // V)  # whole groups: one bound for the lanes of an access
    reads = writes
    if CAUSAL:
        reads = writes & (lane // V < (visible - head + (V - 1)) // V)
    t = _scores(
        x_ptr + body_start + lane, mask_ptr, mask_start, head + lane, reads, reads & (head + lane < visible), scale,
        ACC, "evict_first",
    )  # fmt: skip
    top = tl.maximum(tl.max(t, axis=1, keep_dims=True), lowest([1, 1], ACC))
    column, edge, t_edge = None, None, None
    if ODD:
        column, edge = edge_columns(head, body, N, V, tl.arange(0, 2 * V)[None, :])
        edge = edge & exists
        seen = edge & (column < visible)
        t_edge = _scores(x_ptr + row * N + column, mask_ptr, mask_start, column, seen, seen, scale, ACC, "")
        top = tl.maximum(top, tl.max(t_edge, axis=1, keep_dims=True))
    y = exp(t - top)
    total = tl.sum(y, axis=1, keep_dims=True)
    if ODD:
        y_edge = exp(t_edge - top)
        total += tl.sum(y_edge, axis=1, keep_dims=True)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        store_rounded(y_ptr + row * N + column, y_edge * inverse, edge, INTERPRET)
    else:
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_rounded(y_ptr + body_start + lane, y * inverse, writes, INTERPRET)


@triton.jit(do_not_specialize=["N", "query_len", "size1", "size2", "step0", "step1", "step2"])
def _softmax_long_row_kernel(
    x_ptr, mask_ptr, y_ptr, N, query_len, size1, size2, step0, step1, step2, scale,
    BLOCK: tl.constexpr, V: tl.constexpr, ODD: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    scale = as_scalar(scale, ACC)
    if not ODD:
        N = N // V * V
    row = tl.program_id(0).to(tl.int64)
    body_start, head, body, visible = span(row, N, query_len, V, ODD, CAUSAL)
    mask_start = row * 0
    if mask_ptr is not None:
        mask_start = mask_row(row, size1, size2, step0, step1, step2) * N
    x_ptr += body_start
    y_ptr += body_start
    lanes = tl.arange(0, BLOCK)
    end = body
    if CAUSAL:
        end = tl.minimum(body, tl.maximum(visible - head + (V - 1), 0) // V * V)

    top = lowest([BLOCK], ACC)  # a maximum and a sum for each lane: nothing crosses threads in the loop
    total = tl.zeros([BLOCK], ACC)
    for at in range(0, end, BLOCK):
        lane = at + lanes
        reads = lane // V < end // V
        t = _scores(
            x_ptr + lane, mask_ptr, mask_start, head + lane, reads, reads & (head + lane < visible), scale, ACC,
            "evict_last",
        )  # fmt: skip
        above = t - top
        factor = exp(-tl.abs(above))  # of exp(top − new) and exp(t − new) one is 1, this is the other
        total = tl.where(above > 0, total * factor + 1.0, total + factor)
        top = tl.where(above > 0, t, top)
    row_top = tl.max(top, axis=0)
    column, edge, t_edge, y_edge = None, None, None, None
    if ODD:
        column, edge = edge_columns(head, body, N, V, tl.arange(0, 2 * V))
        seen = edge & (column < visible)
        t_edge = _scores(x_ptr + column - head, mask_ptr, mask_start, column, seen, seen, scale, ACC, "")
        row_top = tl.maximum(row_top, tl.max(t_edge, axis=0))
    row_total = tl.sum(total * exp(top - row_top), axis=0)
    if ODD:
        y_edge = exp(t_edge - row_top)
        row_total += tl.sum(y_edge, axis=0)
    inverse = 1.0 / tl.where(row_total == 0.0, 1.0, row_total)
    if ODD:
        store_rounded(y_ptr + column - head, y_edge * inverse, edge, INTERPRET)

    num_blocks = tl.cdiv(end, BLOCK)
    for i in range(num_blocks):  # backwards: the end of the row is what the cache still has
        lane = (num_blocks - 1 - i) * BLOCK + lanes
        reads = lane // V < end // V
        t = _scores(
            x_ptr + lane, mask_ptr, mask_start, head + lane, reads, reads & (head + lane < visible), scale, ACC,
            "evict_first",
        )  # fmt: skip
        store_rounded(y_ptr + lane, exp(t - row_top) * inverse, lane // V < body // V, INTERPRET)
    if CAUSAL:
        for at in range(num_blocks * BLOCK, body, BLOCK):
            store_rounded(y_ptr + at + lanes, tl.zeros([BLOCK], ACC), (at + lanes) // V < body // V, INTERPRET)


@triton.jit(do_not_specialize=["N", "query_len", "M"])
def _softmax_rows_backward_kernel(
    g_ptr, y_ptr, dx_ptr, N, query_len, scale, M,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, ODD: tl.constexpr, CAUSAL: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    scale = as_scalar(scale, ACC)
    if not ODD:
        N = N // V * V
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < M
    body_start, head, body, visible = span(row, N, query_len, V, ODD, CAUSAL)
    lane = tl.arange(0, BLOCK)[None, :]
    writes = exists & (lane // V < body // V)
    reads = writes
    if CAUSAL:
        reads = writes & (lane // V < (visible - head + (V - 1)) // V)  # y is 0 beyond, whatever g is
    y = load(y_ptr + body_start + lane, reads, ACC, "evict_first")
    g = load(g_ptr + body_start + lane, reads, ACC, "evict_first")
    dot = tl.sum(y * g, axis=1, keep_dims=True)
    if ODD:
        column, edge = edge_columns(head, body, N, V, tl.arange(0, 2 * V)[None, :])
        edge = edge & exists
        seen = edge & (column < visible)
        y_edge = load(y_ptr + row * N + column, seen, ACC, "")
        g_edge = load(g_ptr + row * N + column, seen, ACC, "")
        dot += tl.sum(y_edge * g_edge, axis=1, keep_dims=True)
        store_rounded(dx_ptr + row * N + column, y_edge * (g_edge - dot) * scale, edge, INTERPRET)
    store_rounded(dx_ptr + body_start + lane, y * (g - dot) * scale, writes, INTERPRET)


@triton.jit(do_not_specialize=["N", "query_len"])
def _softmax_long_row_backward_kernel(
    g_ptr, y_ptr, dx_ptr, N, query_len, scale,
    BLOCK: tl.constexpr, V: tl.constexpr, ODD: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    scale = as_scalar(scale, ACC)
    if not ODD:
        N = N // V * V
    row = tl.program_id(0).to(tl.int64)
    body_start, head, body, visible = span(row, N, query_len, V, ODD, CAUSAL)
    g_ptr += body_start
    y_ptr += body_start
    dx_ptr += body_start
    lanes = tl.arange(0, BLOCK)
    end = body
    if CAUSAL:
        end = tl.minimum(body, tl.maximum(visible - head + (V - 1), 0) // V * V)
    dots = tl.zeros([BLOCK], ACC)
    for at in range(0, end, BLOCK):
        reads = (at + lanes) // V < end // V
        dots += load(y_ptr + at + lanes, reads, ACC, "evict_last") * load(g_ptr + at + lanes, reads, ACC, "evict_last")
    dot = tl.sum(dots, axis=0)
    if ODD:
        column, edge = edge_columns(head, body, N, V, tl.arange(0, 2 * V))
        seen = edge & (column < visible)
        y_edge = load(y_ptr + column - head, seen, ACC, "")
        g_edge = load(g_ptr + column - head, seen, ACC, "")
        dot += tl.sum(y_edge * g_edge, axis=0)
        store_rounded(dx_ptr + column - head, y_edge * (g_edge - dot) * scale, edge, INTERPRET)
    num_blocks = tl.cdiv(end, BLOCK)
    for i in range(num_blocks):
        lane = (num_blocks - 1 - i) * BLOCK + lanes
        reads = lane // V < end // V
        y = load(y_ptr + lane, reads, ACC, "evict_first")
        g = load(g_ptr + lane, reads, ACC, "evict_first")
        store_rounded(dx_ptr + lane, y * (g - dot) * scale, lane // V < body // V, INTERPRET)
    if CAUSAL:
        for at in range(num_blocks * BLOCK, body, BLOCK):
            store_rounded(dx_ptr + at + lanes, tl.zeros([BLOCK], ACC), (at + lanes) // V < body // V, INTERPRET)


FORWARD_KERNELS = (_softmax_rows_kernel, _softmax_long_row_kernel)
BACKWARD_KERNELS = (_softmax_rows_backward_kernel, _softmax_long_row_backward_kernel)
SOFTMAX_FORWARD = Tunable(
    "softmax_forward", FORWARD_KERNELS, SoftmaxLaunch, SoftmaxLaunch.forward, SoftmaxLaunch.candidates
)
SOFTMAX_BACKWARD = Tunable(
    "softmax_backward", BACKWARD_KERNELS, SoftmaxLaunch, SoftmaxLaunch.backward, SoftmaxLaunch.candidates
)


def _launch_over_rows(
    kernels: tuple[Any, Any], how: SoftmaxLaunch, like: Tensor, causal: bool, *arguments: Any
) -> None:
    n, vector = like.shape[-1], 16 // like.element_size()
    num_rows = like.numel() // n
    constants = {
        "BLOCK": how.block, "V": vector, "ODD": n % vector != 0, "CAUSAL": causal, "ACC": accumulator(like.dtype),
        "INTERPRET": INTERPRETED, "num_warps": how.num_warps,
    }  # fmt: skip
    if n <= how.block:
        launch(kernels[0], (triton.cdiv(num_rows, how.rows),), *arguments, num_rows, ROWS=how.rows, **constants)
    else:
        launch(kernels[1], (num_rows,), *arguments, **constants)


def launch_softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The op on a GPU, and on a CPU under the interpreter."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        n, query_len = x.shape[-1], x.shape[-2] if causal else 1
        rows, layout = mask_layout(mask, x.shape)
        with on_device_of(x):
            how = SOFTMAX_FORWARD.resolve(card_of(x), n=n, dtype=dtype_name(x.dtype), masked=mask is not None)
            _launch_over_rows(FORWARD_KERNELS, how, x, causal, x, rows, y, n, query_len, *layout, scale)
    return y


def launch_softmax_backward(g: Tensor, y: Tensor, scale: float, causal: bool, widened: bool) -> Tensor:
    """The op on a GPU, and on a CPU under the interpreter; ``widened``: dx stays in fp32, for a mask's sums."""
    g, y = g.contiguous(), y.contiguous()  # g may be an expanded scalar: stride 0
    dx = _backward_shapes(g, y, scale, causal, widened)
    if y.numel():
        n, query_len = y.shape[-1], y.shape[-2] if causal else 1
        with on_device_of(y):
            how = SOFTMAX_BACKWARD.resolve(card_of(y), n=n, dtype=dtype_name(y.dtype))
            _launch_over_rows(BACKWARD_KERNELS, how, y, causal, g, y, dx, n, query_len, scale)
    return dx


def _forward_shapes(x: Tensor, _mask: Tensor | None, _scale: float, _causal: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_shapes(_g: Tensor, y: Tensor, _scale: float, _causal: bool, widened: bool) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32) if widened else y.dtype
    return torch.empty_like(y, dtype=dtype, memory_format=torch.contiguous_format)


def _forward_cpu(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return softmax_reference(x, scale=scale, mask=mask, causal=causal)


def _backward_cpu(g: Tensor, y: Tensor, scale: float, causal: bool, widened: bool) -> Tensor:
    like = _backward_shapes(g, y, scale, causal, widened)
    wide = torch.promote_types(y.dtype, torch.float32)
    product = g.to(wide) * y.to(wide)
    return like.copy_(torch.sub(product, y * product.sum(-1, keepdim=True)) * scale)


register(
    "softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor", launch_softmax, _forward_shapes, _forward_cpu
)
register(
    "softmax_backward(Tensor g, Tensor y, float scale, bool causal, bool widened) -> Tensor",
    launch_softmax_backward,
    _backward_shapes,
    _backward_cpu,
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, causal):
        y = torch.ops.tritonspeed.softmax(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale, ctx.causal, ctx.mask_like = scale, causal, None if mask is None else (mask.shape, mask.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return torch.ops.tritonspeed.softmax_backward(g, y, ctx.scale, ctx.causal, False), None, None, None
        dt = torch.ops.tritonspeed.softmax_backward(g, y, 1.0, ctx.causal, True)
        shape, dtype = ctx.mask_like
        dx = (dt * ctx.scale).to(y.dtype) if ctx.needs_input_grad[0] else None
        return dx, dt.sum_to_size(shape).to(dtype), None, None


def softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """exp(scale · x + mask), normalised along an axis; differentiable in ``x`` and in a float ``mask``.

    Args:
        x: any shape, float32, bfloat16, float16 or float64, any strides. An axis that is not the last costs a copy.
        dim: the axis that is normalised.
        scale: multiplied into x before the mask is added.
        mask: broadcastable to x. Boolean: True takes part, as in ``scaled_dot_product_attention`` (Megatron's means
            the contrary). Float: added; its gradient is summed over what it was broadcast along. (B, 1, 1, K),
            (B, 1, Q, K) and the like are read as they are, never written out.
        causal: query i of the last but one axis sees the keys j ≤ i + (K − Q); only with ``dim`` the last axis.

    Returns:
        x's shape and type. Rows without anything left are zeros, and so is their gradient.

    Raises:
        ValueError: types, shapes or devices that do not fit.
    """
    check_device("softmax", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"softmax: x is {x.dtype}, must be float32, bfloat16, float16 or float64: convert it")
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise ValueError(f"softmax: dim is {dim}, x has {x.ndim} axes: pass one of [-{x.ndim}, {x.ndim})")
    is_last = dim in (-1, x.ndim - 1)
    if causal and (x.ndim < 2 or not is_last):
        raise ValueError(
            f"softmax: causal wants queries and keys as the last two axes; x is {tuple(x.shape)} and dim is {dim}:"
            " transpose x, or pass a mask"
        )
    if mask is not None:
        check_mask(mask, x)
    if x.ndim == 0:
        return softmax(x[None], scale=scale, mask=mask)[0]
    if not is_last:
        x = x.movedim(dim, -1)
        if mask is not None:
            mask = mask[(None,) * (x.ndim - mask.ndim)].movedim(dim, -1)
    if x.dtype == torch.float64:
        x, scale = x * scale, 1.0  # a kernel takes its scalars in fp32
    if takes_reference(x):
        y = softmax_reference(x, scale=scale, mask=mask, causal=causal)
    else:
        y = _Softmax.apply(x, mask, scale, causal)
    return y if is_last else y.movedim(-1, dim)
