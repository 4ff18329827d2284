"""GELU of x + bias, with dropout and a residual, in one pass: what follows the first linear of a feed-forward layer.

    h = gelu(x + b)                        exact, or the tanh form: see activations.py
    y = k · h + residual                   k = 0 where dropped, else 1 / (1 − p)
    dx = k · dy · gelu'(x + b)             db = Σ_rows dx               dresidual = dy

Shapes   x, residual, y, dy, dx: (..., N)   b, db: (N,)   n = elements of x, M = n / N
Types    fp32, bf16, fp16 (computed in fp32), fp64; x and residual alike, b as it is (fp32 beside bf16 under autocast)
Bytes    forward (2 n + N) · itemsize, and n · itemsize for a residual
         backward (3 n + N) · itemsize, and 8 · P · N for P partial rows of db; nothing is saved but x and b
Flops    forward about 30 n (exact), backward about 50 n, dropout 6 n each
Source   Hendrycks & Gimpel 2016, arXiv:1606.08415; Salmon et al. 2011 (philox)
Roof     not measured yet

The mask is not stored: element i is dropped where its 16 random bits are below T = round(2¹⁶ · p), and the backward
draws them again. So p is a multiple of 2⁻¹⁶, kept elements are scaled by 2¹⁶ / (2¹⁶ − T), and a philox call serves 8:
    half h of word w of philox4x32-7(key = seed, counter = i div 8)          2 w + h = i mod 8, the low half first

The kernels see x as folded rows (folded_rows.py), so that all accesses have 16 bytes whatever N is and a column keeps
its bias; db is summed over the rows in registers, then over the programs. No atomics: two runs are bit for bit equal.
"""

import math
from dataclasses import dataclass
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
from tritonspeed.kernels.activations import (
    activate,
    activate_backward_reference,
    activate_reference,
    activate_with_slope,
    gelu_form,
)
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.folded_rows import GROUP, Folding, launch_column_sums, place_folded
from tritonspeed.kernels.rounding import load, philox_reference, store_rounded
from tritonspeed.kernels.tuned import Tunable, dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = 2**16  # of the random number of an element
NUM_SUMMED_ROWS = (
    32  # folded rows a program adds up at least, so that db's partial rows cost at most 1/24 of the traffic
)


def dropout_threshold(p: float) -> int:
    """T: an element is dropped where its 16 bits are below it."""
    return round(p * LEVELS)


def dropout_scale(threshold: int) -> float:
    """What kept elements are multiplied by; 0 where none is kept."""
    return LEVELS / (LEVELS - threshold) if threshold < LEVELS else 0.0


def keep_reference(shape: torch.Size, seed: Tensor, threshold: int) -> Tensor:
    """The mask that the kernels draw from a seed, () int64, as booleans of this shape."""
    n = math.prod(shape)
    counter = torch.arange(-(-n // GROUP), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox_reference(seed, counter), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    return (halves[:n] >= threshold).view(shape)


def bias_gelu_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, activation: str, threshold: int
) -> Tensor:
    """y in PyTorch, rounded once: what the kernels must equal; what CPU tensors take."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = activate_reference(x.to(wide) if bias is None else x.to(wide) + bias.to(wide), activation)
    if seed is not None:
        keep = keep_reference(x.shape, seed, threshold)
        y = torch.where(keep, y * dropout_scale(threshold), 0.0)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype).contiguous()


@triton.jit
def _draw(seed, rows, col0, threshold, W, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mask of a tile [ROWS, BLOCK_N] whose first column is col0; rows is [ROWS, 1]."""
    group = rows * (W // 8) + (col0 // 8 + tl.arange(0, BLOCK_N // 8))[None, :]  # [ROWS, BLOCK_N / 8] int64
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=tl.constexpr(7))
    lows = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))  # word 2a + b at (…, a, b)
    highs = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(lows, highs), [ROWS, BLOCK_N]).to(tl.int32) >= threshold


@triton.jit
def _read_bias(bias_ptr, cols, in_row, N, FOLDED: tl.constexpr, ACC: tl.constexpr):
    if FOLDED:
        cols = cols % N
    return load(bias_ptr + cols, in_row, ACC, "evict_last")


@triton.jit
def _forward_tile(
    x_ptr, residual_ptr, y_ptr, bias, rows, at, inside, col0, seed, threshold, scale, W,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    x = load(x_ptr + at, inside, ACC, "evict_first")
    if bias is not None:
        x += bias
    y = activate(x, ACTIVATION)
    if seed is not None:
        y = tl.where(_draw(seed, rows, col0, threshold, W, ROWS, BLOCK_N), y * scale, 0.0)
    if residual_ptr is not None:
        y += load(residual_ptr + at, inside, ACC, "evict_first")
    store_rounded(y_ptr + at, y, inside, INTERPRET)


@triton.jit(do_not_specialize=["n", "N", "W", "num_full", "threshold"])
def _bias_gelu_forward_kernel(
    x_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, n, N, W, num_full, threshold, scale,
    ACTIVATION: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # an fp64 scalar, as the compiler of torch hands it over, would widen the tile
    num_blocks = tl.cdiv(W, BLOCK_N)
    col0 = (tl.program_id(0) % num_blocks) * BLOCK_N
    tile = tl.program_id(0) // num_blocks
    cols = col0 + tl.arange(0, BLOCK_N)[None, :]
    in_row = cols // 8 < W // 8  # 8 neighbours alike: their access stays in one piece
    bias, seed = None, None
    if bias_ptr is not None:
        bias = _read_bias(bias_ptr, cols, in_row, N, FOLDED, ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    rows, at = place_folded(tile, col0, W, ROWS, BLOCK_N)
    if tile < num_full:
        _forward_tile(
            x_ptr, residual_ptr, y_ptr, bias, rows, at, in_row, col0, seed, threshold, scale, W,
            ACTIVATION, ACC, INTERPRET, ROWS, BLOCK_N,
        )  # fmt: skip
    else:
        _forward_tile(
            x_ptr, residual_ptr, y_ptr, bias, rows, at, in_row & (at < n), col0, seed, threshold, scale, W,
            ACTIVATION, ACC, INTERPRET, ROWS, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    grad_ptr, x_ptr, dx_ptr, bias, rows, at, inside, col0, seed, threshold, scale, W,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    grad = load(grad_ptr + at, inside, ACC, "evict_first")
    x = load(x_ptr + at, inside, ACC, "evict_first")
    if bias is not None:
        x += bias
    _, slope = activate_with_slope(x, ACTIVATION)
    dx = grad * slope
    if seed is not None:
        dx = tl.where(_draw(seed, rows, col0, threshold, W, ROWS, BLOCK_N), dx * scale, 0.0)
    store_rounded(dx_ptr + at, dx, inside, INTERPRET)
    return tl.where(inside, dx, 0.0)


@triton.jit(do_not_specialize=["n", "N", "W", "num_full", "threshold"])
def _bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, partial_ptr, n, N, W, num_full, threshold, scale,
    ACTIVATION: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)  # an fp64 scalar, as the compiler of torch hands it over, would widen the tile
    num_blocks = tl.cdiv(W, BLOCK_N)
    col0 = (tl.program_id(0) % num_blocks) * BLOCK_N
    first, step = tl.program_id(0) // num_blocks, tl.num_programs(0) // num_blocks
    cols = col0 + tl.arange(0, BLOCK_N)[None, :]
    in_row = cols // 8 < W // 8
    bias, seed = None, None
    if bias_ptr is not None:
        bias = _read_bias(bias_ptr, cols, in_row, N, FOLDED, ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    dbias = tl.zeros([ROWS, BLOCK_N], ACC)
    for tile in tl.range(first, num_full, step, num_stages=STAGES):
        rows, at = place_folded(tile, col0, W, ROWS, BLOCK_N)
        dx = _backward_tile(
            grad_ptr, x_ptr, dx_ptr, bias, rows, at, in_row, col0, seed, threshold, scale, W,
            ACTIVATION, ACC, INTERPRET, ROWS, BLOCK_N,
        )  # fmt: skip
        if partial_ptr is not None:
            dbias += dx
    if first == num_full % step:  # whose turn it would be takes the rows that fill no tile
        rows, at = place_folded(num_full, col0, W, ROWS, BLOCK_N)
        dx = _backward_tile(
            grad_ptr, x_ptr, dx_ptr, bias, rows, at, in_row & (at < n), col0, seed, threshold, scale, W,
            ACTIVATION, ACC, INTERPRET, ROWS, BLOCK_N,
        )  # fmt: skip
        if partial_ptr is not None:
            dbias += dx
    if partial_ptr is not None:
        total = tl.sum(dbias, axis=0, keep_dims=True)
        tl.store(partial_ptr + first.to(tl.int64) * W + cols, total, mask=in_row)


@dataclass(frozen=True, slots=True)
class BiasGELULaunch:
    """How a kernel is launched.

    Attributes:
        block: elements of a tile.
        max_block_n: its columns at most; it has fewer where that leaves fewer lanes idle.
        num_stages: of the backward's loop over the rows.
        programs_per_sm: of the backward with a bias, whose programs stay for many rows.
    """

    block: int
    max_block_n: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 8

    @classmethod
    def heuristic(cls, card: Card, *, dtype: str) -> "BiasGELULaunch":
        # 256 threads × 8 elements, which share one philox call: 25-64 registers. Tiles of 512 columns spill 8 bytes on
        # sm_120, a pipelined loop takes 80 registers with dropout (ptxas, triton 3.9)
        return cls(block=2048, max_block_n=256, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card, *, dtype: str) -> list["BiasGELULaunch"]:
        """Tiles of 8 or 16 elements a thread, wide or narrow, with and without loads ahead."""
        return [
            cls(threads * elems, block_n, threads // card.warp_size, stages, 2048 // threads)
            for threads in (128, 256, 512)
            for elems in (8, 16)
            for block_n in (256, 1024)
            for stages in (1, 2)
        ]


FORWARD = Tunable(
    "bias_gelu_forward",
    (_bias_gelu_forward_kernel,),
    BiasGELULaunch,
    BiasGELULaunch.heuristic,
    lambda card, *, dtype: [how for how in BiasGELULaunch.candidates(card, dtype=dtype) if how.num_stages == 1],
)
BACKWARD = Tunable(
    "bias_gelu_backward",
    (_bias_gelu_backward_kernel,),
    BiasGELULaunch,
    BiasGELULaunch.heuristic,
    BiasGELULaunch.candidates,
)


def _constants(x: Tensor, activation: str, num_cols: int | None, folding: Folding, num_warps: int) -> dict[str, Any]:
    return {
        "ACTIVATION": activation, "FOLDED": folding.width != num_cols, "ACC": accumulator(x.dtype),
        "INTERPRET": INTERPRETED, "ROWS": folding.rows, "BLOCK_N": folding.block_n, "num_warps": num_warps,
    }  # fmt: skip


def launch_bias_gelu_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, activation: str, threshold: int
) -> Tensor:
    """y, contiguous."""
    y = x.new_empty(x.shape)
    n, num_cols = x.numel(), None if bias is None else bias.numel()
    if n == 0:
        return y
    with on_device_of(x):
        how = FORWARD.resolve(card_of(x), dtype=dtype_name(x.dtype))
        folding = Folding.of(n, num_cols, how.block, how.max_block_n)
        launch(
            _bias_gelu_forward_kernel, (folding.num_tiles * folding.num_blocks,), x.contiguous(),
            None if bias is None else bias.contiguous(), None if residual is None else residual.contiguous(), seed, y,
            n, num_cols or 0, folding.width, folding.num_full, threshold, dropout_scale(threshold),
            **_constants(x, activation, num_cols, folding, how.num_warps),
        )  # fmt: skip
    return y


def launch_bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, threshold: int
) -> tuple[Tensor, Tensor]:
    """dx and db, contiguous; db is empty without a bias."""
    dx, dbias = x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    n, num_cols = x.numel(), None if bias is None else bias.numel()
    if n == 0:
        return dx, dbias.zero_()
    with on_device_of(x):
        how = BACKWARD.resolve(card_of(x), dtype=dtype_name(x.dtype))
        folding = Folding.of(n, num_cols, how.block, how.max_block_n)
        num_programs, partials = folding.num_tiles, None
        if bias is not None:
            wanted = triton.cdiv(how.programs_per_sm * card_of(x).num_sms, folding.num_blocks)
            num_programs = min(wanted, triton.cdiv(n, folding.width * NUM_SUMMED_ROWS))
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            partials = x.new_empty(num_programs, folding.width, dtype=wide)
        launch(
            _bias_gelu_backward_kernel, (num_programs * folding.num_blocks,), grad.contiguous(), x.contiguous(),
            None if bias is None else bias.contiguous(), seed, dx, partials, n, num_cols or 0, folding.width,
            folding.num_full, threshold, dropout_scale(threshold), STAGES=how.num_stages,
            **_constants(x, activation, num_cols, folding, how.num_warps),
        )  # fmt: skip
        if partials is not None:
            launch_column_sums(partials, dbias)
    return dx, dbias


def _backward_cpu(
    grad: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, threshold: int
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = grad.to(wide)
    if seed is not None:
        keep = keep_reference(x.shape, seed, threshold)
        dx = torch.where(keep, dx * dropout_scale(threshold), 0.0)
    h = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    dx = activate_backward_reference(dx, h, activation)
    dbias = x.new_empty(0) if bias is None else dx.reshape(-1, bias.numel()).sum(0).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dbias


def _forward_shapes(x: Tensor, *_others: object) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(grad: Tensor, x: Tensor, bias: Tensor | None, *_others: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


register(
    "bias_gelu_forward(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, str activation, int threshold)"
    " -> Tensor",
    launch_bias_gelu_forward,
    _forward_shapes,
    bias_gelu_reference,
)
register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? seed, str activation, int threshold)"
    " -> (Tensor, Tensor)",
    launch_bias_gelu_backward,
    _backward_shapes,
    _backward_cpu,
)


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, seed, activation, threshold):
        ctx.save_for_backward(x, bias, seed)
        ctx.options = activation, threshold
        return torch.ops.tritonspeed.bias_gelu_forward(x, bias, residual, seed, activation, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias, seed = ctx.saved_tensors
        needs_x, needs_bias, needs_residual = ctx.needs_input_grad[:3]
        dx, dbias = None, None
        if needs_x or needs_bias:
            dx, dbias = torch.ops.tritonspeed.bias_gelu_backward(grad, x, bias, seed, *ctx.options)
        return dx, dbias if needs_bias else None, grad if needs_residual else None, None, None, None


def _check_fits(name: str, tensor: Tensor, x: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != x.device:
        raise ValueError(
            f"bias_gelu: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, must be {tuple(shape)}"
            f" {' or '.join(map(str, dtypes))} on {x.device}, as x is {tuple(x.shape)}: reshape, convert or move it"
        )


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:  # from the device's own generator: no wait, and checkpointing restores it
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"bias_gelu: seed is {tuple(seed.shape)} {seed.dtype} on {seed.device}, must be one int64 on {device}"
            )
        return seed.detach().reshape(())
    if not 0 <= seed < 2**63:
        raise ValueError(f"bias_gelu: seed is {seed}, must be in [0, 2**63)")
    return torch.full((), seed, dtype=torch.int64, device=device)


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """dropout(gelu(x + bias)) + residual, differentiable in x, bias and residual.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64.
        bias: (N,), any of these types.
        approximate: as in ``torch.nn.functional.gelu``: "none" or "tanh".
        dropout_p: probability of a zero, rounded to a multiple of 2⁻¹⁶; 0 draws nothing.
        seed: 0 ≤ seed < 2⁶³, or one int64 on x's device (CUDA graphs may then change it); the same seed and shape drop
            the same elements on any device. None draws one from the device's generator.
        residual: (..., N), x's shape and type.

    Returns:
        (..., N) of x's type, contiguous; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes, types or devices that do not fit, or numbers out of range.
    """
    activation = gelu_form("bias_gelu", approximate)
    check_device("bias_gelu", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"bias_gelu: x is {x.dtype}, must be float32, bfloat16, float16 or float64")
    if x.dim() == 0:
        raise ValueError("bias_gelu: x is a number, must have at least one axis: pass x[None]")
    if bias is not None:
        _check_fits("bias", bias, x, x.shape[-1:], DTYPES)
    if residual is not None:
        _check_fits("residual", residual, x, x.shape, (x.dtype,))
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"bias_gelu: dropout_p is {dropout_p}, must be in [0, 1]")
    threshold = dropout_threshold(dropout_p)
    at = _seed_tensor(seed, x.device) if threshold else None
    if takes_reference(x):
        return bias_gelu_reference(x, bias, residual, at, activation, threshold)
    return _BiasGELU.apply(x, bias, residual, at, activation, threshold)
