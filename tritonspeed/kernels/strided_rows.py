"""Tensors whose rows lie apart, such as the halves of a fused projection: read where they are, in tiles.

Element (r, c) of a ``Rows`` is at offset + r · stride + c of its base. An access is as wide as the largest power of two
up to 16 bytes that divides the row's length and every offset and stride (VEC elements): rows of several tensors start
at different places within 16 bytes as soon as a stride is odd.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tritonspeed.kernels._triton import tl, triton
from tritonspeed.kernels.tuned import next_power_of_2

MIN_BLOCK_N = 128
MAX_IDLE = 1 / 16  # of a row's lanes, before a narrower tile is taken


@triton.jit
def row_tile(num_rows, N, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows [ROWS, 1], columns [1, BLOCK_N], mask) of this program's tile."""
    num_blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    rows = (program // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: rows · stride
    cols = (program % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # the mask is the same for VEC neighbours, which keeps their access in one piece
    return rows, cols, (rows < num_rows) & (cols // VEC < N // VEC)


@triton.jit
def place(ptr, offset, stride, rows, cols, VEC: tl.constexpr):
    """Pointers of a tile's elements. VEC divides offset and stride: said in this way, the compiler knows."""
    return ptr + (offset // VEC) * VEC + rows * ((stride // VEC) * VEC) + cols


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor as the row kernels see it: element (r, c) is at offset + r · stride + c of a base."""

    base: Tensor
    offset: int
    stride: int


def as_rows(x: Tensor) -> Tensor:
    """(M, N) with unit column stride; a copy only where x cannot be seen so."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def plain_rows(x: Tensor) -> Rows:
    """All of (M, N)."""
    return Rows(x, 0, x.stride(0))


def halves(x: Tensor, gate_first: bool) -> tuple[Rows, Rows]:
    """The halves of (M, 2N): gate, then up."""
    first, second = (Rows(x, offset, x.stride(0)) for offset in (0, x.shape[1] // 2))
    return (first, second) if gate_first else (second, first)


def tiling(block: int, num_rows: int, n: int, places: list[Rows]) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants (VEC, ROWS, BLOCK_N) for rows of n columns, in tiles of block elements."""
    vec = 16 // places[0].base.element_size()
    while any(size % vec for place in places for size in (n, place.offset, place.stride)):
        vec //= 2
    block_n = min(block, max(MIN_BLOCK_N, next_power_of_2(n)))
    while block_n > MIN_BLOCK_N and -n % block_n > MAX_IDLE * n:
        block_n //= 2
    rows = min(block // block_n, next_power_of_2(num_rows))
    constants = {"VEC": vec, "ROWS": rows, "BLOCK_N": block_n}
    return (triton.cdiv(num_rows, rows) * triton.cdiv(n, block_n),), constants
