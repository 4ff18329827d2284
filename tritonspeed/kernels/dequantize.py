"""Dequantise, and add up quantised copies: the two receiving ends of quantised weights and quantised communication.

    y = Σ_r dequantised copy of rank r            in rank order, fp32; optionally quantised again in the same pass

The codes stand in ``codes.py``. A sum needs groups that are a power of two of at most ``MAX_TILE_GROUP`` elements.

Shapes   codes: (R, ..., bytes); scales: (R, ..., N / g); y: (..., N)
Bytes    R · n · (bits / 8 + 4 / g) + n · itemsize(y), or the new codes in place of y
Flops    3 R n
Source   Wang et al. 2023, arXiv:2306.10209 (quantised sums in ZeRO++)
Roof     not measured yet
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.codes import FORMATS, Quantized, decode, encode_tile
from tritonspeed.kernels.quantize import DTYPES, QuantizeLaunch, fits_a_tile, quantize_reference
from tritonspeed.kernels.rounding import round_nearest, store
from tritonspeed.kernels.tuned import Tunable, dtype_name

GROUP_BLOCK = 2048  # codes that a program of the kernel for long groups turns into numbers: 16 bytes a thread


def dequantize_reference(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Codes (rows, bytes) as uint8 → (rows, N) in dtype, computed in fp32."""
    groups = codes.reshape(codes.shape[0], scales.shape[1], -1)
    if format == "int4":
        groups = torch.cat((groups & 15, groups >> 4), -1)[..., :group_size]
        values = groups.float() if offsets is not None else (groups.int() - 16 * (groups > 7)).float()
    elif format == "fp8":
        values = groups.view(torch.float8_e4m3fn).float()
    else:
        values = groups.float() if offsets is not None else groups.view(torch.int8).float()
    values = values * scales[..., None]
    if offsets is not None:
        values = values + offsets[..., None]
    return values.flatten(1).to(dtype)


@triton.jit(do_not_specialize=["num_groups", "num_ranks"])
def _dequantize_tile_kernel(
    codes_ptr, scales_ptr, offsets_ptr, y_ptr, new_codes_ptr, new_scales_ptr, new_offsets_ptr, num_groups, num_ranks, c,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Σ over ranks, in their order, of what their codes stand for; written as it is, or quantised again."""
    WORDS: tl.constexpr = GROUP * BITS // 8
    c = tl.cast(c, tl.float32)
    start = tl.program_id(0).to(tl.int64) * GROUPS
    groups = tl.arange(0, GROUPS)
    inside = groups < num_groups - start
    columns = tl.arange(0, WORDS)[None, :]
    at = groups[:, None] * WORDS + columns
    first = tl.zeros([GROUPS, WORDS], tl.float32)
    second = first
    place = start  # of this rank's first group
    for _ in range(num_ranks):
        code = tl.load(codes_ptr + place * WORDS + at, mask=inside[:, None], other=0, eviction_policy="evict_first")
        scale = tl.load(scales_ptr + place + groups, mask=inside, other=1.0)[:, None]
        low = None
        if offsets_ptr is not None:
            low = tl.load(offsets_ptr + place + groups, mask=inside, other=0.0)[:, None]
        if BITS == 4:
            first += decode(code & 15, low, scale, BITS, FP8)
            second += decode(code >> 4, low, scale, BITS, FP8)
        else:
            first += decode(code, low, scale, BITS, FP8)
        place += num_groups
    if new_codes_ptr is None:
        y_ptr += start * GROUP
        at = groups[:, None] * GROUP + columns
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        store(y_ptr + at, round_nearest(first, dtype, INTERPRET), inside[:, None])
        if BITS == 4:
            store(y_ptr + WORDS + at, round_nearest(second, dtype, INTERPRET), inside[:, None])
    else:
        if new_offsets_ptr is not None:
            new_offsets_ptr += start
        encode_tile(
            first, second, at, new_codes_ptr + start * WORDS, new_scales_ptr + start, new_offsets_ptr, groups, inside,
            c, BITS, FP8,
        )  # fmt: skip


@triton.jit
def _dequantize_group_kernel(
    codes_ptr, scales_ptr, offsets_ptr, y_ptr, group_size,
    BLOCK: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A block of a group of any length."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_codes = group_size if BITS == 8 else (group_size + 1) // 2
    inside = columns < num_codes
    code = tl.load(codes_ptr + group * num_codes + columns, mask=inside, other=0, eviction_policy="evict_first")
    scale = tl.load(scales_ptr + group)
    low = None
    if offsets_ptr is not None:
        low = tl.load(offsets_ptr + group)
    y_ptr += group * group_size
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    first = decode(code & 15 if BITS == 4 else code, low, scale, BITS, FP8)
    tl.store(y_ptr + columns, round_nearest(first, dtype, INTERPRET), mask=inside)
    if BITS == 4:
        partner = columns + num_codes
        second = decode(code >> 4, low, scale, BITS, FP8)
        tl.store(y_ptr + partner, round_nearest(second, dtype, INTERPRET), mask=partner < group_size)


def _heuristic(card: Card, group_size: int, dtype: str) -> QuantizeLaunch:
    # 32 elements a thread: int4 codes come in 16 bytes, in 48 to 64 registers (ptxas, triton 3.9; AMD 71 to 99);
    # 16 elements took 32 to 40 registers, and 8 bytes
    return QuantizeLaunch(4096, 128 // card.warp_size)


DEQUANTIZE = Tunable("dequantize", (_dequantize_tile_kernel,), QuantizeLaunch, _heuristic, QuantizeLaunch.candidates)


def dequantize_sum_reference(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Σ over the leading axis, rank by rank, in fp32: codes (R, rows, bytes) → (rows, N)."""
    total = torch.zeros(())
    for rank in range(codes.shape[0]):
        low = offsets[rank] if offsets.numel() else None
        total = total + dequantize_reference(codes[rank], scales[rank], low, format, group_size, torch.float32)
    return total.to(dtype)


def launch_dequantize_sum(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The op on a GPU, and on a CPU under the interpreter."""
    y = _sum_shape(codes, scales, offsets, format, group_size, dtype)
    low = offsets if offsets.numel() else None
    with on_device_of(codes):
        if fits_a_tile(group_size):
            _launch_tiles(codes, scales, low, format, group_size, (y, None, None, None), dtype)
        else:
            kind = FORMATS[format]
            grid = scales[0].numel(), triton.cdiv(kind.num_codes(group_size), GROUP_BLOCK)
            launch(
                _dequantize_group_kernel, grid, codes, scales, low, y, group_size, BLOCK=GROUP_BLOCK, BITS=kind.bits,
                FP8=format == "fp8", INTERPRET=INTERPRETED, num_warps=128 // card_of(codes).warp_size,
            )  # fmt: skip
    return y


def _launch_tiles(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    format: str,
    group_size: int,
    out: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> None:
    kind, num_groups = FORMATS[format], scales[0].numel()
    how = DEQUANTIZE.resolve(card_of(codes), group_size=group_size, dtype=dtype_name(dtype))
    groups = max(1, how.elems // group_size)
    c = kind.c_symmetric if offsets is None else kind.c_offset
    launch(
        _dequantize_tile_kernel, (triton.cdiv(num_groups, groups),), codes, scales, offsets, *out, num_groups,
        codes.shape[0], c, GROUP=group_size, GROUPS=groups, BITS=kind.bits, FP8=format == "fp8",
        INTERPRET=INTERPRETED, num_warps=how.num_warps,
    )  # fmt: skip


def _sum_shape(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[1], scales.shape[2] * group_size), dtype=dtype)


def requantize_sum_reference(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's own codes, scales and offsets."""
    total = dequantize_sum_reference(codes, scales, offsets, format, group_size, torch.float32)
    return quantize_reference(total, format, group_size, not offsets.numel())


def launch_requantize_sum(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU, and on a CPU under the interpreter: sum and new codes in one pass."""
    new = _requantized_shapes(codes, scales, offsets, format, group_size)
    low = offsets if offsets.numel() else None
    with on_device_of(codes):
        out = (None, new[0], new[1], None if low is None else new[2])
        _launch_tiles(codes, scales, low, format, group_size, out, torch.float32)
    return new


def _requantized_shapes(
    codes: Tensor, scales: Tensor, offsets: Tensor, format: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return codes.new_empty(codes.shape[1:]), scales.new_empty(scales.shape[1:]), offsets.new_empty(offsets.shape[1:])


_ARGUMENTS = "Tensor codes, Tensor scales, Tensor offsets, str format, int group_size"
register(
    f"dequantize_sum({_ARGUMENTS}, ScalarType dtype) -> Tensor",
    launch_dequantize_sum,
    _sum_shape,
    dequantize_sum_reference,
)
register(
    f"requantize_sum({_ARGUMENTS}) -> (Tensor codes, Tensor scales, Tensor offsets)",
    launch_requantize_sum,
    _requantized_shapes,
    requantize_sum_reference,
)


def _check(operation: str, q: Quantized, dtype: torch.dtype) -> None:
    check_device(operation, q.codes)
    if dtype not in DTYPES:
        raise ValueError(f"{operation}: dtype is {dtype}, must be float32, bfloat16 or float16")


def _flat(q: Quantized, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, rows, ...) views of the parts as the ops take them; offsets empty where there are none."""
    codes = q.codes.view(torch.uint8).reshape(num_ranks, -1, q.codes.shape[-1])
    scales = q.scales.reshape(num_ranks, -1, q.scales.shape[-1])
    offsets = scales.new_empty((num_ranks, 0)) if q.offsets is None else q.offsets.reshape(scales.shape)
    return codes.contiguous(), scales.contiguous(), offsets.contiguous()


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that the codes stand for.

    Args:
        q: from ``quantize``.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        q.shape, rounded once from fp32.

    Raises:
        ValueError: another dtype.
    """
    _check("dequantize", q, dtype)
    if not q.codes.numel():
        return q.scales.new_empty(q.shape, dtype=dtype)
    return torch.ops.tritonspeed.dequantize_sum(*_flat(q, 1), q.format, q.group_size, dtype).view(q.shape)


def dequantize_sum(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Σ over the leading axis (one copy per rank) of what the codes stand for, in fp32 and in the axis' order.

    Args:
        q: of a tensor (R, ..., N); groups a power of two from 16 to 4096.
        dtype: of the result.

    Returns:
        (..., N).

    Raises:
        ValueError: another dtype, or groups of another size.
    """
    _check("dequantize_sum", q, dtype)
    _check_summable("dequantize_sum", q)
    return torch.ops.tritonspeed.dequantize_sum(*_flat(q, q.shape[0]), q.format, q.group_size, dtype).view(q.shape[1:])


def requantize_sum(q: Quantized) -> Quantized:
    """The same sum, quantised again like q in the same pass: the middle of a two-step reduction.

    Args:
        q: of a tensor (R, ..., N); groups a power of two from 16 to 4096.

    Returns:
        of a tensor (..., N).

    Raises:
        ValueError: groups of another size.
    """
    _check("requantize_sum", q, torch.float32)
    _check_summable("requantize_sum", q)
    codes, scales, offsets = torch.ops.tritonspeed.requantize_sum(*_flat(q, q.shape[0]), q.format, q.group_size)
    return Quantized(
        codes.view(q.codes.dtype).view(q.codes.shape[1:]),
        scales.view(q.scales.shape[1:]),
        None if q.offsets is None else offsets.view(q.scales.shape[1:]),
        q.format,
        q.group_size,
        q.shape[1:],
    )


def _check_summable(operation: str, q: Quantized) -> None:
    if not fits_a_tile(q.group_size):
        raise ValueError(
            f"{operation}: group_size is {q.group_size}, must be a power of two from 16 to 4096:"
            " quantise with such groups"
        )
    if len(q.shape) < 2 or not q.codes.numel():
        raise ValueError(f"{operation}: q is of a tensor {tuple(q.shape)}, must be (ranks, ..., N) and not empty")
