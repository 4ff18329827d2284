"""How the softmax kernels walk: over rows that start anywhere, beside a mask of fewer rows.

A row of N elements starts anywhere if 16 bytes do not divide it: its whole groups of V elements, 16 bytes, are the
*body*, up to V − 1 elements before and behind them the *edge*, loaded and stored apart. A mask is rows of N too;
neighbouring axes of x along which it does the same count as one, so that three numbers say which row a row of x takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._triton import tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.tuned import next_power_of_2


@triton.jit
def exp(x):
    """eˣ by the hardware's 2ˣ."""
    return tl.exp2(x * tl.full((), 1.4426950408889634, x.dtype))  # log2 e


@triton.jit
def lowest(shape: tl.constexpr, ACC: tl.constexpr):
    """The first maximum: finite, so that −∞ − maximum is −∞ and not NaN."""
    return tl.full(shape, -3.4028234663852886e38, ACC)


@triton.jit
def span(row, N, query_len, V: tl.constexpr, ODD: tl.constexpr, CAUSAL: tl.constexpr):
    """Of rows: where the body begins, elements before it, elements in it, elements that are visible."""
    start = row * N
    head = (start * 0).to(tl.int32)
    if ODD:
        head = tl.minimum((V - start % V) % V, N).to(tl.int32)
        body_start = (start + (V - 1)) // V * V  # = start + head unless the row has no body; divisible as compilers see
    else:
        body_start = start
    body = (N - head) // V * V
    visible = head * 0 + N
    if CAUSAL:
        visible = tl.minimum(tl.maximum(row % query_len + 1 + (N - query_len), 0), N).to(tl.int32)
    return body_start, head, body, visible


@triton.jit
def edge_columns(head, body, N, V: tl.constexpr, lane):
    """Lanes 0 to V − 1 are the columns before the body, V to 2·V − 1 those behind it."""
    column = tl.where(lane < V, lane, head + body + lane - V)
    return column, tl.where(lane < V, lane < head, column < N)


@triton.jit
def mask_row(row, size1, size2, step0, step1, step2):
    """The mask's row for a row of x, whose index is (i0, i1, i2) in a grid of (…, size1, size2)."""
    rest = row // size2
    return rest // size1 * step0 + rest % size1 * step1 + row % size2 * step2


@dataclass(frozen=True, slots=True)
class SoftmaxLaunch:
    """How rows are cut up.

    Attributes:
        block: columns of a tile; a row that is longer is looped over.
        rows: rows of a tile, where a row fits.
    """

    block: int
    rows: int
    num_warps: int

    @classmethod
    def _of(cls, card: Card, block: int, num_elems: int, elems_per_thread: int) -> "SoftmaxLaunch":
        rows = max(1, num_elems // block)
        most_threads = 1024 if card.backend != "hip" else 16 * card.warp_size
        threads = min(max(rows * block // elems_per_thread, card.warp_size), most_threads)
        return cls(block, rows, threads // card.warp_size)

    @classmethod
    def forward(cls, card: Card, n: int, dtype: str, masked: bool) -> "SoftmaxLaunch":
        """One row is held, with its mask."""
        # Registers at 32768 columns, 1024 threads: 50-64 on NVIDIA, 54-65 on gfx90a; with a mask and an odd length
        # sm_86 and sm_89 spill 16 bytes, gfx90a 2-11, gfx1100 (512 threads) 5. Looped over, 16 elements a thread take
        # 58-80, with a mask 80-106, and sm_80 spills 8 bytes; 8 elements 32-58 (ptxas, LLVM, triton 3.9).
        is_tight = masked and (card.backend == "hip" or n % 16 != 0)
        longest = 4096 if dtype == "fp64" else 16384 if is_tight else 32768
        if n > longest:
            return cls._of(card, 4096, 4096, 8 if masked else 16)
        return cls._of(card, max(16, next_power_of_2(n)), 2048, 16)

    @classmethod
    def backward(cls, card: Card, n: int, dtype: str) -> "SoftmaxLaunch":
        """Two rows are held."""
        # 16384 columns: 50-64 registers at 1024 threads, gfx1100 92 at 512. 32768: in fp32 they are all of an SM's
        # registers, and bf16, held as fp32, spills 88-312 bytes on sm_80 to sm_90 with 8, 16 or 32 warps; on AMD
        # 86-188 registers and no spill. Looped over: 40-64 (ptxas, LLVM, triton 3.9).
        longest = 4096 if dtype == "fp64" else 32768 if card.backend == "hip" else 16384
        if n > longest:
            return cls._of(card, 4096, 4096, 16)
        return cls._of(card, max(16, next_power_of_2(n)), 2048, 8)

    @classmethod
    def candidates(cls, card: Card, n: int, dtype: str, masked: bool = False) -> list["SoftmaxLaunch"]:
        """Both ways, for either direction."""
        whole = max(16, next_power_of_2(n))
        found = [cls._of(card, block, block, each) for block in (2048, 4096, 8192) if block < n for each in (8, 16)]
        if whole <= 32768:
            found += [cls._of(card, whole, num, each) for num in (1024, 2048, 4096) for each in (4, 8, 16, 32)]
        return list(dict.fromkeys(found))


def mask_layout(mask: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, tuple[int, int, int, int, int]]:
    """The mask as rows of N, and which of them a row of x takes: (size1, size2, step0, step1, step2) of ``mask_row``.

    Neighbouring axes of x along which the mask does the same are one; only a mask that still varies over more than
    three of them, or along rows not at all, is written out.
    """
    if mask is None:
        return None, (1, 1, 0, 0, 0)
    if mask.shape[-1:] != shape[-1:]:
        mask = mask.expand(*mask.shape[:-1], shape[-1])
    axes: list[tuple[int, int]] = []  # (size, rows of the mask from one to the next), the innermost first
    step = 1
    sizes = (1,) * (len(shape) - mask.ndim) + mask.shape
    for size, own_size in zip(reversed(shape[:-1]), reversed(sizes[:-1]), strict=True):
        own_step = step if own_size > 1 else 0
        step *= own_size
        if axes and own_step == axes[-1][0] * axes[-1][1]:
            axes[-1] = (size * axes[-1][0], axes[-1][1])
        elif size > 1:
            axes.append((size, own_step))
    if len(axes) > 3:
        mask, axes = mask.expand(shape), [(shape[:-1].numel(), 1)]
    axes += [(1, 0)] * (3 - len(axes))
    rows = mask.contiguous()
    if rows.dtype == torch.bool:
        rows = rows.view(torch.uint8)
    return rows, (axes[1][0], axes[0][0], axes[2][1], axes[1][1], axes[0][1])


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Refuse a mask that is neither bool nor float, is elsewhere, or does not go over x."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"softmax: mask is {mask.dtype}, must be bool (True takes part) or a float that is added: mask.bool()"
        )
    if mask.device != x.device:
        raise ValueError(f"softmax: x is on {x.device}, mask on {mask.device}: move one to the other")
    sizes = x.shape[x.ndim - mask.ndim :] if mask.ndim <= x.ndim else ()
    if mask.ndim > x.ndim or any(own not in (1, size) for own, size in zip(mask.shape, sizes, strict=True)):
        raise ValueError(f"softmax: mask {tuple(mask.shape)} cannot be broadcast to x {tuple(x.shape)}")
