"""Cross-entropy of logits and class indices, with label smoothing, z-loss and soft cap, over rows of any length.

    x = cap · tanh(logits / cap)                   or the logits as they are
    L = log Σ_c exp(x_c)                           one pass: running maximum and rescaled sum
    loss = (1 − ε) · (L − x_y) + ε · (L − Σ_c x_c / V) + z · L²          0 where y = ignore_index
    dlogits_c = g · [(1 + 2 z L) · exp(x_c − L) − (1 − ε) · [c = y] − ε / V] · (1 − (x_c / cap)²)

"mean" divides Σ loss by the number of rows that are not ignored; with none left the loss is NaN, as PyTorch's is, and
the gradient 0. tanh(x) = 2 · sigmoid(2x) − 1.

Shapes   logits, dlogits: (..., V)   target, loss per row: (...)   loss reduced: ()   M = product of the leading axes
Types    logits fp32, bf16, fp16 or fp64; computed in fp32 (fp64 for fp64), loss rounded once to the logits' type, or
         fp32 under autocast: PyTorch's types. target int64 or int32
Bytes    forward  M·V·itemsize + 20·M        backward  2·M·V·itemsize + 16·M; ignored rows are not read
         loss and gradient in one kernel (``launch_cross_entropy_in_place_``): 3·M·V·itemsize, the second read from L2
Flops    forward 5 M·V   backward 6 M·V
Source   Szegedy et al. 2016, arXiv:1512.00567 (smoothing); Milakov & Gimelshein 2018, arXiv:1805.02867 (one pass);
         Chowdhery et al. 2022, arXiv:2204.02311 (z-loss); Gemma Team 2024, arXiv:2408.00118 (soft cap)
Roof     not measured yet

Rows are read in 16-byte vectors wherever they start (``cross_entropy_rows.py``) and may lie apart in up to two strides:
``logits[:, :-1]`` is read where it stands.

A target that is neither a class nor ignore_index makes its row's loss and gradient NaN (nothing is read out of bounds);
CPU tensors take PyTorch, which raises IndexError.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.cross_entropy_cpu import backward_cpu, backward_cpu_, forward_cpu
from tritonspeed.kernels.cross_entropy_rows import (
    VECTOR_BYTES,
    CrossEntropyOptions,
    Rows,
    empty_gradient,
    find_row,
    launch_reduce,
    lead_of,
    readable,
    row_loss,
    write_row_gradient,
)
from tritonspeed.kernels.rounding import as_scalar
from tritonspeed.kernels.tuned import Tunable, dtype_name, next_power_of_2

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The maths above in PyTorch: what the kernels must equal, and what CPU tensors take."""
    rows, classes = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).long()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if softcap:
        rows = softcap * torch.tanh(rows / softcap)
    losses = F.cross_entropy(
        rows, classes, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    is_ignored = classes == ignore_index
    if z_loss:
        losses = losses + (z_loss * rows.logsumexp(-1).square()).masked_fill(is_ignored, 0)
    if reduction == "none":
        loss = losses.view(target.shape)
    else:
        loss = losses.sum() if reduction == "sum" else losses.sum() / (~is_ignored).sum()
    return loss.to(_loss_dtype(logits))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """PyTorch's: autocast runs its cross_entropy in fp32."""
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
        return torch.float32
    return logits.dtype


_RUNTIME = ["rows_per_batch", "batch_stride", "row_stride", "lead", "V", "ignore_index"]


@triton.jit(do_not_specialize=_RUNTIME)
def _cross_entropy_forward_kernel(
    logits_ptr, target_ptr, loss_ptr, top_ptr, log_total_ptr, rows_per_batch, batch_stride, row_stride, lead, V,
    ignore_index, smoothing, z_loss, softcap,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    smoothing, z_loss, softcap = as_scalar(smoothing, ACC), as_scalar(z_loss, ACC), as_scalar(softcap, ACC)
    y = tl.load(target_ptr + row).to(tl.int64)
    if y == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(top_ptr + row, 0.0)
        tl.store(log_total_ptr + row, 0.0)
    else:
        x_row, phase = find_row(logits_ptr, row, rows_per_batch, batch_stride, row_stride, lead, VEC)
        loss, top, log_total = row_loss(
            x_row, phase, V, y, smoothing, z_loss, softcap,
            VEC, VECTORS, ALIGNED, SMOOTHED, CAPPED, ACC, "evict_first",
        )  # fmt: skip
        tl.store(loss_ptr + row, loss)
        tl.store(top_ptr + row, top)
        tl.store(log_total_ptr + row, log_total)


@triton.jit(do_not_specialize=[*_RUNTIME, "g_stride", "out_batch_stride", "out_row_stride"])
def _cross_entropy_backward_kernel(
    logits_ptr, target_ptr, top_ptr, log_total_ptr, g_ptr, scale_ptr, out_ptr, rows_per_batch, batch_stride, row_stride,
    lead, V, ignore_index, smoothing, z_loss, softcap, g_stride, out_batch_stride, out_row_stride, out_lead,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, SAME_PHASE: tl.constexpr, CAPPED: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    smoothing, z_loss, softcap = as_scalar(smoothing, ACC), as_scalar(z_loss, ACC), as_scalar(softcap, ACC)
    y = tl.load(target_ptr + row).to(tl.int64)
    x_row, phase = find_row(logits_ptr, row, rows_per_batch, batch_stride, row_stride, lead, VEC)
    out_row, out_phase = find_row(out_ptr, row, rows_per_batch, out_batch_stride, out_row_stride, out_lead, VEC)
    if not SAME_PHASE:
        out_row += out_phase - phase  # column for column beside x: the stores are no longer known to be aligned
    g = tl.load(g_ptr + row.to(tl.int64) * g_stride).to(ACC)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    write_row_gradient(
        x_row, out_row, phase, V, y, y == ignore_index, g, tl.load(top_ptr + row), tl.load(log_total_ptr + row),
        smoothing, z_loss, softcap, VEC, VECTORS, ALIGNED, CAPPED, ACC, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _cross_entropy_in_place_kernel(
    logits_ptr, target_ptr, loss_ptr, g_ptr, rows_per_batch, batch_stride, row_stride, lead, V, ignore_index,
    smoothing, z_loss, softcap,
    VEC: tl.constexpr, VECTORS: tl.constexpr, ALIGNED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Loss of a row, then its gradient over its logits; the second read is the L2's."""
    row = tl.program_id(0)
    smoothing, z_loss, softcap = as_scalar(smoothing, ACC), as_scalar(z_loss, ACC), as_scalar(softcap, ACC)
    y = tl.load(target_ptr + row).to(tl.int64)
    x_row, phase = find_row(logits_ptr, row, rows_per_batch, batch_stride, row_stride, lead, VEC)
    g = tl.full([], 1.0, ACC)
    if g_ptr is not None:
        g = tl.load(g_ptr + row).to(ACC)
    is_ignored = y == ignore_index
    loss = tl.zeros([], ACC)
    top = tl.zeros([], ACC)
    log_total = tl.zeros([], ACC)
    if not is_ignored:
        loss, top, log_total = row_loss(
            x_row, phase, V, y, smoothing, z_loss, softcap,
            VEC, VECTORS, ALIGNED, SMOOTHED, CAPPED, ACC, "evict_last",
        )  # fmt: skip
    tl.store(loss_ptr + row, loss)
    write_row_gradient(
        x_row, x_row, phase, V, y, is_ignored, g, top, log_total, smoothing, z_loss, softcap,
        VEC, VECTORS, ALIGNED, CAPPED, ACC, INTERPRET,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CrossEntropyLaunch:
    """How a row is worked on."""

    num_warps: int
    vectors_per_thread: int

    @classmethod
    def heuristic(cls, card: Card, n: int, dtype: str) -> "CrossEntropyLaunch":
        # at most 256 threads × 2 vectors: 16 bf16 logits a thread
        threads = min(256, max(card.warp_size, next_power_of_2(n) // 16))
        return cls(threads // card.warp_size, 2)

    @classmethod
    def in_place_heuristic(cls, card: Card, n: int, dtype: str) -> "CrossEntropyLaunch":
        """For the kernel that reads its rows twice."""
        # The second read is the L2's if the rows at work fit there, beside what else is: 1024 threads an SM at 50-64
        # registers (ptxas, sm_90; 83 with the cap), so an H100 has 2 · 132 rows of 512: 27 of its 50 MB at 50257 bf16.
        row_bytes = n * (8 if dtype == "fp64" else 4 if dtype == "fp32" else 2)
        threads = min(1024, max(card.warp_size, next_power_of_2(n) // 16))
        while threads > 256 and card.num_sms * row_bytes * (2048 // threads) <= 0.6 * card.l2_bytes:
            threads //= 2
        return cls(threads // card.warp_size, 2)

    @classmethod
    def candidates(cls, card: Card, n: int, dtype: str) -> list["CrossEntropyLaunch"]:
        threads = [t for t in (32, 64, 128, 256, 512, 1024) if card.warp_size <= t <= max(card.warp_size, n)]
        return [cls(t // card.warp_size, vectors) for t in threads for vectors in (1, 2, 4)]


FORWARD = Tunable(
    "cross_entropy_forward", (_cross_entropy_forward_kernel,), CrossEntropyLaunch,
    CrossEntropyLaunch.heuristic, CrossEntropyLaunch.candidates,
)  # fmt: skip
BACKWARD = Tunable(
    "cross_entropy_backward", (_cross_entropy_backward_kernel,), CrossEntropyLaunch,
    CrossEntropyLaunch.heuristic, CrossEntropyLaunch.candidates,
)  # fmt: skip
IN_PLACE = Tunable(
    "cross_entropy_in_place", (_cross_entropy_in_place_kernel,), CrossEntropyLaunch,
    CrossEntropyLaunch.in_place_heuristic, CrossEntropyLaunch.candidates,
)  # fmt: skip


def _layout(x: Tensor, rows: Rows, how: CrossEntropyLaunch) -> dict[str, Any]:
    vec = VECTOR_BYTES // x.element_size()
    aligned = not any(k % vec for k in (lead_of(x), rows.batch_stride, rows.row_stride, x.shape[-1]))
    vectors = how.num_warps * card_of(x).warp_size * how.vectors_per_thread
    return {"VEC": vec, "VECTORS": vectors, "ALIGNED": aligned}


def launch_cross_entropy_forward(
    logits: Tensor, target: Tensor, reduction: str, options: CrossEntropyOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU, and on a CPU under the interpreter."""
    logits, rows = readable(logits)
    target, n = target.contiguous(), logits.shape[-1]
    total, statistics, scale = _forward_shapes(logits, target, reduction)
    losses = total if reduction == "none" else torch.empty_like(statistics[0])
    with on_device_of(logits):
        how = FORWARD.resolve(card_of(logits), n=n, dtype=dtype_name(logits.dtype))
        launch(
            _cross_entropy_forward_kernel, (target.numel(),),
            logits, target, losses, *statistics, *rows, lead_of(logits), n, *options, **_layout(logits, rows, how),
            SMOOTHED=options.label_smoothing != 0, CAPPED=options.softcap != 0, ACC=accumulator(logits.dtype),
            num_warps=how.num_warps,
        )  # fmt: skip
    if reduction != "none":
        launch_reduce(losses, target, total, scale if reduction == "mean" else None, options.ignore_index)
    return total, statistics, scale


def launch_cross_entropy_backward(
    g: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    scale: Tensor,
    options: CrossEntropyOptions,
    out: Tensor,
) -> None:
    """Write scale · g · dlogits to ``out``, which may be ``logits``; g has one element, or one for each row."""
    source, rows = readable(logits)
    target, g, n = target.contiguous(), g.reshape(-1), logits.shape[-1]
    out_strides = rows[1:] if out.stride() == source.stride() else (rows.rows_per_batch * n, n)
    places = zip((*rows[1:], lead_of(source)), (*out_strides, lead_of(out)), strict=True)
    same_phase = all((a - b) % (VECTOR_BYTES // logits.element_size()) == 0 for a, b in places)
    with on_device_of(logits):
        how = BACKWARD.resolve(card_of(logits), n=n, dtype=dtype_name(logits.dtype))
        launch(
            _cross_entropy_backward_kernel, (target.numel(),),
            source, target, *statistics, g, scale if scale.numel() else None, out, *rows, lead_of(source), n, *options,
            g.stride(0) if g.numel() > 1 else 0, *out_strides, lead_of(out), **_layout(source, rows, how),
            SAME_PHASE=same_phase, CAPPED=options.softcap != 0, ACC=accumulator(logits.dtype), INTERPRET=INTERPRETED,
            num_warps=how.num_warps,
        )  # fmt: skip


def launch_cross_entropy_in_place_(
    logits: Tensor, target: Tensor, g: Tensor | None, losses: Tensor, options: CrossEntropyOptions
) -> None:
    """Write the rows' losses, and their gradients times g (1 without it) over ``logits``, whose rows are in place."""
    rows, n = Rows.of(logits), logits.shape[-1]
    assert rows is not None, "a chunk of logits has its rows in place"
    with on_device_of(logits):
        how = IN_PLACE.resolve(card_of(logits), n=n, dtype=dtype_name(logits.dtype))
        launch(
            _cross_entropy_in_place_kernel, (target.numel(),),
            logits, target, losses, g, *rows, lead_of(logits), n, *options, **_layout(logits, rows, how),
            SMOOTHED=options.label_smoothing != 0, CAPPED=options.softcap != 0, ACC=accumulator(logits.dtype),
            INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip


def _forward(logits: Tensor, target: Tensor, reduction: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return launch_cross_entropy_forward(logits, target, reduction, CrossEntropyOptions(*options))


def _forward_shapes(logits: Tensor, target: Tensor, reduction: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=acc)
    statistics = logits.new_empty((2, *target.shape), dtype=acc)  # max x and log Σ exp(x − max x)
    return loss, statistics, logits.new_empty(() if reduction == "mean" else (0,), dtype=acc)


def _backward(g: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, scale: Tensor, *options: Any) -> Tensor:
    out = empty_gradient(logits)
    launch_cross_entropy_backward(g, logits, target, statistics, scale, CrossEntropyOptions(*options), out)
    return out


def _backward_(g: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, scale: Tensor, *options: Any) -> None:
    if Rows.of(logits) is None:
        logits.copy_(_backward(g, logits, target, statistics, scale, *options))
    else:
        launch_cross_entropy_backward(g, logits, target, statistics, scale, CrossEntropyOptions(*options), logits)


_SAVED = "Tensor target, Tensor statistics, Tensor scale"
_OPTIONS = "SymInt ignore_index, float label_smoothing, float z_loss, float softcap"
register(
    f"cross_entropy_forward(Tensor logits, Tensor target, str reduction, {_OPTIONS})"
    " -> (Tensor loss, Tensor statistics, Tensor scale)",
    _forward,
    _forward_shapes,
    forward_cpu,
)
register(
    f"cross_entropy_backward(Tensor g, Tensor logits, {_SAVED}, {_OPTIONS}) -> Tensor",
    _backward,
    lambda g, logits, *_: empty_gradient(logits),
    backward_cpu,
)
register(
    f"cross_entropy_backward_(Tensor g, Tensor(a!) logits, {_SAVED}, {_OPTIONS}) -> ()",
    _backward_,
    lambda *_: None,
    backward_cpu_,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, reduction, overwrite_logits, *options: Any):
        loss, statistics, scale = torch.ops.tritonspeed.cross_entropy_forward(logits, target, reduction, *options)
        ctx.save_for_backward(logits, target, statistics, scale)
        ctx.overwrite_logits, ctx.options = overwrite_logits, options
        return loss.to(_loss_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, statistics, scale = ctx.saved_tensors
        # a compiled graph may not change what it has saved, and reuses memory by itself
        if ctx.overwrite_logits and not torch.compiler.is_compiling():
            dlogits = logits.detach()
            torch.ops.tritonspeed.cross_entropy_backward_(g, dlogits, target, statistics, scale, *ctx.options)
            torch.autograd.graph.increment_version(dlogits)  # who needs the logits after this is told, not misled
        else:
            dlogits = torch.ops.tritonspeed.cross_entropy_backward(g, logits, target, statistics, scale, *ctx.options)
        return dlogits, *(None,) * (3 + len(ctx.options))


def check_options(operation: str, reduction: str, label_smoothing: float, softcap: float | None) -> None:
    """Raise ValueError for what no cross-entropy here can be asked."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operation}: reduction is {reduction!r}, must be one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{operation}: label_smoothing is {label_smoothing}, must be in [0, 1]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{operation}: softcap is {softcap}, must be greater than 0: None leaves logits as they are")


def check_target(operation: str, target: Tensor, rows: Tensor, name: str) -> None:
    """Raise ValueError unless there is one class index for each row."""
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{operation}: target is {target.dtype}, must be int64 or int32 class indices: torch.nn.functional."
            "cross_entropy takes probabilities"
        )
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"{operation}: target {tuple(target.shape)} must have an index for each row of {name}"
            f" {tuple(rows.shape)}, so shape {tuple(rows.shape[:-1])}: the classes are the last axis"
        )
    if target.device != rows.device:
        raise ValueError(f"{operation}: {name} on {rows.device}, target on {target.device}: move one to the other")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Cross-entropy over the last axis, differentiable in ``logits``; ``F.cross_entropy`` for (..., V) and indices.

    For a shifted language model loss, shift the targets (and end them with ignore_index) rather than slice the logits:
    the slice costs nothing here, but its gradient has to be padded again.

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64, any strides.
        target: (...), int64 or int32 in [0, V) or ignore_index. What is neither is NaN on a GPU, IndexError on a CPU.
        weight: only None.
        label_smoothing: ε in [0, 1]: the share of the target that goes to all classes alike.
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum" or "none".
        z_loss: z: adds z · (log Σ exp)² to each row's loss.
        softcap: cap of cap · tanh(logits / cap), None for none.
        overwrite_logits: the backward writes the gradient over the logits, so that both take one tensor's memory.
            Nothing else may need the logits by then: autograd raises if something does. No effect under torch.compile.

    Returns:
        () or (...), in the logits' type, fp32 under autocast.

    Raises:
        ValueError: types, shapes, devices or options that do not fit.
    """
    check_device("cross_entropy", logits)
    check_options("cross_entropy", reduction, label_smoothing, softcap)
    if weight is not None:
        raise ValueError(
            "cross_entropy: class weights have no kernel here: use torch.nn.functional.cross_entropy, or multiply the"
            " losses of reduction='none' by weight[target]"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"cross_entropy: logits are {logits.dtype}, must be float32, bfloat16, float16 or float64")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"cross_entropy: logits have shape {tuple(logits.shape)}, must be (..., V) with V at least 1")
    check_target("cross_entropy", target, logits, "logits")
    if takes_reference(logits):
        return cross_entropy_reference(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
            z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    return _CrossEntropy.apply(
        logits, target, reduction, overwrite_logits, ignore_index, label_smoothing, z_loss, softcap or 0.0
    )
