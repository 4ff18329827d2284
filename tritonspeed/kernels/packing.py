"""Packed weights: what the quantised matmuls read, how it is made from floats, and from GPTQ's and AWQ's files.

A weight W is (N, K) as in ``torch.nn.Linear``; a group is g consecutive elements of a row, or the whole row.

    W4     s = max|w| / 7              q = clamp(round(w / s), −8, 7) + 8,  zero 8             w ≈ (q − zero) · s
    W4, z  s = (max − min) / 15        z = clamp(round(−min / s), 0, 15)
                                       q = clamp(round(w / s) + z, 0, 15)                      w ≈ (q − z) · s
    W8     s = max|w| / 127            q = clamp(round(w / s), −127, 127)                      w ≈ q · s
    FP8    s = max|w| / 448            q = e4m3(clamp(w / s, −448, 448)), +0 for −0            w ≈ q · s

max and min count 0 in. Arithmetic is fp32, rounding to nearest even; s is rounded to its stored type first and q is
found with the stored s. A group whose s is 0 gets s = 1. K is padded with zeros to whole groups, to a multiple of
``CHUNK`` without groups: rows then start at 16 bytes, and a tile has no ragged end within a load.

    codes  W4 uint8 (N, K / 2), W8 int8 (N, K), FP8 float8_e4m3fn (N, K)
           W4: of each 32 elements byte j has element j in its low nibble and element j + 16 in its high one
    scales (G, N): the order of a tile of the matmul, one row per group     zeros uint8 (G, N), or None

Both halves of 16 bytes are 16 neighbours along K, so activations load in whole words, and the two nibbles feed two
products without any shuffling. Words of 32 bits along K would take 5 to 7 times the shared memory.

Source   Frantar et al. 2023, arXiv:2210.17323 (GPTQ); Lin et al. 2024, arXiv:2306.00978 (AWQ); Micikevicius et al.
         2022, arXiv:2209.05433 (e4m3)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # elements whose nibbles share 16 bytes; groups are multiples of it
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SYMMETRIC_ZERO = 8  # W4 without zeros
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble, lowest first


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantised weight.

    Attributes:
        codes: see above; its K is the padded one.
        scales: (G, N), G = 1 where a row is one group.
        zeros: uint8 (G, N), or None: ``SYMMETRIC_ZERO`` for W4, 0 for the others.
        in_features: K before padding.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), K without the padding."""
        return self.codes.shape[0], self.in_features

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def pack_nibbles(q: Tensor) -> Tensor:
    """(N, K) values 0 to 15, K a multiple of 32 → (N, K / 2) uint8."""
    halves = q.to(torch.uint8).reshape(q.shape[0], -1, 2, CHUNK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unpack_nibbles(codes: Tensor) -> Tensor:
    """(N, K / 2) uint8 → (N, K) uint8, values 0 to 15."""
    chunks = codes.reshape(codes.shape[0], -1, CHUNK // 2)
    return torch.stack((chunks & 15, chunks >> 4), dim=2).flatten(1)


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """(N, K) → (N, G, g) fp32, padded with zeros."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"pack: the weight is {weight.dtype} {tuple(weight.shape)}, must be a floating (N, K) with elements:"
            " pass linear.weight"
        )
    if group_size is not None and (group_size <= 0 or group_size % CHUNK):
        raise ValueError(
            f"pack: group_size {group_size} is no multiple of {CHUNK}: take 32, 64 or 128, or None for one a row"
        )
    padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % (group_size or CHUNK)))
    if not padded.isfinite().all():
        raise ValueError("pack: the weight has NaN or infinite elements: no scale can carry them")
    return padded.unflatten(1, (-1, group_size or padded.shape[1]))


def _stored(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, G) fp32 → the scales as kept, (G, N), and as computed with, (N, G, 1) fp32."""
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"pack: scale_dtype is {dtype}, must be float16, bfloat16 or float32")
    kept = scale.to(dtype)
    kept = torch.where(kept == 0, torch.ones_like(kept), kept)
    if not kept.isfinite().all():
        raise ValueError(f"pack: a scale of {scale.max().item():.3g} overflows {dtype}: take scale_dtype=torch.float32")
    return kept.t().contiguous(), kept.float()[..., None]


def pack_w4(
    weight: Tensor, group_size: int | None = 128, symmetric: bool = True, scale_dtype: torch.dtype = torch.float16
) -> PackedWeight:
    """Quantise to 4 bits.

    Args:
        weight: (N, K) floating, finite.
        group_size: a multiple of 32, or None: one scale a row.
        symmetric: without zeros.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: what cannot be packed, and why.
    """
    groups = _grouped(weight, group_size)
    if symmetric:
        scales, s = _stored(groups.abs().amax(-1) / 7, scale_dtype)
        zeros, q = None, (groups / s).round().clamp(-8, 7) + SYMMETRIC_ZERO
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales, s = _stored((high - low) / 15, scale_dtype)
        z = (-low[..., None] / s).round().clamp(0, 15)
        zeros, q = z[..., 0].to(torch.uint8).t().contiguous(), ((groups / s).round() + z).clamp(0, 15)
    return PackedWeight(pack_nibbles(q.flatten(1)), scales, zeros, weight.shape[1])


def pack_w8(weight: Tensor, group_size: int | None = None, scale_dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Quantise to 8 bits, symmetric; arguments and errors as in ``pack_w4``. Without groups W8A8 takes it too."""
    groups = _grouped(weight, group_size)
    scales, s = _stored(groups.abs().amax(-1) / 127, scale_dtype)
    codes = (groups / s).round().clamp(-127, 127).to(torch.int8).flatten(1)
    return PackedWeight(codes, scales, None, weight.shape[1])


def pack_fp8(weight: Tensor) -> PackedWeight:
    """Quantise to e4m3 with one fp32 scale a row. −0 is written as +0: AMD's older e4m3 has NaN in its place."""
    groups = _grouped(weight, None)
    scales, s = _stored(groups.abs().amax(-1) / 448, torch.float32)
    codes = (groups / s).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1).view(torch.uint8)
    return PackedWeight(codes.masked_fill(codes == 0x80, 0).view(torch.float8_e4m3fn), scales, None, weight.shape[1])


def values_reference(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q − zero) · s, (N, K) with the padding: in fp32 and rounded to dtype, in fp64 throughout for fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_nibbles(codes) if codes.dtype == torch.uint8 else codes
    groups = q.to(wide).unflatten(1, (scales.shape[0], -1))
    if zeros is not None:
        groups = groups - zeros.t()[..., None].to(wide)
    elif codes.dtype == torch.uint8:
        groups = groups - SYMMETRIC_ZERO
    return (groups * scales.t()[..., None].to(wide)).flatten(1).to(dtype)


def unpack_reference(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as floats, (N, K) without the padding."""
    return values_reference(packed.codes, packed.scales, packed.zeros, dtype)[:, : packed.in_features]


def _nibbles_of_words(words: Tensor, dim: int) -> Tensor:
    """int32 → 8 nibbles each, lowest first, along dim."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    nibbles = (words.movedim(dim, -1)[..., None] >> shifts) & 15
    return nibbles.to(torch.uint8).flatten(-2).movedim(-1, dim)


def _check_words(origin: str, **words: Tensor) -> None:
    for name, tensor in words.items():
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise ValueError(
                f"{origin}: {name} is {tensor.dtype} {tuple(tensor.shape)}, must be int32 and of two axes, 8 nibbles a"
                " word: only 4-bit checkpoints are converted"
            )


def _from_nibbles(origin: str, q: Tensor, zeros: Tensor, scales: Tensor) -> PackedWeight:
    """q (K, N), zeros (G, N), scales (G, N)."""
    k, n = q.shape
    num_groups = scales.shape[0] if scales.dim() == 2 else 0
    if scales.shape != zeros.shape or scales.shape[-1] != n or not num_groups or k % (num_groups * CHUNK):
        raise ValueError(
            f"{origin}: K {k} and N {n} do not fit scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)}: both"
            f" must be (G, {n}) with groups K / G of a multiple of {CHUNK}"
        )
    return PackedWeight(pack_nibbles(q.t()), scales.contiguous(), zeros.contiguous(), k)


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, zero_offset: int = 1
) -> tuple[PackedWeight, Tensor | None]:
    """Convert a 4-bit GPTQ layer: nibble i of qweight[r, n] is row 8 r + i of column n.

    Args:
        qweight: int32 (K / 8, N).
        qzeros: int32 (G, N / 8): nibble i of [·, c] belongs to column 8 c + i and holds (zero − zero_offset) mod 16.
        scales: (G, N).
        g_idx: (K,) group of each row; None is k · G // K.
        zero_offset: 1 in GPTQ's first format, 0 in its second ("gptq_v2").

    Returns:
        The weight, and None or, for a g_idx of activation order, the (K,) int64 index by which activations are taken
        before the product: x[..., index].

    Raises:
        ValueError: what does not fit, or groups of unequal size.
    """
    _check_words("from_gptq", qweight=qweight, qzeros=qzeros)
    q = _nibbles_of_words(qweight, 0)
    zeros = (_nibbles_of_words(qzeros, 1) + zero_offset) & 15
    index = None
    if g_idx is not None:
        k, num_groups = q.shape[0], scales.shape[0]
        if g_idx.shape != (k,) or k % num_groups:
            raise ValueError(f"from_gptq: g_idx {tuple(g_idx.shape)} and {num_groups} groups do not fit K {k}")
        in_order = torch.arange(k, device=g_idx.device) // (k // num_groups)
        if not torch.equal(g_idx.long(), in_order):
            index = g_idx.long().argsort(stable=True)
            if not torch.equal(g_idx.long()[index], in_order):
                raise ValueError(
                    f"from_gptq: g_idx has groups of unequal size, not {k // num_groups} rows each: quantise again"
                    " without padding, or with desc_act=False"
                )
            q = q[index]
    return _from_nibbles("from_gptq", q, zeros, scales), index


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """Convert a 4-bit AWQ layer, "gemm" version: nibble i of qweight[k, c] is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i].

    Args:
        qweight: int32 (K, N / 8).
        qzeros: int32 (G, N / 8), the zeros as they are, in the same order.
        scales: (G, N).

    Raises:
        ValueError: what does not fit.
    """
    _check_words("from_awq", qweight=qweight, qzeros=qzeros)
    place = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()  # nibble of each column

    def columns(words: Tensor) -> Tensor:
        return _nibbles_of_words(words, 1).unflatten(1, (-1, 8))[..., place].flatten(1)

    return _from_nibbles("from_awq", columns(qweight), columns(qzeros), scales)
