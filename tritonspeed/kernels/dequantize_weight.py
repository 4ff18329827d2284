"""A packed weight as floats: (q − zero) · s in fp32, rounded to the type that is asked for.

Shapes   codes: (N, K / 2) uint8 or (N, K) int8; scales: (G, N); zeros: (G, N) uint8 or None; W: (N, K)
Types    W fp16, bf16 or fp32
Bytes    N · K · (bits / 8 + itemsize(W)) + N · G · (itemsize(s) + 1)
Flops    2 · N · K
Source   packing.py
Roof     not measured yet
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.packing import SCALE_DTYPES, SYMMETRIC_ZERO, values_reference
from tritonspeed.kernels.rounding import store_rounded
from tritonspeed.kernels.tuned import Tunable, dtype_name

UNIT = 16  # bytes of a load


@triton.jit
def _dequantize_weight_kernel(
    codes_ptr, scales_ptr, zeros_ptr, w_ptr, N, K, GROUP,
    BITS: tl.constexpr, UNITS: tl.constexpr, ZERO: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    UNIT_ELEMS: tl.constexpr = 128 // BITS
    row = tl.program_id(0)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = units * UNIT_ELEMS < K
    lanes = tl.arange(0, 16)
    codes_ptr += row.to(tl.int64) * (K // UNIT_ELEMS * 16)  # int64 once, in the base: N · K may pass 2³¹
    w_ptr += row.to(tl.int64) * K
    whole = inside[:, None] & (lanes >= 0)[None, :]
    codes = tl.load(
        codes_ptr + units[:, None] * 16 + lanes[None, :], mask=whole, other=0, eviction_policy="evict_first"
    )
    group_at = units * UNIT_ELEMS // GROUP * N + row
    scale = tl.load(scales_ptr + group_at, mask=inside, other=0.0).to(tl.float32)
    zero = tl.full([UNITS], ZERO, tl.float32)
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + group_at, mask=inside, other=0).to(tl.float32)
    at = w_ptr + units[:, None] * UNIT_ELEMS + lanes[None, :]
    if BITS == 4:
        store_rounded(at, ((codes & 15).to(tl.float32) - zero[:, None]) * scale[:, None], whole, INTERPRET)
        store_rounded(at + 16, ((codes >> 4).to(tl.float32) - zero[:, None]) * scale[:, None], whole, INTERPRET)
    else:
        store_rounded(at, (codes.to(tl.float32) - zero[:, None]) * scale[:, None], whole, INTERPRET)


@dataclass(frozen=True, slots=True)
class DequantizeWeightLaunch:
    """How the kernel is launched: units of 16 bytes a program."""

    units: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card, *, bits: int, dtype: str) -> "DequantizeWeightLaunch":
        # one unit a thread: 16 codes live in 40 registers at most (ptxas, sm_80 to sm_120, triton 3.9)
        return cls(units=128, num_warps=128 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card, *, bits: int, dtype: str) -> list["DequantizeWeightLaunch"]:
        return [cls(units, max(1, t // card.warp_size)) for units in (64, 128, 256) for t in (64, 128, 256)]


DEQUANTIZE_WEIGHT = Tunable(
    "dequantize_weight",
    (_dequantize_weight_kernel,),
    DequantizeWeightLaunch,
    DequantizeWeightLaunch.heuristic,
    DequantizeWeightLaunch.candidates,
)


def launch_dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Launch the kernel: the op on a GPU, and on a CPU under the interpreter."""
    bits = 4 if codes.dtype == torch.uint8 else 8
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    w = codes.new_empty((n, k), dtype=dtype)
    with on_device_of(codes):
        how = DEQUANTIZE_WEIGHT.resolve(card_of(codes), bits=bits, dtype=dtype_name(dtype))
        launch(
            _dequantize_weight_kernel, (n, triton.cdiv(k * bits, 128 * how.units)),
            codes.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous(), w, n, k,
            k // scales.shape[0], BITS=bits, UNITS=how.units, ZERO=SYMMETRIC_ZERO if bits == 4 else 0,
            INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip
    return w


def _shape(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    k = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    return codes.new_empty((codes.shape[0], k), dtype=dtype)


register(
    "dequantize_weight(Tensor codes, Tensor scales, Tensor? zeros, ScalarType dtype) -> Tensor",
    launch_dequantize_weight,
    _shape,
    values_reference,
)


def dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A W4 or W8 weight as floats.

    Args:
        codes: (N, K / 2) uint8 or (N, K) int8.
        scales: (G, N) fp16, bf16 or fp32.
        zeros: (G, N) uint8, or None.
        dtype: float16, bfloat16 or float32.

    Returns:
        (N, K), with the padding.

    Raises:
        ValueError: another type, shapes that do not fit, or a device without kernels.
    """
    check_device("dequantize_weight", codes)
    if codes.dtype not in (torch.uint8, torch.int8) or scales.dtype not in SCALE_DTYPES or dtype not in SCALE_DTYPES:
        raise ValueError(
            f"dequantize_weight: codes are {codes.dtype}, scales {scales.dtype}, the result {dtype}: codes must be"
            " uint8 or int8, the others float16, bfloat16 or float32"
        )
    k = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    fits = scales.dim() == 2 and scales.shape[1] == codes.shape[0] and k % (32 * max(1, scales.shape[0])) == 0
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(
            f"dequantize_weight: codes {tuple(codes.shape)} want scales (and zeros) (G, {codes.shape[0]}), {k} / G a"
            f" multiple of 32; they are {tuple(scales.shape)}: pass all of one PackedWeight"
        )
    return torch.ops.tritonspeed.dequantize_weight(codes, scales, zeros, dtype)
