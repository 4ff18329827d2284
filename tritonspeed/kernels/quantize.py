"""Quantise: int8, int4 or fp8 codes with one scale per group of a row. The maths and the codes stand in ``codes.py``.

Shapes   x: (..., N); codes: (..., N) or (..., N / g · ⌈g / 2⌉) for int4; scales, offsets: (..., N / g), g a group
Types    x fp32, bf16, fp16: bf16 natively, no detour over fp16, whose range gradients leave; arithmetic fp32
Bytes    n · (itemsize(x) + bits / 8) + 4 n / g; groups beyond ``MAX_TILE_GROUP`` read x twice, the second time cached
Flops    4 n
Roof     not measured yet
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.codes import (
    FORMATS,
    MAX_TILE_GROUP,
    Quantized,
    e4m3_bits_reference,
    encode,
    encode_tile,
    scale_of,
)
from tritonspeed.kernels.tuned import Tunable, dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_BLOCK = 2048  # elements that a program of the kernel for long groups holds at a time
GROUP_THREADS = 256


def quantize_reference(x: Tensor, format: str, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The maths above in PyTorch, x (rows, N) → (codes, scales (rows, N / g), offsets; empty where symmetric)."""
    kind = FORMATS[format]
    groups = x.float().reshape(x.shape[0], -1, group_size)
    if symmetric:
        low, spread, c = None, groups.abs().amax(-1), kind.c_symmetric
    else:
        assert kind.c_offset is not None, f"{format} has no offset"
        low, c = groups.amin(-1), kind.c_offset
        spread = groups.amax(-1) - low
    scales = torch.where(spread == 0, 1.0, spread / c)
    scales = torch.where(spread.isfinite(), scales, torch.nan)
    scaled = (groups if low is None else groups - low[..., None]) / scales[..., None]
    if format == "fp8":
        codes = e4m3_bits_reference(scaled)
    else:
        whole = torch.nan_to_num(scaled).round()
        codes = whole.to(torch.int8).view(torch.uint8) if symmetric else whole.to(torch.uint8)
    if kind.bits == 4:
        half = -(-group_size // 2)
        padded = torch.nn.functional.pad(codes, (0, 2 * half - group_size)) & 15
        codes = padded[..., :half] | (padded[..., half:] << 4)
    return codes.flatten(1), scales, torch.empty(0) if low is None else low


@triton.jit(do_not_specialize=["num_groups"])
def _quantize_tile_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, num_groups, c,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = GROUP * BITS // 8  # bytes of a group's codes
    c = tl.cast(c, tl.float32)
    start = tl.program_id(0).to(tl.int64) * GROUPS
    groups = tl.arange(0, GROUPS)
    inside = groups < num_groups - start
    columns = tl.arange(0, WORDS)[None, :]
    x_ptr += start * GROUP
    at = groups[:, None] * GROUP + columns
    # the mask is one value along a group, so that a group's accesses stay whole words
    first = tl.load(x_ptr + at, mask=inside[:, None], other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = first
    if BITS == 4:
        second = tl.load(x_ptr + WORDS + at, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        second = second.to(tl.float32)
    if offsets_ptr is not None:
        offsets_ptr += start
    encode_tile(
        first, second, groups[:, None] * WORDS + columns, codes_ptr + start * WORDS, scales_ptr + start, offsets_ptr,
        groups, inside, c, BITS, FP8,
    )  # fmt: skip


@triton.jit
def _quantize_group_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, group_size, c,
    BLOCK: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A group of any length, read twice: for its scale, then (from the cache) for its codes."""
    c = tl.cast(c, tl.float32)
    group = tl.program_id(0).to(tl.int64)
    x_ptr += group * group_size
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    whole = group_size // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        x = tl.load(x_ptr + at + columns, eviction_policy="evict_last").to(tl.float32)
        largest, smallest = tl.maximum(largest, x), tl.minimum(smallest, x)
        bad = bad | (x - x != 0.0).to(tl.int32)
    if whole < group_size:
        inside = columns < group_size - whole
        x = tl.load(x_ptr + whole + columns, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(inside, x, float("inf")))
        bad = bad | (x - x != 0.0).to(tl.int32)
    top, bottom = tl.max(largest, axis=0), tl.min(smallest, axis=0)
    low = None
    if offsets_ptr is None:
        spread = tl.maximum(tl.abs(top), tl.abs(bottom))
    else:
        spread, low = top - bottom, bottom
        tl.store(offsets_ptr + group, bottom)
    scale = scale_of(spread, (tl.max(bad, axis=0) > 0) | (spread - spread != 0.0), c)
    tl.store(scales_ptr + group, scale)
    num_codes = group_size if BITS == 8 else (group_size + 1) // 2
    codes_ptr += group * num_codes
    for at in range(0, num_codes, BLOCK):
        inside = at + columns < num_codes
        x = tl.load(x_ptr + at + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        code = encode(x, low, scale, FP8)
        if BITS == 4:
            partner = at + columns + num_codes
            x = tl.load(x_ptr + partner, mask=partner < group_size, other=0.0, eviction_policy="evict_first")
            high = tl.where(partner < group_size, encode(x.to(tl.float32), low, scale, FP8), 0)
            code = (code & 15) | (high << 4).to(tl.uint8)
        tl.store(codes_ptr + at + columns, code, mask=inside)


@dataclass(frozen=True, slots=True)
class QuantizeLaunch:
    """How the tile kernels are launched: ``elems`` elements a program, as whole groups."""

    elems: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card, group_size: int, dtype: str) -> "QuantizeLaunch":
        # 16 elements a thread: two loads of 16 bytes in flight for bf16, in 32 to 40 registers (ptxas, triton 3.9)
        return cls(max(2048, group_size), max(128, group_size // 16) // card.warp_size)

    @classmethod
    def candidates(cls, card: Card, group_size: int, dtype: str) -> list["QuantizeLaunch"]:
        sizes = [elems for elems in (1024, 2048, 4096, 8192) if elems >= group_size]
        return [cls(elems, num // card.warp_size) for elems in sizes for num in (64, 128, 256, 512)]


QUANTIZE = Tunable(
    "quantize", (_quantize_tile_kernel,), QuantizeLaunch, QuantizeLaunch.heuristic, QuantizeLaunch.candidates
)


def fits_a_tile(group_size: int) -> bool:
    """Whether groups of this size are held in registers, several to a program."""
    return group_size <= MAX_TILE_GROUP and group_size >= 16 and group_size & (group_size - 1) == 0


def launch_quantize(x: Tensor, format: str, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU, and on a CPU under the interpreter."""
    kind = FORMATS[format]
    rows, n = x.shape
    num_groups = rows * (n // group_size)
    codes, scales, offsets = _shapes(x, format, group_size, symmetric)
    c = kind.c_symmetric if symmetric else kind.c_offset
    out = (codes, scales, None if symmetric else offsets)
    constants = {"BITS": kind.bits, "FP8": format == "fp8"}
    with on_device_of(x):
        card = card_of(x)
        if fits_a_tile(group_size):
            how = QUANTIZE.resolve(card, group_size=group_size, dtype=dtype_name(x.dtype))
            groups = max(1, how.elems // group_size)
            launch(
                _quantize_tile_kernel, (triton.cdiv(num_groups, groups),), x.contiguous(), *out, num_groups, c,
                GROUP=group_size, GROUPS=groups, **constants, num_warps=how.num_warps,
            )  # fmt: skip
        else:
            launch(
                _quantize_group_kernel, (num_groups,), x.contiguous(), *out, group_size, c, BLOCK=GROUP_BLOCK,
                **constants, num_warps=GROUP_THREADS // card.warp_size,
            )  # fmt: skip
    return codes, scales, offsets


def _shapes(x: Tensor, format: str, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_groups = x.shape[0], x.shape[1] // group_size
    codes = x.new_empty((rows, num_groups * FORMATS[format].num_codes(group_size)), dtype=torch.uint8)
    scales = x.new_empty((rows, num_groups), dtype=torch.float32)
    return codes, scales, scales.new_empty(0) if symmetric else torch.empty_like(scales)


register(
    "quantize(Tensor x, str format, int group_size, bool symmetric) -> (Tensor codes, Tensor scales, Tensor offsets)",
    launch_quantize,
    _shapes,
    quantize_reference,
)


def quantize(x: Tensor, format: str = "int8", group_size: int | None = None, symmetric: bool = True) -> Quantized:
    """Codes and scales of x, group by group of its last axis.

    Args:
        x: (..., N) fp32, bf16 or fp16.
        format: "int8", "int4" or "fp8" (e4m3).
        group_size: elements that share a scale, a divisor of N; None is N: one scale per row, or channel. Powers of
            two from 16 to 4096 take one pass.
        symmetric: False keeps each group's smallest value as an offset; not for fp8.

    Raises:
        ValueError: another type or format, a group size that does not divide N, or fp8 with an offset.
    """
    check_device("quantize", x)
    if format not in FORMATS:
        raise ValueError(f"quantize: format is {format!r}, must be one of {', '.join(FORMATS)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"quantize: x is {x.dtype}, must be float32, bfloat16 or float16: convert it with x.to(...)")
    if not symmetric and FORMATS[format].c_offset is None:
        raise ValueError(f"quantize: {format} has a sign and no offset: set symmetric=True, or take int8")
    if x.ndim == 0:
        raise ValueError("quantize: x is a scalar, must have a last axis to quantise along: pass x.view(1)")
    n = x.shape[-1]
    size = n if group_size is None else group_size
    if n and (size < 1 or n % size):
        raise ValueError(f"quantize: group_size is {size}, must divide the last axis: x is {tuple(x.shape)}")
    rows = x.detach().reshape(-1, n)
    if x.numel():
        codes, scales, offsets = torch.ops.tritonspeed.quantize(rows, format, size, symmetric)
    else:
        codes, scales, offsets = _shapes(rows, format, max(size, 1), symmetric)
    if format == "int8" and symmetric:
        codes = codes.view(torch.int8)
    elif format == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    lead = x.shape[:-1]
    return Quantized(
        codes.view(*lead, codes.shape[-1]),
        scales.view(*lead, scales.shape[-1]),
        None if symmetric else offsets.view(*lead, scales.shape[-1]),
        format,
        max(size, 1),
        x.shape,
    )
