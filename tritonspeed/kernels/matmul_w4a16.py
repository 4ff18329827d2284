"""Product of 16-bit activations with 4-bit weights, for inference.

    y[m, n] = Σ_k x[m, k] · (q[n, k] − zero[g, n]) · s[g, n] + bias[n]               g = k div group

    dL/dx = dL/dy · W                                                       W as ``packing.values_reference`` has it

Shapes   x: (..., K); codes: (N, K / 2); scales, zeros: (G, N); bias: (N,); y: (..., N)
Types    x, y fp16 or bf16; codes and zeros uint8; scales fp16, bf16 or fp32; bias any float; sums fp32
Bytes    N · K / 2 + N · G · (itemsize(s) + 1) + 2 · M · (K + N); the splits of K add 8 · S · M · N
Flops    2 · M · N · K
Source   layout and formats: packing.py. Splits of K: Hoque et al. 2024, arXiv:2402.00025
Roof     not measured yet

q − zero is exact in fp16 and bf16: a nibble is put into the mantissa of 1024 (fp16) or 128 (bf16), and the same
constant plus the zero is taken off. The scale is applied to the fp32 sum of a group, so W is never rounded: the result
is closer to the exact one than a product with W in 16 bits.

One row (M = 1) takes no tensor core: a thread reads 16 bytes, 32 weights, and two nibbles v are put into the mantissas
of 1 + v / 16 and 1 + v / 256, so that a weight costs half a shift, a logic operation and a multiply-add. What the ones
add up to is taken off once for 32 weights. With all else that is 4.6 instructions a weight (sm_90, 8 rows a program;
5.2 with 4), where an H100 issues 4.4 in the time in which its memory delivers a weight: issue is the limit, just.
Above some hundred rows W is written as floats first and cuBLAS multiplies (``MatmulLaunch.dequantize``): from where on
is a guess until it is measured.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import card_of, launch, on_device_of, takes_reference, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.dequantize_weight import launch_dequantize_weight
from tritonspeed.kernels.matmul_call import WIDE_DTYPES, check_shapes, check_types, linear, product_of, rows_of
from tritonspeed.kernels.matmul_tiles import (
    GemvLaunch,
    MatmulLaunch,
    Operands,
    finish,
    gemv_candidates,
    gemv_heuristic,
    largest_block_k,
    load_8,
    matmul_candidates,
    matmul_heuristic,
    split_output,
    store_row,
    store_tile,
    tile_of,
)
from tritonspeed.kernels.packing import CHUNK, SCALE_DTYPES, SYMMETRIC_ZERO, values_reference
from tritonspeed.kernels.tuned import Tunable, dtype_name, next_power_of_2

FIRST_DEQUANTIZED_M = 1024  # bucket of M from which cuBLAS is asked; an estimate, see ``_heuristic``


def matmul_w4a16_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The maths above: W dequantised in fp32 (fp64 for fp64), multiplied in it, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return linear(x, values_reference(codes, scales, zeros, wide)[:, : x.shape[-1]], bias).to(x.dtype)


@triton.jit
def _centred(v, zero, dtype: tl.constexpr, BY_FP32: tl.constexpr):
    """Nibbles [BLOCK_N, BLOCK_K / 2] minus zeros [BLOCK_N], exact."""
    if dtype == tl.float32:  # the interpreter, which computes no bf16
        return v.to(tl.float32) - zero.to(tl.float32)[:, None]
    elif dtype == tl.float16:
        constant = (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return (v.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - constant[:, None]
    elif BY_FP32:  # AMD has a conversion byte → fp32; whole numbers below 256 are cut to bf16 without loss
        difference = v.to(tl.float32) - zero.to(tl.float32)[:, None]
        return (difference.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        constant = (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return (v.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - constant[:, None]


@triton.jit
def _w4a16_tile_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, M, N, K, GROUP,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_GROUP: tl.constexpr, ZERO: tl.constexpr, BY_FP32: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype = tl.float32 if INTERPRET else x_ptr.dtype.element_ty
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)  # rows beyond the edge repeat the last: no masks
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    byte = tl.arange(0, BLOCK_K // 2)  # rows of K // 32 · 16 bytes: written so, the compiler sees that 16 divides
    low_k = byte // 16 * 32 + byte % 16  # element of the low nibble; the high one's is 16 further
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * per_split
    codes_ptr += n.to(tl.int64)[:, None] * (K // 32 * 16) + (byte + first // 2)[None, :]
    x_ptr += m.to(tl.int64)[None, :] * K + (low_k + first)[:, None]
    zero = tl.full([BLOCK_N], ZERO, tl.uint8)
    if ONE_GROUP and zeros_ptr is not None:
        zero = tl.load(zeros_ptr + n)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        if EVEN_K:
            codes = tl.load(codes_ptr)
            x_low, x_high = tl.load(x_ptr), tl.load(x_ptr + 16)
        else:  # K ends with a chunk of 32: the mask is one value for 16 neighbours, so loads stay wide
            inside = byte // 16 * 32 < K - k
            codes = tl.load(codes_ptr, mask=inside[None, :], other=0)
            x_low = tl.load(x_ptr, mask=inside[:, None], other=0.0)
            x_high = tl.load(x_ptr + 16, mask=inside[:, None], other=0.0)
        if not ONE_GROUP and zeros_ptr is not None:
            zero = tl.load(zeros_ptr + k // GROUP * N + n)
        low, high = _centred(codes & 15, zero, dtype, BY_FP32), _centred(codes >> 4, zero, dtype, BY_FP32)
        if ONE_GROUP:
            acc = tl.dot(low, x_low.to(dtype), acc)
            acc = tl.dot(high, x_high.to(dtype), acc)
        else:
            part = tl.dot(high, x_high.to(dtype), tl.dot(low, x_low.to(dtype)))
            acc += part * tl.load(scales_ptr + k // GROUP * N + n).to(tl.float32)[:, None]
        codes_ptr += BLOCK_K // 2
        x_ptr += BLOCK_K
    if not ONE_GROUP:
        scales_ptr = None
    store_tile(
        acc, out_ptr, bias_ptr, None, scales_ptr, tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
        tile_n * BLOCK_N + tl.arange(0, BLOCK_N), M, N, split, SPLIT_K, INTERPRET,
    )  # fmt: skip


@triton.jit
def _add_word(word, low, high, a0, a1, a2, a3, b0, b1, b2, b3):
    """8 nibbles v of a 32-bit word: Σ (1 + v / 256) · a of the low ones, Σ (1 + v / 16) · b of the high ones."""
    word = word.to(tl.uint32, bitcast=True)
    bits = word << 15
    low = tl.fma(((bits & 0x078000) | 0x3F800000).to(tl.float32, bitcast=True), a0, low)
    high = tl.fma(((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True), b0, high)
    bits = word << 7
    low = tl.fma(((bits & 0x078000) | 0x3F800000).to(tl.float32, bitcast=True), a1, low)
    high = tl.fma(((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True), b1, high)
    bits = word >> 1
    low = tl.fma(((bits & 0x078000) | 0x3F800000).to(tl.float32, bitcast=True), a2, low)
    high = tl.fma(((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True), b2, high)
    bits = word >> 9
    low = tl.fma(((bits & 0x078000) | 0x3F800000).to(tl.float32, bitcast=True), a3, low)
    high = tl.fma(((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True), b3, high)
    return low, high


@triton.jit
def _w4a16_row_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, N, K, GROUP,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLIT_K: tl.constexpr, ZERO: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    split = tl.program_id(1)
    num_units = K // 32
    per_split = tl.cdiv(tl.cdiv(num_units, UNITS), SPLIT_K) * UNITS
    first = split * per_split
    lanes = tl.arange(0, UNITS)
    words_ptr += (rows.to(tl.int64) * (num_units * 4))[:, None, None] + tl.arange(0, 4)[None, None, :]
    acc = tl.zeros([BLOCK_N, UNITS], tl.float32)
    for start in range(first, tl.minimum(first + per_split, num_units), UNITS):
        unit = start + lanes  # a thread's unit: 16 bytes of codes of each row, 32 elements of x
        inside = unit < num_units
        words = tl.load(
            words_ptr + unit[None, :, None] * 4, mask=inside[None, :, None], other=0, eviction_policy="evict_first"
        )
        even, odd = tl.split(tl.reshape(words, [BLOCK_N, UNITS, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        at = x_ptr + unit[:, None] * 32 + tl.arange(0, 8)[None, :]
        a0, a1, a2, a3, a4, a5, a6, a7, a_sum = load_8(at, inside, UNITS)
        low, high = tl.zeros([BLOCK_N, UNITS], tl.float32), tl.zeros([BLOCK_N, UNITS], tl.float32)
        b0, b1, b2, b3, b4, b5, b6, b7, b_sum = load_8(at + 16, inside, UNITS)
        low, high = _add_word(w0, low, high, a0, a1, a2, a3, b0, b1, b2, b3)
        low, high = _add_word(w1, low, high, a4, a5, a6, a7, b4, b5, b6, b7)
        a0, a1, a2, a3, a4, a5, a6, a7, more = load_8(at + 8, inside, UNITS)
        a_sum += more
        b0, b1, b2, b3, b4, b5, b6, b7, more = load_8(at + 24, inside, UNITS)
        b_sum += more
        low, high = _add_word(w2, low, high, a0, a1, a2, a3, b0, b1, b2, b3)
        low, high = _add_word(w3, low, high, a4, a5, a6, a7, b4, b5, b6, b7)
        group_at = (unit * 32 // GROUP)[None, :] * N + rows[:, None]
        zero = tl.full([BLOCK_N, UNITS], ZERO, tl.float32)
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + group_at, mask=inside[None, :], other=0).to(tl.float32)
        scale = tl.load(scales_ptr + group_at, mask=inside[None, :], other=0.0).to(tl.float32)
        acc += scale * (16.0 * (high - b_sum) + (256.0 * (low - a_sum) - zero * (a_sum + b_sum)))
    store_row(tl.sum(acc, axis=1), out_ptr, bias_ptr, n, N, split, SPLIT_K, INTERPRET)


def _operands(group: int) -> Operands:
    return Operands(w_bits=4, x_bits=16, max_block_k=largest_block_k(group))


def _heuristic(card: Card, *, m: int, n: int, k: int, group: int, dtype: str) -> MatmulLaunch:
    # Writing W takes 2.5 bytes a weight, 8e-13 s at 3 TB/s. Were this kernel at 50 % of the tensor cores' peak and
    # cuBLAS at 70 %, M · 1.2e-15 s a weight would be won: worth it from M = 700 on (H100's 989 TFLOP/s).
    how = matmul_heuristic(card, m, n, k, _operands(group))
    return replace(how, dequantize=1) if m >= FIRST_DEQUANTIZED_M else how


def _candidates(card: Card, *, m: int, n: int, k: int, group: int, dtype: str) -> list[MatmulLaunch]:
    tiles = matmul_candidates(card, m, n, k, _operands(group))
    return tiles + [replace(tiles[0], dequantize=1)] * (m > 64)


def _row_heuristic(card: Card, *, n: int, k: int, group: int, dtype: str) -> GemvLaunch:
    # a thread shares x among its rows: 8 take 128 registers and 4.6 instructions a weight, 4 take 80 and 5.2 (sm_90)
    return gemv_heuristic(card, n, k, CHUNK, most_rows=8 if card.backend == "cuda" else 4)


def _row_candidates(card: Card, *, n: int, k: int, group: int, dtype: str) -> list[GemvLaunch]:
    return gemv_candidates(card, n, k, CHUNK)


W4A16 = Tunable("matmul_w4a16", (_w4a16_tile_kernel,), MatmulLaunch, _heuristic, _candidates)
W4A16_ROW = Tunable("matmul_w4a16_row", (_w4a16_row_kernel,), GemvLaunch, _row_heuristic, _row_candidates)


def _launch_row(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int, out: Tensor
) -> None:
    card, (n, k) = card_of(x), (codes.shape[0], codes.shape[1] * 2)
    how = W4A16_ROW.resolve(card, n=n, k=k, group=group % k, dtype=dtype_name(x.dtype))
    parts = split_output(1, n, how.split_k, out, torch.float32)
    launch(
        _w4a16_row_kernel, how.grid(n),
        x, codes.view(torch.int32), scales, zeros, bias, parts, n, k, group, ZERO=SYMMETRIC_ZERO, **how.options(card),
    )  # fmt: skip
    finish(parts, out, bias, None, None, how.split_k)


def launch_matmul_w4a16(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Launch the kernels: the op on a GPU, and on a CPU under the interpreter."""
    n, k = codes.shape[0], codes.shape[1] * 2
    group, rows = k // scales.shape[0], rows_of(x, k)
    m, out = rows.shape[0], x.new_empty((rows.shape[0], n))
    codes, scales, zeros = codes.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    with on_device_of(x):
        if m == 1:
            _launch_row(rows, codes, scales, zeros, bias, group, out)
        elif m:
            card = card_of(x)
            how = W4A16.resolve(
                card, m=next_power_of_2(m), n=n, k=k, group=group % k, dtype=dtype_name(x.dtype)
            )  # fmt: skip
            if how.dequantize:
                w = launch_dequantize_weight(codes, scales, zeros, x.dtype)
                out = linear(rows, w, bias)
            else:
                parts = split_output(m, n, how.split_k, out, torch.float32)
                launch(
                    _w4a16_tile_kernel, how.grid(m, n),
                    rows, codes, scales, zeros, bias, parts, m, n, k, group, ONE_GROUP=group == k, ZERO=SYMMETRIC_ZERO,
                    BY_FP32=card.backend == "hip", **how.options(k),
                )  # fmt: skip
                finish(parts, out, bias, None, scales if group == k else None, how.split_k)
    return out.view(*x.shape[:-1], n)


def _shape(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


register(
    "matmul_w4a16(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
    launch_matmul_w4a16,
    _shape,
    matmul_w4a16_reference,
)


def matmul_w4a16(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x · Wᵀ + bias for a 4-bit W; differentiable in x and bias, not twice.

    Args:
        x: (..., K) fp16 or bf16, any strides; on a CPU fp32 too.
        codes: (N, K / 2) uint8, from ``packing.pack_w4``, ``from_gptq`` or ``from_awq``; K there padded.
        scales: (G, N) fp16, bf16 or fp32.
        zeros: (G, N) uint8, or None for 8 everywhere.
        bias: (N,) any float, or None.

    Returns:
        (..., N) in x's type, contiguous.

    Raises:
        ValueError: types, shapes or devices that do not fit.
    """
    reference = takes_reference(x)
    wide = SCALE_DTYPES
    check_types(
        "matmul_w4a16",
        x=(x, wide if reference else WIDE_DTYPES),
        codes=(codes, (torch.uint8,)),
        scales=(scales, wide),
        zeros=(zeros, (torch.uint8,)),
        bias=(bias, wide),
    )
    check_shapes("matmul_w4a16", x, codes.shape[0], codes.shape[1] * 2, scales, zeros, bias)
    if reference:
        return matmul_w4a16_reference(x, codes, scales, zeros, bias)
    ops = torch.ops.tritonspeed
    return product_of(ops.matmul_w4a16, ops.dequantize_weight, x, bias, (codes, scales, zeros))
