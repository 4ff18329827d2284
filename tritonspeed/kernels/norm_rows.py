"""What LayerNorm and RMSNorm share: how a row is reached, its dropout mask, and the forward kernels.

    z = residual + dropout(x)        y = (z − mean) · r · (offset + w) + b        r = 1 / sqrt(mean((z − mean)²) + eps)

RMSNorm is the same with mean = 0 (CENTRED off), LayerNorm with offset = 0.

How a row of any length is read 16 bytes at a time
    Row i of (M, N) begins at element i · N. Where VEC = 16 / itemsize (at least 4) does not divide N, rows begin
    anywhere between two 16-byte boundaries. So a row is cut into a *body* of whole aligned vectors and *edges*: up to
    VEC − 1 elements before it and as many after it, loaded with a mask as one tile of 2 · VEC. The body is masked by
    vectors, never by elements (``column // VEC < num_vectors``): such a mask leaves 16-byte accesses whole. Rows VEC
    apart begin at the same distance from a boundary: a program takes only such rows, so its columns stay where they
    are in its registers, and weights and their gradients with them. Where VEC divides N there are no edges, and the
    rows of a tile are neighbours.

The row stays in registers up to ``MAX_HELD`` elements; a longer one is read twice, the second time out of the L2 cache
as long as num_sms · N · itemsize fits in there. The variance is that of z − mean, never a difference of two sums; in
the loop each lane keeps Welford's running mean and squares, and lanes are put together by Chan's formula.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._triton import INTERPRETED, accumulator, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import as_scalar, load, philox_reference, round_nearest, store_rounded
from tritonspeed.kernels.tuned import Feature, Tunable, dtype_name, next_power_of_2

MAX_HELD = 16384  # elements of a row that stay in registers


def dropout_reference(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Dropout with the kernels' mask.

    Element e = row · N + column has word e mod 4 of philox4x32-7(key = seed, counter = e div 4); its upper 24 bits as a
    fraction in [0, 1) keep the element where they are at least p.

    Args:
        x: (..., N), fp32 or fp64.
        p: 0 ≤ p < 1.
        seed: 0 ≤ seed < 2⁶³, or () int64 on x's device.
    """
    counter = torch.arange(-(-x.numel() // 4), device=x.device, dtype=torch.int64)
    words = torch.stack(philox_reference(seed, counter), dim=1).flatten()[: x.numel()]
    threshold, scale = (torch.full((), value, dtype=torch.float32, device=x.device) for value in (p, 1 / (1 - p)))
    kept = (words >> 8).float() * 2.0**-24 >= threshold
    return torch.where(kept.view(x.shape), x * scale.to(x.dtype), 0.0)  # fp32 numbers, as a kernel is passed them


@triton.jit
def find_rows(tile, num_rows, n, ROWS: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr):
    """The rows of a tile: int64 [ROWS, 1], the mask of those that exist, and the columns before the body."""
    lane = tl.arange(0, ROWS)[:, None].to(tl.int64)
    tile = tile.to(tl.int64)
    if EDGES:
        first = tile // VEC * (ROWS * VEC) + tile % VEC
        row = first + lane * VEC
        head = tl.minimum((VEC - first * n % VEC) % VEC, n).to(tl.int32)
    else:
        row = tile * ROWS + lane
        head = 0
    return row, row < num_rows, head


@triton.jit
def find_edges(head, n, VEC: tl.constexpr):
    """The columns before and after the body, [1, 2 · VEC], and which of them exist."""
    lane = tl.arange(0, 2 * VEC)[None, :]
    end = head + (n - head) // VEC * VEC
    return tl.where(lane < VEC, lane, end + lane - VEC), (lane < head) | ((lane >= VEC) & (end + lane - VEC < n))


@triton.jit
def find_body(first, head, n, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """BLOCK columns of the body from its element ``first``, a multiple of VEC: columns and mask, both [1, BLOCK]."""
    lane = tl.arange(0, BLOCK)[None, :]
    return head + (first + lane), lane // VEC + first // VEC < (n - head) // VEC


@triton.jit
def place_body(row, n, head, first, VEC: tl.constexpr):
    """Where that piece begins in memory, [ROWS, 1]: the compiler sees that it is at a multiple of VEC."""
    return (row * n + head) // VEC * VEC + first


@triton.jit
def keeps(seed, at, begin, p):
    """Dropout's mask of the elements ``at``; if they lie side by side from ``begin`` on, four share a philox call."""
    index = at
    if begin is not None:
        index = begin + 4 * tl.arange(0, at.shape[1] // 4)[None, :]
    group = index // 4
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=tl.constexpr(7))
    if begin is not None:
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, BLOCK/4, 2, 2]: word 2a + b at (·, ·, a, b)
        word = tl.reshape(pairs, [at.shape[0], at.shape[1]])
    else:
        lane = at % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= tl.cast(p, tl.float32)


@triton.jit
def read_z(
    x_ptr, residual_ptr, at, begin, inside, seed, p, scale, ACC: tl.constexpr, EVICT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x), as it is after rounding to the residual's type; ``begin`` as in ``keeps``."""
    z = load(x_ptr + at, inside, ACC, EVICT)
    if seed is not None:
        z = tl.where(keeps(seed, at, begin, p), z * scale, 0.0)
    if residual_ptr is not None:
        z = load(residual_ptr + at, inside, ACC, EVICT) + z
        z = round_nearest(z, residual_ptr.dtype.element_ty, INTERPRET).to(ACC)
    return z


@triton.jit
def write_y(y_ptr, at, z, mean, rstd, w, b, offset, inside, CENTRED: tl.constexpr, INTERPRET: tl.constexpr):
    """(z − mean) · r · (offset + w) + b, rounded."""
    y = z * rstd
    if CENTRED:
        y = (z - mean) * rstd
    if w is not None:
        if not CENTRED:
            w = w + offset
        y = y * w
    if b is not None:
        y = y + b
    store_rounded(y_ptr + at, y, inside, INTERPRET)


@triton.jit
def read_weights(at_ptr, column, inside, ACC: tl.constexpr):
    """A piece of weight or bias, None where there is none; every program reads it again, so it stays in the cache."""
    w = None
    if at_ptr is not None:
        w = load(at_ptr + column, inside, ACC, "evict_last")
    return w


@triton.jit
def _norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, num_rows, n, eps, offset, p,
    scale, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    eps, offset, scale = as_scalar(eps, ACC), as_scalar(offset, ACC), as_scalar(scale, ACC)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row, is_row, head = find_rows(tl.program_id(0), num_rows, n, ROWS, VEC, EDGES)
    column, in_row = find_body(0, head, n, BLOCK, VEC)
    inside = in_row if ROWS == 1 else in_row & is_row
    begin = place_body(row, n, head, 0, VEC)
    at = begin + tl.arange(0, BLOCK)[None, :]
    z = read_z(x_ptr, residual_ptr, at, begin, inside, seed, p, scale, ACC, "evict_first", INTERPRET)
    LATE: tl.constexpr = ROWS * BLOCK > 8192  # before the sums they load beside z, after them they need no registers
    w, b = None, None
    if not LATE:
        w = read_weights(weight_ptr, column, in_row, ACC)
        b = read_weights(bias_ptr, column, in_row, ACC)
    edge, in_edges = find_edges(head, n, VEC)  # what follows of it is not compiled where there are no edges
    edge_at, edge_inside, edge_z = row * n + edge, in_edges & is_row, z
    if EDGES:
        edge_z = read_z(x_ptr, residual_ptr, edge_at, None, edge_inside, seed, p, scale, ACC, "", INTERPRET)
    mean = tl.zeros([ROWS, 1], ACC)
    centred = z
    if CENTRED:
        mean = tl.sum(z, axis=1, keep_dims=True)
        if EDGES:
            mean += tl.sum(edge_z, axis=1, keep_dims=True)
        mean = mean / n
        centred = tl.where(inside, z - mean, 0.0)
    squares = tl.sum(centred * centred, axis=1, keep_dims=True)
    if EDGES:
        centred = tl.where(edge_inside, edge_z - mean, 0.0)
        squares += tl.sum(centred * centred, axis=1, keep_dims=True)
    rstd = tl.rsqrt(squares / n + eps)
    if CENTRED:
        tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)
    if LATE:
        w = read_weights(weight_ptr, column, in_row, ACC)
        b = read_weights(bias_ptr, column, in_row, ACC)
    write_y(y_ptr, at, z, mean, rstd, w, b, offset, inside, CENTRED, INTERPRET)
    if z_ptr is not None:
        store_rounded(z_ptr + at, z, inside, INTERPRET)
    if EDGES:
        w = read_weights(weight_ptr, edge, in_edges, ACC)
        b = read_weights(bias_ptr, edge, in_edges, ACC)
        write_y(y_ptr, edge_at, edge_z, mean, rstd, w, b, offset, edge_inside, CENTRED, INTERPRET)
        if z_ptr is not None:
            store_rounded(z_ptr + edge_at, edge_z, edge_inside, INTERPRET)


@triton.jit
def _norm_forward_long_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, num_rows, n, eps, offset, p,
    scale, CENTRED: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    eps, offset, scale = as_scalar(eps, ACC), as_scalar(offset, ACC), as_scalar(scale, ACC)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row, is_row, head = find_rows(tl.program_id(0), num_rows, n, 1, VEC, EDGES)
    num_blocks = tl.cdiv(n, BLOCK)
    lane_mean, lane_squares = tl.zeros([1, BLOCK], ACC), tl.zeros([1, BLOCK], ACC)
    for i in range(num_blocks):
        column, inside = find_body(i * BLOCK, head, n, BLOCK, VEC)
        begin = place_body(row, n, head, i * BLOCK, VEC)
        at = begin + tl.arange(0, BLOCK)[None, :]
        z = read_z(x_ptr, residual_ptr, at, begin, inside, seed, p, scale, ACC, "", INTERPRET)
        if z_ptr is not None:
            store_rounded(z_ptr + at, z, inside, INTERPRET)
        if CENTRED:
            step = tl.where(inside, z - lane_mean, 0.0)
            lane_mean += step * (tl.full([], 1.0, ACC) / (i + 1))
            lane_squares += step * tl.where(inside, z - lane_mean, 0.0)
        else:
            lane_squares += z * z
    mean = tl.zeros([1, 1], ACC)
    edge, in_edges = find_edges(head, n, VEC)
    edge_at, edge_z = row * n + edge, mean
    if EDGES:
        edge_z = read_z(x_ptr, residual_ptr, edge_at, None, in_edges, seed, p, scale, ACC, "", INTERPRET)
    if CENTRED:
        lane_count = (((n - head) // VEC * VEC - tl.arange(0, BLOCK)[None, :] + BLOCK - 1) // BLOCK).to(ACC)
        mean = tl.sum(lane_count * lane_mean, axis=1, keep_dims=True)
        if EDGES:
            mean += tl.sum(edge_z, axis=1, keep_dims=True)
        mean = mean / n
        lane_squares += lane_count * (lane_mean - mean) * (lane_mean - mean)
    squares = tl.sum(lane_squares, axis=1, keep_dims=True)
    if EDGES:
        centred = tl.where(in_edges, edge_z - mean, 0.0)
        squares += tl.sum(centred * centred, axis=1, keep_dims=True)
        if z_ptr is not None:
            store_rounded(z_ptr + edge_at, edge_z, in_edges, INTERPRET)
    rstd = tl.rsqrt(squares / n + eps)
    if CENTRED:
        tl.store(mean_ptr + row, mean, mask=is_row)
    tl.store(rstd_ptr + row, rstd, mask=is_row)
    tl.debug_barrier()  # z is read again below, perhaps by other threads than wrote it
    for i in range(num_blocks):
        column, inside = find_body(i * BLOCK, head, n, BLOCK, VEC)
        begin = place_body(row, n, head, i * BLOCK, VEC)
        at = begin + tl.arange(0, BLOCK)[None, :]
        if z_ptr is not None:
            z = load(z_ptr + at, inside, ACC, "")
        else:
            z = read_z(x_ptr, None, at, begin, inside, seed, p, scale, ACC, "evict_first", INTERPRET)
        w = read_weights(weight_ptr, column, inside, ACC)
        b = read_weights(bias_ptr, column, inside, ACC)
        write_y(y_ptr, at, z, mean, rstd, w, b, offset, inside, CENTRED, INTERPRET)
    if EDGES:
        w = read_weights(weight_ptr, edge, in_edges, ACC)
        b = read_weights(bias_ptr, edge, in_edges, ACC)
        write_y(y_ptr, edge_at, edge_z, mean, rstd, w, b, offset, in_edges, CENTRED, INTERPRET)


@dataclass(frozen=True, slots=True)
class NormForwardLaunch:
    """How a forward pass is launched.

    Attributes:
        rows: neighbouring rows of one program; 1 where ``block`` is shorter than the row.
        block: columns held at once, a power of two; the row is read twice where it is longer than this.
        num_warps: warps of one program.
    """

    rows: int
    block: int
    num_warps: int

    @classmethod
    def heuristic(
        cls, card: Card, n: int, dtype: str, edges: bool, dropout: bool, **features: Feature
    ) -> "NormForwardLaunch":
        """The whole row in registers, several where they are short; a long one in parts."""
        # fp64 is for gradcheck; 16384 with edges and dropout spill 16-104 bytes a thread (sm_80, sm_100)
        if n > (4096 if dtype == "fp64" else MAX_HELD // 2 if edges and dropout else MAX_HELD):
            # 1024 threads × 8 elements: 44-62 registers (ptxas, sm_90). One program fills a multiprocessor, so the rows
            # at work are few and the second pass finds them in the L2 cache: 132 rows of 131072 in bf16 are 34 MB
            return cls(rows=1, block=8192 if dtype != "fp64" else 2048, num_warps=1024 // card.warp_size)
        block = max(16, next_power_of_2(n))
        rows = max(1, 4096 // block) if block <= 1024 else 1
        # 16 elements a thread: two 16-byte loads of bf16 on the way in 46-48 registers (80 with edges), 5 programs of
        # 256 threads a multiprocessor, 40 KiB in flight; 16384: 32 elements a thread in 64-128 (ptxas, sm_90)
        threads = min(512, max(128, rows * block // 16))
        return cls(rows, block, threads // card.warp_size)

    @classmethod
    def candidates(cls, card: Card, n: int, **features: Feature) -> list["NormForwardLaunch"]:
        """4 to 64 elements a thread, whole rows and parts."""
        block = max(16, next_power_of_2(n))
        tiles = [(rows, block) for rows in (1, 2, 4, 8, 16, 32) if 1024 <= rows * block <= 8192 or rows == 1]
        if block > 4096:
            tiles += [(1, part) for part in (4096, 8192, 16384) if part < block]
        return [
            cls(rows, columns, threads // card.warp_size)
            for rows, columns in tiles
            for threads in (128, 256, 512, 1024)
            if 4 <= rows * columns // threads <= 64 and threads // card.warp_size >= 1
        ]


NORM_FORWARD = Tunable(
    "norm_forward",
    (_norm_forward_kernel, _norm_forward_long_kernel),
    NormForwardLaunch,
    NormForwardLaunch.heuristic,
    NormForwardLaunch.candidates,
)


@dataclass(frozen=True, slots=True)
class Norm:
    """Which norm: the numbers that both directions need.

    Attributes:
        centred: LayerNorm, else RMSNorm.
        eps: added to the mean square, under the root.
        offset: added to the weight (RMSNorm).
        dropout_p: 0 ≤ p < 1.
    """

    centred: bool
    eps: float
    offset: float
    dropout_p: float

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return 1 / (1 - self.dropout_p)


def vector_elems(*tensors: Tensor | None) -> int:
    """Elements of 16 bytes in the narrowest of these types, at least the 4 that share a philox call."""
    return max(4, 16 // min(x.element_size() for x in tensors if x is not None))


def norm_features(n: int, num_rows: int, x: Tensor, norm: Norm, edges: bool, residual: bool) -> dict[str, Feature]:
    """What a good launch depends on."""
    return {
        "n": n, "rows": next_power_of_2(num_rows), "dtype": dtype_name(x.dtype), "centred": norm.centred,
        "edges": edges, "dropout": norm.dropout_p > 0, "residual": residual,
    }  # fmt: skip


def statistics_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 where one of the tensors is."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def launch_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, z (None without a residual), mean (None unless centred) and 1 / root mean square of each row.

    Args:
        x, residual: (..., N), contiguous.
        weight, bias: (N,), contiguous.
        seed: () int64, None without dropout.
    """
    n = x.shape[-1]
    num_rows = x.numel() // max(n, 1)
    dtype = statistics_dtype(x, residual)
    y, z = torch.empty_like(x), None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(num_rows, dtype=dtype) if norm.centred else None
    rstd = x.new_empty(num_rows, dtype=dtype)
    vec = vector_elems(x, residual)
    has_edges = n % vec != 0
    with on_device_of(x):
        widest = x if residual is None else max(x, residual, key=Tensor.element_size)
        features = norm_features(n, num_rows, widest, norm, has_edges, residual is not None)
        how = NORM_FORWARD.resolve(card_of(x), **features)
        held = how.block >= n
        constants = {"CENTRED": norm.centred, "BLOCK": how.block, "VEC": vec, "EDGES": has_edges}
        tiles = num_rows
        if held:
            constants["ROWS"] = how.rows
            if how.rows > 1:
                step = vec if has_edges else 1
                tiles = triton.cdiv(num_rows, how.rows * step) * step
        launch(
            _norm_forward_kernel if held else _norm_forward_long_kernel, (tiles if n else 0,),
            x, residual, weight, bias, seed, y, z, mean, rstd, num_rows, n, norm.eps, norm.offset, norm.dropout_p,
            norm.scale, **constants, ACC=accumulator(dtype), INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip
    return y, z, mean, rstd
