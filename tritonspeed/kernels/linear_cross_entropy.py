"""The output layer and its cross-entropy in one: a chunk of logits at a time, never all of them.

    logits = hidden · Wᵀ + b          loss as in ``cross_entropy``, per token; chunk by chunk of R tokens:
    Z = hidden[chunk] · Wᵀ + b        one matmul into one buffer, used again for every chunk
    Z ← softmax(Z) − onehot           losses and gradient in one kernel, over the logits
    dhidden[chunk] = Z · W            dW += Zᵀ · hidden[chunk], in fp32            db += Σ_tokens Z

The gradients are made in the forward, for a gradient of 1. For "mean" and "sum" the backward multiplies them by what
comes in (and 1 / count), in the pass that rounds dW to the weight's type anyway. For "none" each token has a gradient
of its own, known in the backward only, which makes the chunks anew with it. Nothing here waits for the device.

Shapes   hidden, dhidden: (..., H)   weight, dW: (V, H)   bias, db: (V,)   target, loss per token: (...)   T tokens
Types    hidden, weight, bias of one type: fp32, bf16, fp16 or fp64; under autocast, autocast's. Losses, db and the sum
         of dW over chunks fp32 (fp64 for fp64)
Bytes    live at the forward's peak, beside the arguments; s = itemsize, V' = V rounded up to 16 bytes, C chunks:
             R·V'·s + T·H·s + V·H·(4 if C > 1 else s) + 4·V·[bias] + 4·T           without gradients R·V'·s + 4·T
         moved: C·(8·V·H + 2·V·H·s) for the sum of dW and for W, and of logits 6·T·V·s: the matmul writes them, the
         kernel reads them twice (the second time from the L2) and writes their gradient, two matmuls read it
Flops    2·T·V·H forward, 6·T·V·H with gradients
Source   Wijmans et al. 2024, arXiv:2411.09009, for what logits cost; they keep none at all, here a chunk stays
Roof     not measured yet

How many tokens make a chunk. On an H100 (3 TB/s; 700 TFLOP/s of bf16 in large matmuls) a logit costs 6·H / 7e14 s in
the matmuls and about 4 bytes / 3e12 s in the kernel: 35 against 1.3 ps at H = 4096 (4 %), 6.6 against 1.3 at H = 768.
The sum of dW moves 8 bytes per weight and chunk, which is 8 / 3e12 ÷ (6·R / 7e14) = 311 / R of the matmuls: 30 % at the
1024 tokens that suffice to fill the card, 8 % at 4096. So chunks with a weight gradient have 4096 tokens from H = 4096
on, 2048 below (where W is small, and the logits would be most of the memory), chunks without have 1024. The buffer's
rows are padded to 16 bytes: an odd V would leave the rows of Z unaligned, and Z is a matmul's operand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._autograd import once_differentiable
from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import check_device, takes_reference
from tritonspeed.kernels.cross_entropy import (
    DTYPES,
    check_options,
    check_target,
    cross_entropy_reference,
    launch_cross_entropy_forward,
    launch_cross_entropy_in_place_,
)
from tritonspeed.kernels.cross_entropy_cpu import reduced, row_gradients, row_losses
from tritonspeed.kernels.cross_entropy_rows import VECTOR_BYTES, CrossEntropyOptions, launch_reduce
from tritonspeed.kernels.scale_gradient import scale_gradient

TOKENS_WITH_WEIGHT_GRADIENT = 4096
TOKENS_WITHOUT = 1024


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The gradients to make."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """What the chunks must equal: all logits at once."""
    return cross_entropy_reference(
        torch.nn.functional.linear(hidden, weight, bias), target, ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction=reduction, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


def chunk_tokens(num_tokens: int, hidden_size: int, num_chunks: int | None, makes_weight_gradient: bool) -> int:
    """Tokens a chunk, the last one aside."""
    if num_chunks is not None:
        return -(-num_tokens // num_chunks)
    if not makes_weight_gradient:
        return min(num_tokens, TOKENS_WITHOUT)
    tokens = TOKENS_WITH_WEIGHT_GRADIENT if hidden_size >= 4096 else TOKENS_WITH_WEIGHT_GRADIENT // 2
    return min(num_tokens, tokens)


def _losses_(
    logits: Tensor, target: Tensor, g: Tensor | None, options: CrossEntropyOptions, makes_gradient: bool
) -> Tensor:
    """Losses of a chunk and, if wanted, the gradient over its logits."""
    if takes_reference(logits):
        losses, statistics = row_losses(logits, target, options)
        if makes_gradient:
            logits.copy_(row_gradients(logits, target, statistics, g, options))
        return losses
    if not makes_gradient:
        return launch_cross_entropy_forward(logits, target, "none", options)[0]
    losses = torch.empty_like(target, dtype=_accumulator(logits))
    launch_cross_entropy_in_place_(logits, target, g, losses, options)
    return losses


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _add_product_(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total ← a · b, or total += a · b; the product keeps total's type on its way where the matmul can."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)  # beta 0 reads nothing, NaN neither
    elif total.is_cuda and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=0 if is_first else 1, out=total)
    elif is_first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


@dataclass(frozen=True, slots=True)
class _Chunked:
    """Losses of all tokens, and the gradients that were wanted (else None) for a gradient of 1 or g per token."""

    losses: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    g: Tensor | None,
    options: CrossEntropyOptions,
    wanted: _Wanted,
    num_chunks: int | None,
) -> _Chunked:
    """The chunks, one after the other: hidden (T, H), target and g (T,), contiguous."""
    (num_tokens, hidden_size), num_classes, acc = hidden.shape, weight.shape[0], _accumulator(hidden)
    size = max(1, chunk_tokens(num_tokens, hidden_size, num_chunks, wanted.weight))
    # a sum over several chunks is kept in fp32; one chunk's is the matmul's own
    sum_dtype = acc if num_tokens > size else weight.dtype
    made = _Chunked(
        hidden.new_empty(num_tokens, dtype=acc),
        torch.empty_like(hidden) if wanted.hidden else None,
        weight.new_empty(weight.shape, dtype=sum_dtype) if wanted.weight else None,
        hidden.new_zeros(num_classes, dtype=acc) if wanted.bias else None,
    )
    if not num_tokens and made.dweight is not None:
        made.dweight.zero_()
    unit = VECTOR_BYTES // hidden.element_size()
    buffer = hidden.new_empty(size, -(-num_classes // unit) * unit)[:, :num_classes]
    for start in range(0, num_tokens, size):
        chunk = slice(start, min(start + size, num_tokens))
        x, logits = hidden[chunk], buffer[: chunk.stop - start]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        g_chunk = None if g is None else g[chunk]
        made.losses[chunk] = _losses_(logits, target[chunk], g_chunk, options, makes_gradient=bool(wanted))
        if made.dhidden is not None:
            torch.mm(logits, weight, out=made.dhidden[chunk])
        if made.dweight is not None:
            _add_product_(made.dweight, logits.t(), x, is_first=start == 0)
        if made.dbias is not None:
            made.dbias.add_(logits.sum(0, dtype=acc))
    return made


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    g: Tensor | None,
    reduction: str,
    num_chunks: int | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: loss, dhidden, dweight, dbias and the scale that these still want; empty where not wanted."""
    at, wanted = CrossEntropyOptions(*options), _Wanted(wants_hidden, wants_weight, wants_bias)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):  # the types are chosen by now
        rows, classes = hidden.reshape(-1, hidden.shape[-1]).contiguous(), target.reshape(-1).contiguous()
        flat_g = None if g is None else g.reshape(-1).contiguous()
        made = run_chunks(rows, weight, bias, classes, flat_g, at, wanted, num_chunks)
        scale = made.losses.new_ones(())
        if reduction == "none":
            loss = made.losses.view(target.shape)
        elif takes_reference(hidden):
            loss, found = reduced(made.losses, classes, reduction, at.ignore_index)
            scale = found if found.numel() else scale
        else:
            loss = torch.empty_like(scale)
            launch_reduce(made.losses, classes, loss, scale if reduction == "mean" else None, at.ignore_index)
        nothing = hidden.new_empty(0)
        dhidden = nothing if made.dhidden is None else made.dhidden.view(hidden.shape)
        dweight = hidden.new_empty(0) if made.dweight is None else made.dweight
        dbias = hidden.new_empty(0) if made.dbias is None else made.dbias
    return loss, dhidden, dweight, dbias, scale


def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    g: Tensor | None,
    reduction: str,
    num_chunks: int | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc, wide = _accumulator(hidden), weight.dtype
    if wants_weight and target.numel() > max(1, chunk_tokens(target.numel(), hidden.shape[-1], num_chunks, True)):
        wide = acc
    return (
        hidden.new_empty(target.shape if reduction == "none" else (), dtype=acc),
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        hidden.new_empty(weight.shape if wants_weight else 0, dtype=wide),
        hidden.new_empty(weight.shape[:1] if wants_bias else 0, dtype=acc if wants_bias else hidden.dtype),
        hidden.new_empty((), dtype=acc),
    )


register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? g, str reduction,"
    " SymInt? num_chunks, bool wants_hidden, bool wants_weight, bool wants_bias, SymInt ignore_index,"
    " float label_smoothing, float z_loss, float softcap)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor scale)",
    _run,
    _shapes,
    _run,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, reduction, num_chunks, out_dtype, *options: Any):
        is_late = reduction == "none"  # each token's gradient is known in the backward only
        wants = [needs and not is_late for needs in ctx.needs_input_grad[:3]]
        loss, *gradients, scale = torch.ops.tritonspeed.linear_cross_entropy(
            hidden, weight, bias, target, None, reduction, num_chunks, *wants, *options
        )
        ctx.is_late, ctx.num_chunks, ctx.options = is_late, num_chunks, options
        ctx.dtypes = hidden.dtype, weight.dtype
        if is_late:
            ctx.save_for_backward(hidden, weight, bias, target)
        else:
            ctx.save_for_backward(*gradients, scale)
        return loss.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wants, others = ctx.needs_input_grad[:3], (None,) * (4 + len(ctx.options))
        hidden_dtype, weight_dtype = ctx.dtypes
        dtypes = hidden_dtype, weight_dtype, weight_dtype
        if ctx.is_late:
            hidden, weight, bias, target = ctx.saved_tensors
            _, *gradients, _ = torch.ops.tritonspeed.linear_cross_entropy(
                hidden, weight, bias, target, g, "none", ctx.num_chunks, *wants, *ctx.options
            )
            made = [gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
        else:
            *gradients, scale = ctx.saved_tensors
            made = [
                scale_gradient(gradient, g, scale, dtype) if wanted else None
                for gradient, dtype, wanted in zip(gradients, dtypes, wants, strict=True)
            ]
        return *(gradient if wanted else None for gradient, wanted in zip(made, wants, strict=True)), *others


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_chunks: int | None) -> None:
    name = "linear_cross_entropy"
    if hidden.dtype not in DTYPES:
        raise ValueError(f"{name}: hidden is {hidden.dtype}, must be float32, bfloat16, float16 or float64")
    if not hidden.ndim or weight.ndim != 2 or not weight.numel() or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}: weight {tuple(weight.shape)} must be (V, H), H the last axis of hidden {tuple(hidden.shape)}:"
            " that is nn.Linear's layout"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} must be ({weight.shape[0]},), one for each row of weight")
    for other, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(f"{name}: hidden is {hidden.dtype}, {other} {x.dtype}: convert one, or use torch.autocast")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: hidden is on {hidden.device}, {other} on {x.device}: move one to the other")
    if num_chunks is not None and num_chunks < 1:
        raise ValueError(f"{name}: num_chunks is {num_chunks}, must be at least 1: None chooses it")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_chunks: int | None = None,
) -> Tensor:
    """``cross_entropy(F.linear(hidden, weight, bias), target)`` without the logits, differentiable in the first three.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64, any strides.
        weight: (V, H), of hidden's type unless under autocast: an embedding's or nn.Linear's. Frozen costs nothing.
        target: (...), int64 or int32 in [0, V) or ignore_index. What is neither is NaN on a GPU, IndexError on a CPU.
        bias: (V,).
        ignore_index, label_smoothing, reduction, z_loss, softcap: as in ``cross_entropy``.
        num_chunks: into how many chunks the tokens are cut; memory of the logits falls with it. None: from the sizes.

    Returns:
        () or (...), in hidden's type, fp32 under autocast.

    Raises:
        ValueError: types, shapes, devices or options that do not fit.
    """
    check_device("linear_cross_entropy", hidden)
    check_options("linear_cross_entropy", reduction, label_smoothing, softcap)
    out_dtype, kind = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        low, out_dtype = torch.get_autocast_dtype(kind), torch.float32
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    _check(hidden, weight, bias, num_chunks)
    check_target("linear_cross_entropy", target, hidden, "hidden")
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        found = torch.ops.tritonspeed.linear_cross_entropy(
            hidden, weight, bias, target, None, reduction, num_chunks, False, False, False, *options
        )
        return found[0].to(out_dtype)
    return _LinearCrossEntropy.apply(hidden, weight, bias, target, reduction, num_chunks, out_dtype, *options)
