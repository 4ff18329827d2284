"""Product of 8-bit activations with 8-bit weights: int8, or fp8 (e4m3); one scale a row of either.

    y[m, n] = s_x[m] · s_w[n] · Σ_k x[m, k] · q[n, k] + bias[n]

Shapes   x: (..., K); x_scales: (...) or (..., 1); codes: (N, K); scales: (1, N); bias: (N,); y: (..., N)
Types    x and codes both int8 or both float8_e4m3fn; x_scales fp32; scales, bias any float; y fp16, bf16 or fp32;
         sums int32 (exact for K < 2¹⁷) or fp32
Bytes    N · K + M · K + M · N · itemsize(y) + 4 · (M + N); the splits of K add 8 · S · M · N
Flops    2 · M · N · K
Source   Dettmers et al. 2022, arXiv:2208.07339 (scales by row); Micikevicius et al. 2022, arXiv:2209.05433 (e4m3)
Roof     not measured yet

fp8 has three ways, chosen by the card:

- e4m3 tensor cores: sm_89 and later, gfx950. Hopper's add up in 14 bits, so sums move to fp32 after each block of K.
- gfx942's are e4m3fnuz: the same bits mean half as much, 0x80 is NaN in place of −0 and 0x7F is a number in place of
  NaN. The weight has no −0 (``packing.pack_fp8``), the activations' is cleared and their NaN renamed on the way.
- elsewhere the bits are shifted into fp16, times 2⁸: exact, but at fp16's speed.

One row takes no tensor core; a weight's bits are shifted into fp32, where they mean 2⁻¹²⁰ of it, and x is lifted in
exchange.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import card_of, launch, on_device_of, takes_reference, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.matmul_call import check_shapes, check_types, linear, rows_of
from tritonspeed.kernels.matmul_tiles import (
    GemvLaunch,
    MatmulLaunch,
    Operands,
    finish,
    gemv_candidates,
    gemv_heuristic,
    matmul_candidates,
    matmul_heuristic,
    split_output,
    store_row,
    store_tile,
    tile_of,
)
from tritonspeed.kernels.packing import SCALE_DTYPES
from tritonspeed.kernels.tuned import Tunable, dtype_name, next_power_of_2

UNIT = 16  # weights that a thread loads at once
OPERANDS = Operands(w_bits=8, x_bits=8, max_block_k=128)
CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)
INT8, E4M3, E4M3_FNUZ, E4M3_BY_FP16 = range(4)  # how a tile is multiplied


def way_of(card: Card, dtype: torch.dtype) -> int:
    """How a card multiplies tiles of this type."""
    if dtype == torch.int8:
        return INT8
    if card.arch == "gfx942":
        return E4M3_FNUZ
    return E4M3 if card.compute_capability >= 89 or card.arch == "gfx950" else E4M3_BY_FP16


def matmul_w8a8_reference(
    x: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The maths above, the sum in fp64, where it is exact for int8; scaled in fp32 (fp64 for fp64), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = linear(x, codes[:, : x.shape[-1]].double(), None).to(wide)
    y = total * scales[0].to(wide) * x_scales.reshape(*x.shape[:-1], 1).to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype)


@triton.jit
def _fp16_of_e4m3(bits):
    """e4m3 as uint8 → fp16: the exponent's bias grows from 7 to 15, which 2⁸ makes up for."""
    bits = bits.to(tl.uint16)
    value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _add_product(codes, x, acc, WAY: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + codes · x, bits as uint8."""
    if WAY == 0:
        return tl.dot(codes.to(tl.int8, bitcast=True), x.to(tl.int8, bitcast=True), acc, out_dtype=tl.int32)
    elif WAY == 1:
        w, x = codes.to(tl.float8e4nv, bitcast=True), x.to(tl.float8e4nv, bitcast=True)
        return tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
    elif WAY == 2:
        x = tl.where((x & 0x7F) == 0x7F, 0x80, tl.where(x == 0x80, 0, x)).to(tl.uint8)
        return tl.dot(codes.to(tl.float8e4b8, bitcast=True), x.to(tl.float8e4b8, bitcast=True), acc)
    else:
        return tl.dot(_fp16_of_e4m3(codes), _fp16_of_e4m3(x), acc)


@triton.jit
def _w8a8_tile_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, WAY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
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
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if WAY == 0 else tl.float32)
    for k in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        if EVEN_K:
            codes, x = tl.load(codes_ptr), tl.load(x_ptr)
        else:  # one value of the mask for 16 neighbours: loads stay wide
            inside = at_k // 16 * 16 < K - k
            codes = tl.load(codes_ptr, mask=inside[None, :], other=0)
            x = tl.load(x_ptr, mask=inside[:, None], other=0)
        acc = _add_product(codes, x, acc, WAY, BLOCK_K)
        codes_ptr += BLOCK_K
        x_ptr += BLOCK_K
    if WAY == 2:
        acc *= 4.0
    store_tile(
        acc, out_ptr, bias_ptr, x_scales_ptr, scales_ptr, tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
        tile_n * BLOCK_N + tl.arange(0, BLOCK_N), M, N, split, SPLIT_K, INTERPRET,
    )  # fmt: skip


@triton.jit
def _fp32_of_e4m3(word, SHIFT: tl.constexpr):
    """The byte that SHIFT moves to the top of a word, as e4m3 · 2⁻¹²⁰: sign and exponent slide in fp32's places."""
    return (((word << SHIFT) >> 4) & -0x78100000).to(tl.float32, bitcast=True)  # 0x87F00000


@triton.jit
def _lifted_e4m3(word, SHIFT: tl.constexpr):
    """The same byte as e4m3 · 2¹¹⁸, NaN where it is NaN."""
    x = _fp32_of_e4m3(word, SHIFT) * 1.329227995784916e36 * 3.323069989462290e35  # 2¹²⁰, 2¹¹⁸
    return tl.where(((word << SHIFT) & 0x7F000000) == 0x7F000000, float("nan"), x)


@triton.jit
def _w8a8_row_kernel(
    x_ptr, x_scales_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, N, K,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLIT_K: tl.constexpr, FP8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    split = tl.program_id(1)
    num_units = K // 16
    per_split = tl.cdiv(tl.cdiv(num_units, UNITS), SPLIT_K) * UNITS
    first = split * per_split
    lanes = tl.arange(0, UNITS)
    four = tl.arange(0, 4)[None, None, :]
    words_ptr += (rows.to(tl.int64) * (num_units * 4))[:, None, None] + four
    acc = tl.zeros([BLOCK_N, UNITS, 4], tl.float32 if FP8 else tl.int32)
    for start in range(first, tl.minimum(first + per_split, num_units), UNITS):
        unit = (start + lanes)[None, :, None] * 4  # a thread's unit: 16 bytes, 4 words, of each row and of x
        inside = (start + lanes < num_units)[None, :, None]
        w = tl.load(words_ptr + unit, mask=inside, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptr + unit + four, mask=inside, other=0)
        if FP8:
            acc = tl.fma(_fp32_of_e4m3(w, 24), _lifted_e4m3(x, 24), acc)
            acc = tl.fma(_fp32_of_e4m3(w, 16), _lifted_e4m3(x, 16), acc)
            acc = tl.fma(_fp32_of_e4m3(w, 8), _lifted_e4m3(x, 8), acc)
            acc = tl.fma(_fp32_of_e4m3(w, 0), _lifted_e4m3(x, 0), acc)
        else:
            acc += (w << 24 >> 24) * (x << 24 >> 24) + (w << 16 >> 24) * (x << 16 >> 24)
            acc += (w << 8 >> 24) * (x << 8 >> 24) + (w >> 24) * (x >> 24)
    total = tl.sum(tl.sum(acc, axis=2), axis=1)
    if FP8:
        total *= 4.0  # 2⁻¹²⁰ · 2¹¹⁸
    if SPLIT_K == 1:
        scale = tl.load(scales_ptr + rows).to(tl.float32)
        total = total.to(tl.float32) * scale * tl.load(x_scales_ptr)
    store_row(total, out_ptr, bias_ptr, n, N, split, SPLIT_K, INTERPRET)


def _heuristic(card: Card, *, m: int, n: int, k: int, codes: str) -> MatmulLaunch:
    return matmul_heuristic(card, m, n, k, OPERANDS)


def _candidates(card: Card, *, m: int, n: int, k: int, codes: str) -> list[MatmulLaunch]:
    return matmul_candidates(card, m, n, k, OPERANDS)


def _row_heuristic(card: Card, *, n: int, k: int, codes: str) -> GemvLaunch:
    return gemv_heuristic(card, n, k, UNIT)


def _row_candidates(card: Card, *, n: int, k: int, codes: str) -> list[GemvLaunch]:
    return gemv_candidates(card, n, k, UNIT)


W8A8 = Tunable("matmul_w8a8", (_w8a8_tile_kernel,), MatmulLaunch, _heuristic, _candidates)
W8A8_ROW = Tunable("matmul_w8a8_row", (_w8a8_row_kernel,), GemvLaunch, _row_heuristic, _row_candidates)


@dataclass(frozen=True, slots=True)
class _Product:
    """The operands of one call, contiguous, with the padding."""

    x: Tensor
    x_scales: Tensor
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    out: Tensor


def _launch_row(product: _Product, card: Card) -> None:
    n, k = product.codes.shape
    how = W8A8_ROW.resolve(card, n=n, k=k, codes=dtype_name(product.codes.dtype))
    is_fp8 = product.codes.dtype != torch.int8
    parts = split_output(1, n, how.split_k, product.out, torch.float32 if is_fp8 else torch.int32)
    launch(
        _w8a8_row_kernel, how.grid(n),
        product.x.view(torch.int32), product.x_scales, product.codes.view(torch.int32), product.scales, product.bias,
        parts, n, k, FP8=is_fp8, **how.options(card),
    )  # fmt: skip
    finish(parts, product.out, product.bias, product.x_scales, product.scales, how.split_k)


def _launch_tiles(product: _Product, card: Card) -> None:
    (m, k), n, way = product.x.shape, product.codes.shape[0], way_of(card, product.codes.dtype)
    how = W8A8.resolve(card, m=next_power_of_2(m), n=n, k=k, codes=dtype_name(product.codes.dtype))
    parts = split_output(m, n, how.split_k, product.out, torch.int32 if way == INT8 else torch.float32)
    launch(
        _w8a8_tile_kernel, how.grid(m, n),
        product.x.view(torch.uint8), product.x_scales, product.codes.view(torch.uint8), product.scales, product.bias,
        parts, m, n, k, WAY=way, **how.options(k),
    )  # fmt: skip
    finish(parts, product.out, product.bias, product.x_scales, product.scales, how.split_k)


def launch_matmul_w8a8(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Launch the kernels: the op on a GPU, and on a CPU under the interpreter."""
    n, k = codes.shape
    rows = rows_of(x.view(torch.int8), k).view(x.dtype)
    out = rows.new_empty((rows.shape[0], n), dtype=dtype)
    product = _Product(rows, x_scales.reshape(-1).contiguous(), codes.contiguous(), scales.contiguous(), bias, out)
    with on_device_of(x):
        if rows.shape[0] == 1:
            _launch_row(product, card_of(x))
        elif rows.shape[0]:
            _launch_tiles(product, card_of(x))
    return out.view(*x.shape[:-1], n)


def _shape(
    x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=dtype)


register(
    "matmul_w8a8(Tensor x, Tensor x_scales, Tensor codes, Tensor scales, Tensor? bias, ScalarType dtype) -> Tensor",
    launch_matmul_w8a8,
    _shape,
    matmul_w8a8_reference,
)


def matmul_w8a8(
    x: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """x · Wᵀ + bias for 8-bit x and W; codes carry no gradient.

    Args:
        x: (..., K) int8 or float8_e4m3fn, from ``quantize`` with one group a row.
        x_scales: (...) or (..., 1) fp32, one for each row of x; NaN marks a row that had no finite scale.
        codes: (N, K) of x's type, from ``packing.pack_w8`` (without groups) or ``pack_fp8``; K there padded.
        scales: (1, N) fp16, bf16 or fp32.
        bias: (N,) any float, or None.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        (..., N) in dtype, contiguous.

    Raises:
        ValueError: types, shapes or devices that do not fit.
    """
    check_types(
        "matmul_w8a8",
        x=(x, CODE_DTYPES),
        x_scales=(x_scales, (torch.float32,)),
        codes=(codes, (x.dtype,)),
        scales=(scales, SCALE_DTYPES),
        bias=(bias, SCALE_DTYPES),
    )
    check_shapes("matmul_w8a8", x, codes.shape[0], codes.shape[1], scales, None, bias)
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"matmul_w8a8: dtype is {dtype}, must be float16, bfloat16 or float32")
    if scales.shape[0] != 1 or x_scales.shape not in (x.shape[:-1], (*x.shape[:-1], 1)):
        raise ValueError(
            f"matmul_w8a8: scales {tuple(scales.shape)} must be (1, N) and x_scales {tuple(x_scales.shape)}"
            f" {tuple(x.shape[:-1])} with or without a last 1: one scale a row, as groups would break the integer sum"
        )
    if takes_reference(x):
        return matmul_w8a8_reference(x, x_scales, codes, scales, bias, dtype)
    return torch.ops.tritonspeed.matmul_w8a8(x, x_scales, codes, scales, bias, dtype)
