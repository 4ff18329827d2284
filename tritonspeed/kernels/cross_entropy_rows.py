"""A row of logits, read and written in 16-byte vectors wherever it starts: what the cross-entropy kernels are made of.

A row of 50257 bf16 elements starts anywhere between two 16-byte boundaries, and an access that may straddle one is
scalar. So a row is cut at the boundaries, VEC elements apart:

    phase     first                                     end
    ··xxxxxx  xxxxxxxx  xxxxxxxx  ...  xxxxxxxx  xxxxxxxx  xxx·····
    edge      whole vectors, one thread each                edge

Whole vectors are taken in tiles [VECTORS, VEC], the last of them masked by whole vectors; the two edges together are
one tile of 2 · VEC elements. A sum over a row runs along the vectors first, which is within a thread, and crosses
threads once, at the row's end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonspeed.kernels._triton import accumulator, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.rounding import load, store, store_rounded

VECTOR_BYTES = 16
REDUCE_ROWS = 4096  # losses a step of the one program that adds them up: 8192 rows are two steps
SPREAD = 1.25  # a gradient keeps its logits' strides while that costs at most a quarter more memory


class CrossEntropyOptions(NamedTuple):
    """What shapes the loss of a row, in the operators' order; softcap 0 is none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


class Rows(NamedTuple):
    """Row r of a tensor starts (r // rows_per_batch) · batch_stride + (r % rows_per_batch) · row_stride elements in."""

    rows_per_batch: int
    batch_stride: int
    row_stride: int

    @classmethod
    def of(cls, x: Tensor) -> "Rows | None":
        """None where the rows are no runs of memory, overlap, or lie apart in more than two strides."""
        n = x.shape[-1]
        if x.is_contiguous():
            return cls(max(x.numel() // n, 1), 0, n)
        axes: list[tuple[int, int]] = []  # (size, stride), inner axes last, joined where they are one run
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if axes and axes[-1][1] == size * stride:
                axes[-1] = (axes[-1][0] * size, stride)
            elif size != 1:
                axes.append((size, stride))
        if x.stride(-1) != 1 or len(axes) > 2:
            return None
        (outer, batch_stride), (inner, row_stride) = [(1, 0), (1, n), *axes][-2:]
        if row_stride < n or (outer > 1 and batch_stride < (inner - 1) * row_stride + n):
            return None
        return cls(inner, batch_stride if outer > 1 else 0, row_stride)


def readable(logits: Tensor) -> tuple[Tensor, Rows]:
    """The logits, copied only if their rows cannot be read in place."""
    rows = Rows.of(logits)
    if rows is None:
        logits = logits.contiguous()
        rows = Rows.of(logits)
    assert rows is not None, "contiguous rows are runs of memory"
    return logits, rows


def empty_gradient(logits: Tensor) -> Tensor:
    """Strides of the logits where that is no waste, so that both are aligned in the same places; else contiguous."""
    if not logits.is_contiguous() and Rows.of(logits) is not None:
        span = sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True)) + 1
        if span <= SPREAD * logits.numel():
            return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def lead_of(x: Tensor) -> int:
    """Elements between the 16-byte boundary below and the first element."""
    return x.data_ptr() % VECTOR_BYTES // x.element_size()


@triton.jit
def find_row(ptr, row, rows_per_batch, batch_stride, row_stride, lead, VEC: tl.constexpr):
    """The vector boundary at or below the row's first element, and the elements between the two."""
    start = (
        (row // rows_per_batch).to(tl.int64) * batch_stride + (row % rows_per_batch).to(tl.int64) * row_stride + lead
    )
    return tl.multiple_of(ptr - lead, 16) + start // VEC * VEC, (start % VEC).to(tl.int32)


@triton.jit
def _vectors(phase, V, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The whole vectors of a row, [first, end)."""
    if ALIGNED:
        first, end = 0, V // VEC
    else:
        first, end = (phase + VEC - 1) // VEC, (phase + V) // VEC
    return first, end


@triton.jit
def _edges(phase, first, end, V, VEC: tl.constexpr):
    """Where the elements outside whole vectors are: offsets from the boundary, and which of them there are."""
    lane = tl.arange(0, 2 * VEC)
    # the tail's lanes follow the whole vectors; a row inside one vector is all head (end < first)
    at = tl.where(lane < VEC, lane, end * VEC + lane - VEC)
    begin, stop = phase, tl.minimum(phase + V, first * VEC)
    tail_begin = tl.where(end < first, phase + V, end * VEC)
    there = tl.where(lane < VEC, (at >= begin) & (at < stop), (at >= tail_begin) & (at < phase + V))
    return at, there


@triton.jit
def cap(x, softcap, CAPPED: tl.constexpr):
    """cap · tanh(x / cap), or x."""
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(2.0 * (x / softcap)) - 1.0)
    return x


@triton.jit
def _add_up(top, total, x):
    """Online log-sum-exp of [VECTORS, VEC] into [VECTORS]: a vector is one thread's, so nothing crosses threads."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@triton.jit
def _row_statistics(
    x_row, phase, V, pivot, softcap,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    ACC: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """max x, log Σ exp(x − max x) and, if SMOOTHED, Σ (x − pivot) of a row: apart, so no common offset rounds them."""
    first, end = _vectors(phase, V, VEC, ALIGNED)
    vector = tl.arange(0, VECTORS)
    tile = vector[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full([VECTORS], float("-inf"), ACC)
    total = tl.zeros([VECTORS], ACC)
    sums = tl.zeros([VECTORS], ACC)
    full_end = first + (end - first) // VECTORS * VECTORS
    for v in range(first, full_end, VECTORS):
        x = cap(load(x_row + v * VEC + tile, None, ACC, EVICT), softcap, CAPPED)
        top, total = _add_up(top, total, x)
        if SMOOTHED:
            sums += tl.sum(x - pivot, axis=1)
    inside = (full_end + vector < end)[:, None] & (tile >= 0)  # whole vectors at a time: 16-byte loads
    x = cap(load(x_row + full_end * VEC + tile, inside, ACC, EVICT), softcap, CAPPED)
    top, total = _add_up(top, total, tl.where(inside, x, float("-inf")))
    if SMOOTHED:
        sums += tl.sum(tl.where(inside, x - pivot, 0.0), axis=1)
    sum_x = tl.sum(sums, axis=0)
    row_top = tl.max(top, axis=0)
    if not ALIGNED:
        at, there = _edges(phase, first, end, V, VEC)
        x = cap(load(x_row + at, there, ACC, EVICT), softcap, CAPPED)
        if SMOOTHED:
            sum_x += tl.sum(tl.where(there, x - pivot, 0.0), axis=0)
        x = tl.where(there, x, float("-inf"))
        row_top = tl.maximum(row_top, tl.max(x, axis=0))
    shift = tl.where(row_top == float("-inf"), 0.0, row_top)
    row_total = tl.sum(total * tl.exp(top - shift), axis=0)
    if not ALIGNED:
        row_total += tl.sum(tl.exp(x - shift), axis=0)
    return shift, tl.log(row_total), sum_x


@triton.jit
def row_loss(
    x_row, phase, V, y, smoothing, z_loss, softcap,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    ACC: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The loss, NaN where the target is no class; max x; log Σ exp(x − max x)."""
    is_class = (y >= 0) & (y < V)
    # read before the sums, whose barriers part it from a gradient that is written over it
    x_y = cap(load(x_row + phase + y, is_class, ACC, ""), softcap, CAPPED)
    pivot = tl.where(tl.abs(x_y) < float("inf"), x_y, 0.0)
    top, log_total, rest = _row_statistics(
        x_row, phase, V, pivot, softcap, VEC, VECTORS, ALIGNED, SMOOTHED, CAPPED, ACC, EVICT
    )
    loss = log_total + (top - x_y)
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (log_total + (top - pivot) - rest / V)
    lse = top + log_total
    return tl.where(is_class, loss + z_loss * lse * lse, float("nan")), top, log_total


@triton.jit
def _gradient(x, column, y, top, log_total, g, g_z, of_target, of_all, softcap, CAPPED: tl.constexpr):
    capped = cap(x, softcap, CAPPED)
    p = tl.exp((capped - top) - log_total)
    dx = p - of_all
    dx = tl.where(column == y, dx - of_target, dx) * g + p * g_z
    if CAPPED:
        share = capped / softcap
        dx = dx * (1.0 - share * share)
    return dx


@triton.jit
def write_row_gradient(
    x_row, out_row, phase, V, y, is_ignored, g, top, log_total, smoothing, z_loss, softcap,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, CAPPED: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Zeros where ignored, NaN where the target is no class."""
    first, end = _vectors(phase, V, VEC, ALIGNED)
    vector = tl.arange(0, VECTORS)
    tile = vector[:, None] * VEC + tl.arange(0, VEC)[None, :]
    full_end = first + (end - first) // VECTORS * VECTORS
    inside = (full_end + vector < end)[:, None] & (tile >= 0)
    at, there = _edges(phase, first, end, V, VEC)
    if is_ignored:
        zeros = tl.zeros([VECTORS, VEC], out_row.dtype.element_ty)
        for v in range(first, full_end, VECTORS):
            store(out_row + v * VEC + tile, zeros, None)
        store(out_row + full_end * VEC + tile, zeros, inside)
        if not ALIGNED:
            store(out_row + at, tl.zeros([2 * VEC], out_row.dtype.element_ty), there)
    else:
        g = tl.where((y >= 0) & (y < V), g, float("nan"))
        g_z, of_target, of_all = g * (2.0 * z_loss * (top + log_total)), 1.0 - smoothing, smoothing / V
        y_at = y.to(tl.int32) + phase
        for v in range(first, full_end, VECTORS):
            x = load(x_row + v * VEC + tile, None, ACC, "evict_first")
            dx = _gradient(x, v * VEC + tile, y_at, top, log_total, g, g_z, of_target, of_all, softcap, CAPPED)
            store_rounded(out_row + v * VEC + tile, dx, None, INTERPRET)
        x = load(x_row + full_end * VEC + tile, inside, ACC, "evict_first")
        dx = _gradient(x, full_end * VEC + tile, y_at, top, log_total, g, g_z, of_target, of_all, softcap, CAPPED)
        store_rounded(out_row + full_end * VEC + tile, dx, inside, INTERPRET)
        if not ALIGNED:
            x = load(x_row + at, there, ACC, "evict_first")
            dx = _gradient(x, at, y_at, top, log_total, g, g_z, of_target, of_all, softcap, CAPPED)
            store_rounded(out_row + at, dx, there, INTERPRET)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _reduce_kernel(loss_ptr, target_ptr, total_ptr, scale_ptr, M, ignore_index, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Σ loss, and for "mean" (where scale_ptr is given) its quotient and 1 / count: one program, so two runs agree."""
    rows = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], ACC)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, M, BLOCK):
        inside = start + rows < M
        sums += load(loss_ptr + start + rows, inside, ACC, "evict_first")
        if scale_ptr is not None:
            y = tl.load(target_ptr + start + rows, mask=inside, other=0).to(tl.int64)
            counts += (inside & (y != ignore_index)).to(tl.int32)
    total = tl.sum(sums, axis=0)
    if scale_ptr is not None:
        count = tl.sum(counts, axis=0).to(ACC)
        scale = 1.0 / tl.maximum(count, 1.0)
        total = tl.where(count > 0, total / tl.maximum(count, 1.0), float("nan"))
        tl.store(scale_ptr, scale)
    tl.store(total_ptr, total)


def launch_reduce(losses: Tensor, target: Tensor, total: Tensor, scale: Tensor | None, ignore_index: int) -> None:
    """Write Σ losses to ``total``; with ``scale`` the mean over what is not ignored, and to ``scale`` 1 / its count."""
    with on_device_of(losses):
        launch(
            _reduce_kernel, (1,), losses, target, total, scale, losses.numel(), ignore_index,
            BLOCK=REDUCE_ROWS, ACC=accumulator(losses.dtype), num_warps=512 // card_of(losses).warp_size,
        )  # fmt: skip
