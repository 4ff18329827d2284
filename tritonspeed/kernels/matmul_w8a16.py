"""Product of 16-bit activations with 8-bit weights, for inference.

    y[m, n] = Σ_k x[m, k] · q[n, k] · s[g, n] + bias[n]                              g = k div group

    dL/dx = dL/dy · W                                                       W as ``packing.values_reference`` has it

Shapes   x: (..., K); codes: (N, K); scales: (G, N); bias: (N,); y: (..., N)
Types    x, y fp16 or bf16; codes int8; scales fp16, bf16 or fp32; bias any float; sums fp32
Bytes    N · K + N · G · itemsize(s) + 2 · M · (K + N); the splits of K add 8 · S · M · N
Flops    2 · M · N · K
Source   layout and formats: packing.py. Splits of K: Hoque et al. 2024, arXiv:2402.00025
Roof     not measured yet

int8 is exact in fp16 and bf16, and the scale is applied to the fp32 sum, so W is never rounded. One row takes no tensor
core: a thread reads 16 bytes, and a byte u = q + 128 is put into the mantissa of 1 + u / 256, so that a weight costs a
shift, a logic operation and a multiply-add where a conversion would run at a quarter of their rate: 6.2 instructions
with all else, where an H100 issues 8.8 in the time in which its memory delivers a weight. Many rows go to
cuBLAS over W written as floats, as in ``matmul_w4a16``; where from on is a guess until it is measured.
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
from tritonspeed.kernels.packing import SCALE_DTYPES, values_reference
from tritonspeed.kernels.tuned import Tunable, dtype_name, next_power_of_2

UNIT = 16  # weights that a thread loads at once
FIRST_DEQUANTIZED_M = 1024  # bucket of M from which cuBLAS is asked; an estimate, see ``_heuristic``


def matmul_w8a16_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The maths above: W dequantised in fp32 (fp64 for fp64), multiplied in it, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return linear(x, values_reference(codes, scales, None, wide)[:, : x.shape[-1]], bias).to(x.dtype)


@triton.jit
def _w8a16_tile_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, M, N, K, GROUP,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype = tl.float32 if INTERPRET else x_ptr.dtype.element_ty  # the interpreter computes no bf16
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)  # rows beyond the edge repeat the last: no masks
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    at_k = tl.arange(0, BLOCK_K)
    per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * per_split
    # K is a multiple of 32; written K // 32 · 32, the compiler sees it, and loads are 16 bytes wide
    codes_ptr += n.to(tl.int64)[:, None] * (K // 32 * 32) + (at_k + first)[None, :]
    x_ptr += m.to(tl.int64)[None, :] * (K // 32 * 32) + (at_k + first)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        if EVEN_K:
            codes, x = tl.load(codes_ptr), tl.load(x_ptr)
        else:  # one value of the mask for 16 neighbours: loads stay wide
            inside = at_k // 16 * 16 < K - k
            codes = tl.load(codes_ptr, mask=inside[None, :], other=0)
            x = tl.load(x_ptr, mask=inside[:, None], other=0.0)
        if ONE_GROUP:
            acc = tl.dot(codes.to(dtype), x.to(dtype), acc)
        else:
            scale = tl.load(scales_ptr + k // GROUP * N + n).to(tl.float32)
            acc += tl.dot(codes.to(dtype), x.to(dtype)) * scale[:, None]
        codes_ptr += BLOCK_K
        x_ptr += BLOCK_K
    if not ONE_GROUP:
        scales_ptr = None
    store_tile(
        acc, out_ptr, bias_ptr, None, scales_ptr, tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
        tile_n * BLOCK_N + tl.arange(0, BLOCK_N), M, N, split, SPLIT_K, INTERPRET,
    )  # fmt: skip


@triton.jit
def _add_word(word, acc, x0, x1, x2, x3):
    """4 bytes u = q + 128 of a 32-bit word: Σ (1 + u / 256) · x."""
    word = word.to(tl.uint32, bitcast=True) ^ 0x80808080
    acc = tl.fma((((word << 15) & 0x7F8000) | 0x3F800000).to(tl.float32, bitcast=True), x0, acc)
    acc = tl.fma((((word << 7) & 0x7F8000) | 0x3F800000).to(tl.float32, bitcast=True), x1, acc)
    acc = tl.fma((((word >> 1) & 0x7F8000) | 0x3F800000).to(tl.float32, bitcast=True), x2, acc)
    return tl.fma((((word >> 9) & 0x7F8000) | 0x3F800000).to(tl.float32, bitcast=True), x3, acc)


@triton.jit
def _w8a16_row_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, N, K, GROUP,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    split = tl.program_id(1)
    num_units = K // 16
    per_split = tl.cdiv(tl.cdiv(num_units, UNITS), SPLIT_K) * UNITS
    first = split * per_split
    lanes = tl.arange(0, UNITS)
    words_ptr += (rows.to(tl.int64) * (num_units * 4))[:, None, None] + tl.arange(0, 4)[None, None, :]
    acc = tl.zeros([BLOCK_N, UNITS], tl.float32)
    for start in range(first, tl.minimum(first + per_split, num_units), UNITS):
        unit = start + lanes  # a thread's unit: 16 bytes of codes of each row, 16 elements of x
        inside = unit < num_units
        words = tl.load(
            words_ptr + unit[None, :, None] * 4, mask=inside[None, :, None], other=0, eviction_policy="evict_first"
        )
        even, odd = tl.split(tl.reshape(words, [BLOCK_N, UNITS, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        at = x_ptr + unit[:, None] * 16 + tl.arange(0, 8)[None, :]
        x0, x1, x2, x3, x4, x5, x6, x7, total = load_8(at, inside, UNITS)
        part = _add_word(w0, tl.zeros([BLOCK_N, UNITS], tl.float32), x0, x1, x2, x3)
        part = _add_word(w1, part, x4, x5, x6, x7)
        x0, x1, x2, x3, x4, x5, x6, x7, more = load_8(at + 8, inside, UNITS)
        part = _add_word(w2, part, x0, x1, x2, x3)
        part = _add_word(w3, part, x4, x5, x6, x7)
        group_at = (unit * 16 // GROUP)[None, :] * N + rows[:, None]
        scale = tl.load(scales_ptr + group_at, mask=inside[None, :], other=0.0).to(tl.float32)
        acc += scale * (256.0 * (part - 1.5 * (total + more)))
    store_row(tl.sum(acc, axis=1), out_ptr, bias_ptr, n, N, split, SPLIT_K, INTERPRET)


def _operands(group: int) -> Operands:
    return Operands(w_bits=8, x_bits=16, max_block_k=largest_block_k(group))


def _heuristic(card: Card, *, m: int, n: int, k: int, group: int, dtype: str) -> MatmulLaunch:
    # Writing W takes 3 bytes a weight, 1e-12 s at 3 TB/s. Were this kernel at 50 % of the tensor cores' peak and
    # cuBLAS at 70 %, M · 1.2e-15 s a weight would be won: worth it from M = 860 on (H100's 989 TFLOP/s).
    how = matmul_heuristic(card, m, n, k, _operands(group))
    return replace(how, dequantize=1) if m >= FIRST_DEQUANTIZED_M else how


def _candidates(card: Card, *, m: int, n: int, k: int, group: int, dtype: str) -> list[MatmulLaunch]:
    tiles = matmul_candidates(card, m, n, k, _operands(group))
    return tiles + [replace(tiles[0], dequantize=1)] * (m > 64)


def _row_heuristic(card: Card, *, n: int, k: int, group: int, dtype: str) -> GemvLaunch:
    return gemv_heuristic(card, n, k, UNIT)


def _row_candidates(card: Card, *, n: int, k: int, group: int, dtype: str) -> list[GemvLaunch]:
    return gemv_candidates(card, n, k, UNIT)


W8A16 = Tunable("matmul_w8a16", (_w8a16_tile_kernel,), MatmulLaunch, _heuristic, _candidates)
W8A16_ROW = Tunable("matmul_w8a16_row", (_w8a16_row_kernel,), GemvLaunch, _row_heuristic, _row_candidates)


def _launch_row(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, out: Tensor) -> None:
    card, (n, k) = card_of(x), (codes.shape[0], codes.shape[1])
    how = W8A16_ROW.resolve(card, n=n, k=k, group=group % k, dtype=dtype_name(x.dtype))
    parts = split_output(1, n, how.split_k, out, torch.float32)
    launch(
        _w8a16_row_kernel, how.grid(n),
        x, codes.view(torch.int32), scales, bias, parts, n, k, group, **how.options(card),
    )  # fmt: skip
    finish(parts, out, bias, None, None, how.split_k)


def launch_matmul_w8a16(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernels: the op on a GPU, and on a CPU under the interpreter."""
    n, k = codes.shape[0], codes.shape[1]
    group, rows = k // scales.shape[0], rows_of(x, k)
    m, out = rows.shape[0], x.new_empty((rows.shape[0], n))
    codes, scales = codes.contiguous(), scales.contiguous()
    with on_device_of(x):
        if m == 1:
            _launch_row(rows, codes, scales, bias, group, out)
        elif m:
            card = card_of(x)
            how = W8A16.resolve(
                card, m=next_power_of_2(m), n=n, k=k, group=group % k, dtype=dtype_name(x.dtype)
            )  # fmt: skip
            if how.dequantize:
                w = launch_dequantize_weight(codes, scales, None, x.dtype)
                out = linear(rows, w, bias)
            else:
                parts = split_output(m, n, how.split_k, out, torch.float32)
                launch(
                    _w8a16_tile_kernel, how.grid(m, n),
                    rows, codes, scales, bias, parts, m, n, k, group, ONE_GROUP=group == k, **how.options(k),
                )  # fmt: skip
                finish(parts, out, bias, None, scales if group == k else None, how.split_k)
    return out.view(*x.shape[:-1], n)


def _shape(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


register(
    "matmul_w8a16(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
    launch_matmul_w8a16,
    _shape,
    matmul_w8a16_reference,
)


def matmul_w8a16(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias for an 8-bit W; differentiable in x and bias, not twice.

    Args:
        x: (..., K) fp16 or bf16, any strides; on a CPU fp32 too.
        codes: (N, K) int8, from ``packing.pack_w8``; K there padded.
        scales: (G, N) fp16, bf16 or fp32.
        bias: (N,) any float, or None.

    Returns:
        (..., N) in x's type, contiguous.

    Raises:
        ValueError: types, shapes or devices that do not fit.
    """
    reference = takes_reference(x)
    wide = SCALE_DTYPES
    check_types(
        "matmul_w8a16",
        x=(x, wide if reference else WIDE_DTYPES),
        codes=(codes, (torch.int8,)),
        scales=(scales, wide),
        bias=(bias, wide),
    )
    check_shapes("matmul_w8a16", x, codes.shape[0], codes.shape[1], scales, None, bias)
    if reference:
        return matmul_w8a16_reference(x, codes, scales, bias)
    ops = torch.ops.tritonspeed

    def values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_weight(codes, scales, None, dtype)

    return product_of(ops.matmul_w8a16, values, x, bias, (codes, scales))
