"""Codes: how a quantised value is written, and what a quantised tensor is.

    symmetric      s = max|x| / c         q = round(x / s)                 x ≈ q · s              c = 127, 7 or 448
    with offset    s = (max − min) / c    q = round((x − min) / s)         x ≈ q · s + min        c = 255 or 15

A group is ``group_size`` consecutive elements of the last axis. A group of zeros has scale 1. Rounding is to nearest
even; fp8 is e4m3 without infinities, made by integer arithmetic, so that cards without fp8 instructions and the
interpreter give the same codes. The scale of a group that holds a NaN or an infinity is NaN: an overflow stays visible
after dequantising.

int4: byte j of a group holds element j in its low nibble and element j + ⌈g / 2⌉ in its high one, so that both halves
are read and written as whole words.

Source   Dettmers et al. 2022, arXiv:2208.07339 (absmax); Micikevicius et al. 2022, arXiv:2209.05433 (e4m3)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._triton import tl, triton
from tritonspeed.kernels.rounding import store


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of code: its bits, and c in the maths above."""

    bits: int
    c_symmetric: float
    c_offset: float | None
    dtype: torch.dtype

    def num_codes(self, group_size: int) -> int:
        """Bytes of a group's codes."""
        return -(-group_size * self.bits // 8)


FORMATS = {
    "int8": Format(8, 127.0, 255.0, torch.int8),
    "int4": Format(4, 7.0, 15.0, torch.uint8),
    "fp8": Format(8, 448.0, None, torch.float8_e4m3fn),
}
MAX_TILE_GROUP = 4096  # longest group that is held in registers, a power of two; any other is read twice


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised tensor.

    Attributes:
        codes: int8 (symmetric), uint8 (int4, or with offset) or float8_e4m3fn.
        scales: (..., N / group_size) fp32.
        offsets: like scales, the groups' smallest values; None where quantisation is symmetric.
        format: "int8", "int4" or "fp8".
        group_size: elements of a group.
        shape: of what was quantised.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    format: str
    group_size: int
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        """What it takes in memory or on a wire."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)


def e4m3_bits_reference(x: Tensor) -> Tensor:
    """|x| ≤ 448 fp32 → e4m3's bits, to nearest even, as uint8; NaN → 0x7F."""
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


@triton.jit
def e4m3_bits(x):
    """fp32, |x| ≤ 448 → e4m3's bits as uint32. What is below 2⁻⁶ is a multiple of 2⁻⁹: adding 2²³ rounds to it."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    steps = magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    subnormal = steps.to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return tl.where(x == x, sign | code, 0x7F)


@triton.jit
def from_e4m3_bits(code):
    """e4m3's bits → fp32."""
    code = code.to(tl.uint32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    subnormal = magnitude.to(tl.float32) * 0.001953125
    x = tl.where(magnitude < 8, subnormal, normal)
    x = tl.where(magnitude == 0x7F, float("nan"), x)
    return tl.where(code > 0x7F, -x, x)


@triton.jit
def encode(x, low, scale, FP8: tl.constexpr):
    """fp32 values of a group → codes as uint8, in two's complement where they are signed."""
    if low is not None:
        x = x - low
    x = tl.div_rn(x, scale)
    if FP8:
        code = e4m3_bits(x)
    else:
        whole = (x + 12582912.0) - 12582912.0  # adding 1.5 · 2²³ rounds to nearest even
        code = tl.where(x == x, whole, 0.0).to(tl.int32)
    return code.to(tl.uint8)


@triton.jit
def decode(code, low, scale, BITS: tl.constexpr, FP8: tl.constexpr):
    """Codes as uint8, one each → fp32 values."""
    if FP8:
        x = from_e4m3_bits(code)
    elif low is not None:
        x = code.to(tl.float32)
    elif BITS == 4:
        nibble = code.to(tl.int32)
        x = tl.where(nibble > 7, nibble - 16, nibble).to(tl.float32)
    else:
        x = code.to(tl.int8, bitcast=True).to(tl.float32)
    x = x * scale
    if low is not None:
        x = x + low
    return x


@triton.jit
def scale_of(spread, is_bad, c):
    """A group's scale from its spread; NaN where the group holds something that is not finite."""
    scale = tl.where(spread == 0.0, 1.0, tl.div_rn(spread, c))
    return tl.where(is_bad, float("nan"), scale)


@triton.jit
def not_finite(x):
    """[GROUPS, n] → [GROUPS]: whether a NaN or an infinity is in there."""
    return tl.max((x - x != 0.0).to(tl.int32), axis=1) > 0  # tl.max alone may pass over a NaN


@triton.jit
def encode_tile(
    first, second, at, codes_ptr, scales_ptr, offsets_ptr, groups, inside, c, BITS: tl.constexpr, FP8: tl.constexpr
):
    """Scales and codes of a tile of groups, its high half ``second`` apart where codes are nibbles."""
    bad = not_finite(first)
    low = None
    if offsets_ptr is None:
        spread = tl.max(tl.abs(first), axis=1)
        if BITS == 4:
            spread = tl.maximum(spread, tl.max(tl.abs(second), axis=1))
            bad = bad | not_finite(second)
    else:
        smallest, largest = tl.min(first, axis=1), tl.max(first, axis=1)
        if BITS == 4:
            smallest = tl.minimum(smallest, tl.min(second, axis=1))
            largest = tl.maximum(largest, tl.max(second, axis=1))
            bad = bad | not_finite(second)
        spread = largest - smallest
        tl.store(offsets_ptr + groups, smallest, mask=inside)
        low = smallest[:, None]
    scale = scale_of(spread, bad | (spread - spread != 0.0), c)
    tl.store(scales_ptr + groups, scale, mask=inside)
    code = encode(first, low, scale[:, None], FP8)
    if BITS == 4:
        code = (code & 15) | (encode(second, low, scale[:, None], FP8) << 4)
    store(codes_ptr + at, code, inside[:, None])
