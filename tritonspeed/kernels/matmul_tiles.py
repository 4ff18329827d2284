"""What the quantised matmuls share: the order of tiles, how K is split, the last additions, and launch heuristics.

The weight is the left operand, y^T = W · x^T: its rows fill the tensor cores' long side, and its codes go from shared
memory to registers, are decoded there and multiplied from there. As the right operand they would pass through shared
memory once more, and 128 × 128 tiles spilled 492 bytes (sm_80) and 304 (sm_100) where these spill none (ptxas, triton
3.9). On sm_90 codes are copied 8 bytes at a time, the width in which wgmma's registers are filled; 16 elsewhere.

Where K is split, each part writes its sum to a workspace (S, M, N) and a second kernel adds the parts in order: two
runs agree to the last bit.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._triton import INTERPRETED, launch, tl, triton
from tritonspeed.kernels.cards import KIB, Card
from tritonspeed.kernels.rounding import store_rounded
from tritonspeed.kernels.tuned import next_power_of_2

MAX_SPLIT_K = 8  # the workspace is written and read: 8 · 8 bytes per output
FINISH_BLOCK = 1024


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile along M, tile along N): down a column of GROUP_M tiles, then on to the next, so that W is met in L2."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    num_in_group = GROUP_M * num_n
    first = program // num_in_group * GROUP_M
    rows = tl.minimum(num_m - first, GROUP_M)
    within = program % num_in_group
    return first + within % rows, within // rows


@triton.jit
def workspace_columns(N):
    """Columns of the workspace: its rows start at 64 bytes, whatever N."""
    return tl.cdiv(N, 16) * 16


@triton.jit
def store_tile(
    acc, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, m, n, M, N, split, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """acc (BLOCK_N, BLOCK_M) → out (M, N), scaled and with the bias; as it is → the workspace where K is split."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT_K > 1:
        rows = split.to(tl.int64) * M + m
        tl.store(out_ptr + rows[:, None] * workspace_columns(N) + n[None, :], tl.trans(acc), mask=inside)
    else:
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        acc = acc.to(tl.float32)
        if w_scale_ptr is not None:
            acc = acc * tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if x_scale_ptr is not None:
            acc = acc * tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        if bias_ptr is not None:
            acc = acc + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        store_rounded(out_ptr + at, tl.trans(acc), inside, INTERPRET)


@triton.jit
def store_row(y, out_ptr, bias_ptr, n, N, split, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr):
    """y (BLOCK_N,) of a product with one row → out (1, N) with the bias, or → the workspace."""
    inside = n < N
    if SPLIT_K > 1:
        tl.store(out_ptr + split.to(tl.int64) * workspace_columns(N) + n, y, mask=inside)
    else:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        store_rounded(out_ptr + n, y, inside, INTERPRET)


@triton.jit
def load_8(at, inside, UNITS: tl.constexpr):
    """[UNITS, 8] 16-bit neighbours of x → 8 values [1, UNITS] fp32, each thread's in its registers, and their sum."""
    x = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [UNITS, 2, 2, 2]))
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    x0, x4 = tl.split(even_0)
    x2, x6 = tl.split(even_1)
    x1, x5 = tl.split(odd_0)
    x3, x7 = tl.split(odd_1)
    total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    return (
        x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :], x6[None, :], x7[None, :],
        total[None, :],
    )  # fmt: skip


@triton.jit
def _finish_matmul_kernel(
    parts_ptr, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, M, N,
    SPLIT_K: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64 once: row · N may pass 2³¹
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = workspace_columns(N)
    there = n < columns  # what stands beyond N is not stored; a bound that 16 divides keeps the loads wide
    total = tl.load(parts_ptr + row * columns + n, mask=there, other=0)
    for part in tl.static_range(1, SPLIT_K):
        rows = tl.cast(M, tl.int64) * part + row
        total += tl.load(parts_ptr + rows * columns + n, mask=there, other=0)
    at = row * N + n
    inside = n < N
    total = total.to(tl.float32)
    if w_scale_ptr is not None:
        total = total * tl.load(w_scale_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if x_scale_ptr is not None:
        total = total * tl.load(x_scale_ptr + row)
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    store_rounded(out_ptr + at, total, inside, INTERPRET)


@dataclass(frozen=True, slots=True)
class MatmulLaunch:
    """How a product by tiles is launched.

    Attributes:
        group_m: tiles along M that follow each other.
        dequantize: 1 leaves the kernel aside: write W as floats once, then multiply by cuBLAS.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    group_m: int
    num_warps: int
    num_stages: int
    dequantize: int = 0

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Programs: tiles, parts of K."""
        return triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n), self.split_k

    def options(self, k: int) -> dict[str, Any]:
        """What every kernel by tiles is compiled for."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "SPLIT_K": self.split_k,
            "GROUP_M": self.group_m, "EVEN_K": k % self.block_k == 0, "INTERPRET": INTERPRETED,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class GemvLaunch:
    """How a product with one row is launched: a program has BLOCK_N rows of W, its threads stand along K."""

    block_n: int
    num_warps: int
    split_k: int

    def grid(self, n: int) -> tuple[int, int]:
        """Programs: blocks of rows of W, parts of K."""
        return triton.cdiv(n, self.block_n), self.split_k

    def options(self, card: Card) -> dict[str, Any]:
        """What every kernel of one row is compiled for."""
        return {
            "BLOCK_N": self.block_n, "UNITS": self.num_warps * card.warp_size, "SPLIT_K": self.split_k,
            "INTERPRET": INTERPRETED, "num_warps": self.num_warps,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operands:
    """What a tile costs: bits of an element of W and of x, and the largest block along K (a group has one scale)."""

    w_bits: int
    x_bits: int
    max_block_k: int

    def stage_bytes(self, block_m: int, block_n: int, block_k: int) -> int:
        """Shared memory of one stage of the pipeline."""
        return block_k * (block_m * self.x_bits + block_n * self.w_bits) // 8


def largest_block_k(group: int) -> int:
    """The largest power of two, at most 128, that divides a group; 128 for a group that is the whole row (0)."""
    return min(128, group & -group) if group else 128


def _is_rdna(card: Card) -> bool:
    return card.backend == "hip" and card.warp_size == 32


def _num_stages(card: Card, operands: Operands, block_m: int, block_n: int, block_k: int, most: int) -> int:
    if card.backend != "cuda":
        return 2  # one tile on its way while one is multiplied; LDS is 64 KiB
    # 8 KiB aside for the barriers and the way of the result through shared memory
    fitting = (card.max_shared_bytes - 8 * KIB) // operands.stage_bytes(block_m, block_n, block_k)
    return max(2, min(most, fitting))


def _split_k(card: Card, programs: int, steps: int) -> int:
    """Twice as many programs as SMs, as long as each has four steps."""
    split = 1
    while split < MAX_SPLIT_K and programs * split < card.num_sms and steps >= 8 * split:
        split *= 2
    return split


def tile_launch(
    card: Card, m: int, n: int, k: int, operands: Operands, *, block_m: int, block_n: int, num_warps: int
) -> MatmulLaunch:
    """A tile, with the depth of its pipeline and the parts of K that the card can take."""
    # 64 x 64 x 128 spills 60 bytes on sm_100 (W8A16, a ragged K) and 317 registers on RDNA 3 (W4A16), whose 32 rows are
    # full as well; 128 x 128 x 128 would leave one stage in 64 KiB (triton 3.9)
    is_large = block_m * block_n >= 64 * 64 or (_is_rdna(card) and block_m > 16)
    block_k = min(operands.max_block_k, 64 if is_large else 128)
    # each thread loads 16 bytes of codes at least
    threads = num_warps * 32
    block_n = max(block_n, threads * 16 * 8 // (block_k * operands.w_bits))
    programs = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    return MatmulLaunch(
        block_m, block_n, block_k, split_k=_split_k(card, programs, triton.cdiv(k, block_k)), group_m=8,
        num_warps=threads // card.warp_size,
        num_stages=_num_stages(card, operands, block_m, block_n, block_k, 3 if block_m > 64 else 5),
    )  # fmt: skip


def matmul_heuristic(card: Card, m: int, n: int, k: int, operands: Operands) -> MatmulLaunch:
    """A tile for a bucket of M."""
    if m <= (16 if _is_rdna(card) else 64):
        return tile_launch(card, m, n, k, operands, block_m=max(16, m), block_n=64, num_warps=4)
    if _is_rdna(card):  # 4 warps spill 9 registers with 32 x 64 and 119 with 64 x 64; 8 warps 49 with 128 x 128 (W8A16)
        return tile_launch(card, m, n, k, operands, block_m=min(64, m), block_n=128, num_warps=8)
    if card.compute_capability == 120:  # 128 x 128 on 8 warps gets 128 registers there and spills 8 bytes
        return tile_launch(card, m, n, k, operands, block_m=64, block_n=128, num_warps=4)
    return tile_launch(card, m, n, k, operands, block_m=128, block_n=128, num_warps=8)


def matmul_candidates(card: Card, m: int, n: int, k: int, operands: Operands) -> list[MatmulLaunch]:
    """What a tuner should try for a bucket of M."""
    shapes = [(bm, bn, nw) for bm in (16, 32, 64, 128) for bn in (32, 64, 128, 256) for nw in (4, 8)]
    fitting = [s for s in shapes if (s[0] <= max(16, m) and 4 * s[0] >= min(m, 128) and s[0] * s[1] <= 128 * 256)]
    tiles = [
        tile_launch(card, m, n, k, operands, block_m=bm, block_n=bn, num_warps=nw)
        for bm, bn, nw in fitting
        if nw == 8 or bm * bn <= 64 * 128
    ]
    splits = [replace(t, split_k=split) for t in tiles for split in (1, 2, 4, 8) if m <= 64 or split == t.split_k]
    return list(dict.fromkeys(splits))


def gemv_heuristic(card: Card, n: int, k: int, unit: int, most_rows: int = 4) -> GemvLaunch:
    """Warps side by side along K until a row is covered; ``unit``: elements that 16 bytes of codes hold."""
    units = triton.cdiv(k, unit)
    num_warps = min(4, max(1, next_power_of_2(units) // card.warp_size))
    block_n = most_rows
    while block_n > 2 and n < 2 * block_n * card.num_sms:
        block_n //= 2
    steps = units // (card.warp_size * num_warps)
    return GemvLaunch(block_n, num_warps, _split_k(card, triton.cdiv(n, block_n), 2 * steps))


def gemv_candidates(card: Card, n: int, k: int, unit: int) -> list[GemvLaunch]:
    """What a tuner should try."""
    split = gemv_heuristic(card, n, k, unit).split_k
    return [GemvLaunch(rows, warps, s) for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8) for s in {1, split}]


def split_output(m: int, n: int, split_k: int, out: Tensor, accumulator: torch.dtype) -> Tensor:
    """Where the tiles go: the result, or the workspace of its parts."""
    return out if split_k == 1 else out.new_empty((split_k, m, triton.cdiv(n, 16) * 16), dtype=accumulator)


def finish(
    parts: Tensor, out: Tensor, bias: Tensor | None, x_scale: Tensor | None, w_scale: Tensor | None, split_k: int
) -> None:
    """Add the parts of the workspace up; nothing to do where K was whole."""
    if split_k == 1:
        return
    m, n = out.shape
    launch(
        _finish_matmul_kernel, (m, triton.cdiv(n, FINISH_BLOCK)), parts, out, bias, x_scale, w_scale, m, n,
        SPLIT_K=split_k, BLOCK=FINISH_BLOCK, INTERPRET=INTERPRETED, num_warps=4,
    )  # fmt: skip
