"""Rows of any length as *folded* rows whose accesses all have 16 bytes, and the sums over rows that come with them.

k rows of a contiguous (M, N) side by side are one folded row of W = k · N columns. With W a multiple of 8 every folded
row starts at a multiple of 16 bytes, and a column still belongs to one column of the original: c mod N. Partial sums
over folded rows, [P, W], are [P · k, N] in memory: a second kernel adds those rows up. No atomics.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, tl, triton
from tritonspeed.kernels.rounding import store_rounded
from tritonspeed.kernels.tuned import next_power_of_2

GROUP = 8  # what W is a multiple of
MIN_WIDTH = 1024  # short rows are folded to at least this many columns
MIN_BLOCK_N, MAX_IDLE = 128, 1 / 16  # a tile is made narrower while it leaves more than this part of the lanes idle


@triton.jit
def place_folded(tile, col0, W, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(folded rows, offsets), int64, of a tile."""
    rows = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    return rows, rows * ((W // 8) * 8) + (col0 + tl.arange(0, BLOCK_N)[None, :])


@triton.jit(do_not_specialize=["num_rows", "N"])
def _column_sums_kernel(
    partial_ptr, out_ptr, num_rows, N,
    INTERPRET: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    in_row = cols // VEC < N // VEC
    sums = tl.zeros([ROWS, BLOCK_N], partial_ptr.dtype.element_ty)
    for row0 in range(0, num_rows, ROWS):
        rows = row0 + tl.arange(0, ROWS)[:, None]
        at = partial_ptr + rows.to(tl.int64) * ((N // VEC) * VEC) + cols
        sums += tl.load(at, mask=(rows < num_rows) & in_row, other=0.0)
    store_rounded(out_ptr + cols, tl.sum(sums, axis=0, keep_dims=True), in_row, INTERPRET)


@dataclass(frozen=True, slots=True)
class Folding:
    """x of n elements as folded rows of ``width`` columns, and the tiles over them."""

    width: int
    rows: int
    block_n: int
    num_blocks: int
    num_full: int
    num_tiles: int

    @classmethod
    def of(cls, n: int, num_cols: int | None, block: int, max_block_n: int) -> "Folding":
        """num_cols: the length of the bias; None lets rows be as wide as a tile."""
        width = max_block_n
        if num_cols is not None:
            width = num_cols * (GROUP // math.gcd(num_cols, GROUP))
            while width < MIN_WIDTH:
                width *= 2
        block_n = min(max_block_n, block)
        while block_n > MIN_BLOCK_N and -width % block_n > MAX_IDLE * width:
            block_n //= 2
        rows = min(block // block_n, next_power_of_2(triton.cdiv(n, width)))
        return cls(width, rows, block_n, triton.cdiv(width, block_n), n // (width * rows), triton.cdiv(n, width * rows))


def launch_column_sums(partials: Tensor, out: Tensor) -> None:
    """out (N,) = the sums of the columns of partials, seen as (rows, N)."""
    n = out.numel()
    launch(
        _column_sums_kernel, (triton.cdiv(n, 128),), partials, out, partials.numel() // n, n, INTERPRET=INTERPRETED,
        VEC=4 if n % 4 == 0 else 1, ROWS=16, BLOCK_N=128, num_warps=256 // card_of(out).warp_size,
    )  # fmt: skip
