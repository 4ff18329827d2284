"""The backward of LayerNorm and RMSNorm; the rows are reached as ``norm_rows`` says.

    x̂ = (z − mean) · r        h = g · (offset + w)        c₁ = mean(h · x̂)        c₂ = mean(h), 0 for RMSNorm
    dz = g_z + r · (h − x̂ · c₁ − c₂)        dx = dropout's mask · dz        dw = Σ_rows g · x̂        db = Σ_rows g

A few programs stay for all rows. Each keeps dw and db of its columns in registers, loads the next rows while it works
on these (``num_stages``: asynchronous copies into shared memory), and leaves one partial row of dw and db in the end;
a second kernel adds the partial rows up. No atomics, so two runs are equal to the last bit.

    row in one block      c₁ and c₂ are summed in registers: each element of z and g crosses the bus once
    row in two blocks     two programs share the rows. Both read all of z and g and sum c₁ and c₂ of the whole row, each
                          keeps the gradients of its half: the bus is crossed once, the L2 cache read twice
    longer                c₁ and c₂ come from a kernel before, row by row; then each block of columns is a stream
                          without any reduction. It runs through the rows backwards, to meet in the L2 cache what the
                          first kernel read last

Bytes beyond the cache, for rows in one or two blocks, itemsize s:
    M · N · (s(g) + s(z) + s(dx)) [+ s(g_z) with a residual, + s(dresidual) if it is not dx] + 16 · P · N for P programs
For longer rows s(g) + s(z) once more, less what the cache kept: 5 passes instead of 3, at most 60 % of the bus by the
count of 3, where a full row of dw and db in fp32 registers would spill (from 16384 on, whatever the number of warps).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._triton import INTERPRETED, accumulator, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.norm_rows import (
    Norm,
    find_body,
    find_edges,
    find_rows,
    keeps,
    norm_features,
    place_body,
    read_weights,
    read_z,
    statistics_dtype,
    vector_elems,
)
from tritonspeed.kernels.rounding import as_scalar, load, store_rounded
from tritonspeed.kernels.tuned import Feature, Tunable, next_power_of_2

ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
PARTIAL_ALIGN = 64  # columns that a partial row is padded to: every tile of the second kernel is full and aligned


@triton.jit
def _read_gradient(
    z_ptr, dy_ptr, at, begin, inside, seed, mean, rstd, w, p, scale, CENTRED: tl.constexpr, ACC: tl.constexpr,
    EVICT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x̂, g and h = g · w of a tile; g and h are 0 outside, so sums may take the whole tile."""
    z = read_z(z_ptr, None, at, begin, inside, seed, p, scale, ACC, EVICT, INTERPRET)
    dy = load(dy_ptr + at, inside, ACC, EVICT)
    x_hat = z * rstd
    if CENTRED:
        x_hat = (z - mean) * rstd
    h = dy
    if w is not None:
        h = dy * w
    return x_hat, dy, h


@triton.jit
def _write_gradient(
    dz_ptr, dx_ptr, dresidual_ptr, at, begin, inside, seed, x_hat, h, rstd, c1, c2, p, scale, CENTRED: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dz, and what follows from it for the residual and for x."""
    d = h - x_hat * c1
    if CENTRED:
        d = d - c2
    d = d * rstd
    if dz_ptr is not None:
        d += load(dz_ptr + at, inside, ACC, "evict_first")
    if dresidual_ptr is not None:
        store_rounded(dresidual_ptr + at, d, inside, INTERPRET)
    if dx_ptr is not None:
        if seed is not None:
            d = tl.where(keeps(seed, at, begin, p), d * scale, 0.0)
        store_rounded(dx_ptr + at, d, inside, INTERPRET)


@triton.jit
def _scale_of(weight_ptr, column, inside, offset, CENTRED: tl.constexpr, ACC: tl.constexpr):
    """offset + w of these columns, None without a weight."""
    w = read_weights(weight_ptr, column, inside, ACC)
    if w is not None and not CENTRED:
        w = w + offset
    return w


@triton.jit
def _store_partial(partial_ptr, column, inside, dw, db, program, num_programs, stride, CENTRED: tl.constexpr):
    """One row of dw, and one of db, which lie num_programs rows apart."""
    at = partial_ptr + program.to(tl.int64) * stride + column
    tl.store(at, tl.sum(dw, axis=0, keep_dims=True), mask=inside)
    if CENTRED:
        tl.store(at + num_programs.to(tl.int64) * stride, tl.sum(db, axis=0, keep_dims=True), mask=inside)


@triton.jit
def _norm_backward_kernel(
    dy_ptr, dz_ptr, z_ptr, weight_ptr, z_seed_ptr, seed_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, dx_ptr, dresidual_ptr,
    partial_ptr, num_rows, num_tiles, n, stride, offset, p, scale, CENTRED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    offset, scale = as_scalar(offset, ACC), as_scalar(scale, ACC)
    z_seed, seed = None, None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if z_seed_ptr is not None:
        z_seed = tl.load(z_seed_ptr)
    program, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    num_programs = tl.num_programs(0) // BLOCKS
    # all rows of a program begin at the same distance from a 16-byte boundary, so these columns are the program's
    start = num_tiles - 1 - program if c1_ptr is not None else program
    row, is_row, head = find_rows(tl.maximum(start, 0), num_rows, n, ROWS, VEC, EDGES)
    column, in_row = find_body(block * BLOCK, head, n, BLOCK, VEC)
    w = _scale_of(weight_ptr, column, in_row, offset, CENTRED, ACC)
    dw, db = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC)
    edge, in_edges = find_edges(head, n, VEC)  # what follows of it is not compiled where there are no edges
    is_mine = edge * 0 + block == 0  # the first block of columns takes care of the edges
    edge_w = _scale_of(weight_ptr if EDGES else None, edge, in_edges, offset, CENTRED, ACC)
    edge_dw, edge_db = tl.zeros([ROWS, 2 * VEC], ACC), tl.zeros([ROWS, 2 * VEC], ACC)

    for i in tl.range(program, num_tiles, num_programs, num_stages=STAGES):
        tile = num_tiles - 1 - i if c1_ptr is not None else i
        row, is_row, _ = find_rows(tile, num_rows, n, ROWS, VEC, EDGES)
        inside = in_row if ROWS == 1 else in_row & is_row
        begin = place_body(row, n, head, block * BLOCK, VEC)
        at = begin + tl.arange(0, BLOCK)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)
        mean = rstd
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)
        x_hat, dy, h = _read_gradient(
            z_ptr, dy_ptr, at, begin, inside, z_seed, mean, rstd, w, p, scale, CENTRED, ACC,
            "evict_first" if BLOCKS == 1 else "", INTERPRET,
        )  # fmt: skip
        edge_at, edge_inside = row * n + edge, in_edges & is_row
        edge_x_hat, edge_dy, edge_h = x_hat, dy, h
        if EDGES:
            edge_x_hat, edge_dy, edge_h = _read_gradient(
                z_ptr, dy_ptr, edge_at, None, edge_inside, z_seed, mean, rstd, edge_w, p, scale, CENTRED, ACC, "",
                INTERPRET,
            )  # fmt: skip
        c2 = rstd
        if c1_ptr is not None:
            c1 = tl.load(c1_ptr + row, mask=is_row, other=0.0)
            if CENTRED:
                c2 = tl.load(c2_ptr + row, mask=is_row, other=0.0)
        else:
            products, sums = h * x_hat, h
            if BLOCKS == 2:  # the other half: only its sums are wanted
                other_column, in_other = find_body((1 - block) * BLOCK, head, n, BLOCK, VEC)
                other_inside = in_other if ROWS == 1 else in_other & is_row
                other_begin = place_body(row, n, head, (1 - block) * BLOCK, VEC)
                other_at = other_begin + tl.arange(0, BLOCK)[None, :]
                other_w = _scale_of(weight_ptr, other_column, in_other, offset, CENTRED, ACC)
                other_x_hat, _, other_h = _read_gradient(
                    z_ptr, dy_ptr, other_at, other_begin, other_inside, z_seed, mean, rstd, other_w, p, scale, CENTRED,
                    ACC, "", INTERPRET,
                )  # fmt: skip
                products += other_h * other_x_hat
                sums += other_h
            c1 = tl.sum(products, axis=1, keep_dims=True)
            if CENTRED:
                c2 = tl.sum(sums, axis=1, keep_dims=True)
            if EDGES:
                c1 += tl.sum(edge_h * edge_x_hat, axis=1, keep_dims=True)
                if CENTRED:
                    c2 += tl.sum(edge_h, axis=1, keep_dims=True)
            c1, c2 = c1 / n, c2 / n
        _write_gradient(
            dz_ptr, dx_ptr, dresidual_ptr, at, begin, inside, seed, x_hat, h, rstd, c1, c2, p, scale, CENTRED, ACC,
            INTERPRET,
        )  # fmt: skip
        if partial_ptr is not None:
            dw += dy * x_hat
            db += dy
        if EDGES:
            _write_gradient(
                dz_ptr, dx_ptr, dresidual_ptr, edge_at, None, edge_inside & is_mine, seed, edge_x_hat, edge_h, rstd,
                c1, c2, p, scale, CENTRED, ACC, INTERPRET,
            )  # fmt: skip
            if partial_ptr is not None:
                edge_dw += edge_dy * edge_x_hat
                edge_db += edge_dy

    if partial_ptr is not None:
        _store_partial(partial_ptr, column, in_row, dw, db, program, num_programs, stride, CENTRED)
        if EDGES:
            inside = in_edges & is_mine
            _store_partial(partial_ptr, edge, inside, edge_dw, edge_db, program, num_programs, stride, CENTRED)


@triton.jit
def _norm_row_constants_kernel(
    dy_ptr, z_ptr, weight_ptr, z_seed_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, num_rows, n, offset, p, scale,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    offset, scale = as_scalar(offset, ACC), as_scalar(scale, ACC)
    z_seed = None
    if z_seed_ptr is not None:
        z_seed = tl.load(z_seed_ptr)
    row, is_row, head = find_rows(tl.program_id(0), num_rows, n, 1, VEC, EDGES)
    rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)
    mean = rstd
    if CENTRED:
        mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)
    products, sums = tl.zeros([1, BLOCK], ACC), tl.zeros([1, BLOCK], ACC)
    for i in range(tl.cdiv(n, BLOCK)):
        column, inside = find_body(i * BLOCK, head, n, BLOCK, VEC)
        begin = place_body(row, n, head, i * BLOCK, VEC)
        at = begin + tl.arange(0, BLOCK)[None, :]
        w = _scale_of(weight_ptr, column, inside, offset, CENTRED, ACC)
        x_hat, _, h = _read_gradient(
            z_ptr, dy_ptr, at, begin, inside, z_seed, mean, rstd, w, p, scale, CENTRED, ACC, "", INTERPRET,
        )  # fmt: skip
        products += h * x_hat
        sums += h
    c1, c2 = tl.sum(products, axis=1, keep_dims=True), tl.sum(sums, axis=1, keep_dims=True)
    if EDGES:
        edge, inside = find_edges(head, n, VEC)
        w = _scale_of(weight_ptr, edge, inside, offset, CENTRED, ACC)
        x_hat, _, h = _read_gradient(
            z_ptr, dy_ptr, row * n + edge, None, inside, z_seed, mean, rstd, w, p, scale, CENTRED, ACC, "", INTERPRET,
        )  # fmt: skip
        c1 += tl.sum(h * x_hat, axis=1, keep_dims=True)
        c2 += tl.sum(h, axis=1, keep_dims=True)
    tl.store(c1_ptr + row, c1 / n)
    if CENTRED:
        tl.store(c2_ptr + row, c2 / n)


@triton.jit(do_not_specialize=["num_partials"])
def _add_partials_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, num_partials, n, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    lane = tl.arange(0, ROWS)[:, None]
    partial_ptr += tl.program_id(1).to(tl.int64) * num_partials * stride
    sums = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(0, num_partials, ROWS):
        row = first + lane
        sums += load(partial_ptr + row.to(tl.int64) * stride + column, row < num_partials, ACC, "evict_first")
    total = tl.sum(sums, axis=0, keep_dims=True)
    if tl.program_id(1) == 0:
        if dweight_ptr is not None:
            store_rounded(dweight_ptr + column, total, column < n, INTERPRET)
    else:
        if dbias_ptr is not None:
            store_rounded(dbias_ptr + column, total, column < n, INTERPRET)


@dataclass(frozen=True, slots=True)
class NormBackwardLaunch:
    """How a backward pass is launched.

    Attributes:
        rows: neighbouring rows of one tile; 1 where ``block`` is shorter than the row.
        block: columns of one program, a power of two.
        num_warps: warps of one program.
        num_stages: tiles in flight, 1 without asynchronous copies.
        programs_per_sm: programs that share the rows, for each multiprocessor.
    """

    rows: int
    block: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @classmethod
    def heuristic(
        cls, card: Card, n: int, dtype: str, edges: bool, dropout: bool, residual: bool, **features: Feature
    ) -> "NormBackwardLaunch":
        """As many columns as their gradients fit in registers, and programs that fill the multiprocessors once."""
        itemsize = ITEMSIZE[dtype]
        block = max(16, next_power_of_2(n))
        rows = max(1, 2048 // block) if block <= 1024 else 1
        widest = 8192 if itemsize <= 4 else 2048
        crowded, is_amd = edges and dropout, card.backend == "hip"
        if (crowded and not is_amd) or (itemsize == 4 and residual):
            widest //= 2  # at 8192: 40-176 bytes a thread spilled with both, 20 on sm_100 with an fp32 residual
        num_read = 2 + residual
        if block == 2 * widest and widest * itemsize <= 16384 and not (crowded and is_amd):
            block, num_read = widest, num_read + 2  # two share the row; 8192 of fp32 spill 136 bytes there, gfx950 293
        elif block > widest:
            block = min(4096, widest)
        # 16 elements a thread take 97-128 registers (ptxas, sm_90): 512 threads fill a multiprocessor. A tile of 8192
        # on the way while another is worked on is 32 KiB in flight, more than 3.35 TB/s · 700 ns / 132 = 18 KiB
        threads = min(512, max(128, rows * block // 16))
        fits = (rows * block * itemsize * num_read) + 1024 <= card.max_shared_bytes
        return cls(rows, block, max(1, threads // card.warp_size), 2 if fits else 1, max(1, 512 // threads))

    @classmethod
    def candidates(cls, card: Card, n: int, dtype: str, **features: Feature) -> list["NormBackwardLaunch"]:
        """4 to 16 elements a thread, whole rows and parts, with less and more of them in flight."""
        block = max(16, next_power_of_2(n))
        tiles = [(rows, block) for rows in (1, 2, 4, 8, 16) if (1024 <= rows * block <= 8192 or rows == 1)]
        tiles = [tile for tile in tiles if tile[1] <= 8192]
        if block > 4096:
            tiles += [(1, part) for part in (2048, 4096, 8192) if part < block]
        return [
            cls(rows, columns, threads // card.warp_size, stages, programs)
            for rows, columns in tiles
            for threads in (128, 256, 512, 1024)
            for stages in (1, 2, 3)
            for programs in (1, 2, 4, 8)
            if 4 <= rows * columns // threads <= 16 and 256 <= threads * programs <= 2048
        ]


NORM_BACKWARD = Tunable(
    "norm_backward",
    (_norm_backward_kernel, _norm_row_constants_kernel, _add_partials_kernel),
    NormBackwardLaunch,
    NormBackwardLaunch.heuristic,
    NormBackwardLaunch.candidates,
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients, and in which types.

    Attributes:
        dx: its type; None where it is not wanted, or equal to dresidual.
        dresidual: its type; None where it is not wanted.
        parameters: whether dweight and dbias are wanted.
        has_residual: then z is what was normalised, else x before dropout.
    """

    dx: torch.dtype | None
    dresidual: torch.dtype | None
    parameters: bool
    has_residual: bool


def launch_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Norm,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight, dbias; None for what is not wanted.

    Args:
        dy, dz: (..., N), contiguous; dz is z's own gradient.
        z: what was normalised; without a residual x, before dropout.
        bias: only its type matters.
        seed: () int64, None without dropout.
        mean, rstd: (M,), mean None unless centred.
    """
    n = z.shape[-1]
    num_rows = z.numel() // max(n, 1)
    dx = None if wanted.dx is None else torch.empty_like(z, dtype=wanted.dx)
    dresidual = None if wanted.dresidual is None else torch.empty_like(z, dtype=wanted.dresidual)
    z_seed = None if wanted.has_residual else seed
    vec = vector_elems(dy, dz, z, dx, dresidual)
    has_edges = n % vec != 0
    acc = statistics_dtype(rstd)
    dweight = torch.zeros_like(weight) if weight is not None and wanted.parameters else None
    dbias = torch.zeros_like(bias) if bias is not None and wanted.parameters else None
    if not num_rows or not n:
        return dx, dresidual, dweight, dbias
    with on_device_of(z):
        card = card_of(z)
        widest = max(dy, z, key=Tensor.element_size)
        how = NORM_BACKWARD.resolve(card, **norm_features(n, num_rows, widest, norm, has_edges, wanted.has_residual))
        blocks = triton.cdiv(n, how.block)
        rows, step = (how.rows if blocks == 1 else 1), vec if has_edges else 1
        num_tiles = num_rows if rows == 1 else triton.cdiv(num_rows, rows * step) * step
        programs = max(1, min(num_tiles, card.num_sms * how.programs_per_sm // blocks))
        programs = triton.cdiv(programs, step) * step
        stride = triton.cdiv(n, PARTIAL_ALIGN) * PARTIAL_ALIGN
        partial = None
        if dweight is not None or dbias is not None:
            partial = z.new_empty((2 if norm.centred else 1) * programs, stride, dtype=acc)
        shared = {
            "CENTRED": norm.centred, "BLOCK": how.block, "VEC": vec, "EDGES": has_edges, "ACC": accumulator(acc),
            "INTERPRET": INTERPRETED, "num_warps": how.num_warps,
        }  # fmt: skip
        c1 = c2 = None
        if blocks > 2:
            c1, c2 = torch.empty_like(rstd), torch.empty_like(rstd) if norm.centred else None
            launch(
                _norm_row_constants_kernel, (num_rows,),
                dy, z, weight, z_seed, mean, rstd, c1, c2, num_rows, n, norm.offset, norm.dropout_p, norm.scale,
                **shared,
            )  # fmt: skip
        launch(
            _norm_backward_kernel, (programs * blocks,),
            dy, dz, z, weight, z_seed, seed, mean, rstd, c1, c2, dx, dresidual, partial, num_rows, num_tiles, n, stride,
            norm.offset, norm.dropout_p, norm.scale, ROWS=rows, BLOCKS=blocks, STAGES=how.num_stages, **shared,
        )  # fmt: skip
        if partial is not None:
            # 32 columns are one 128-byte line of each partial row: 4096 columns make 128 programs (256 with db)
            launch(
                _add_partials_kernel, (stride // 32, 2 if norm.centred else 1),
                partial, dweight, dbias, programs, n, stride, ROWS=64, COLUMNS=32, ACC=accumulator(acc),
                INTERPRET=INTERPRETED, num_warps=256 // card.warp_size,
            )  # fmt: skip
    return dx, dresidual, dweight, dbias
