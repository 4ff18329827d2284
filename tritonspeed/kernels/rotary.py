"""Rotary position embedding: turn pairs of a query's and a key's elements by angles that grow with the position.

    (x₁, x₂) → (x₁ · cos θ − x₂ · sin θ,  x₂ · cos θ + x₁ · sin θ)          for each of the R / 2 pairs of a head
    backward: the same by −θ          the elements from R on stay what they are
    halves (Llama): pair j is (j, j + R/2)          interleaved (GPT-J): pair j is (2j, 2j + 1)

Shapes   q: (B, S, Hq, D), k: (B, S, Hk, D), or (B, Hq, S, D) with sequence_dim 2   cos, sin: (S, R/2) or (B, S, R/2)
Types    q, k fp32, fp16, bf16 or fp64; cos, sin any float; computed in fp32 (fp64), rounded once
Bytes    2·B·S·(Hq + Hk)·D·itemsize + 4·R·S for fp32 cos and sin, forward and backward; in place R instead of D
Flops    3·B·S·(Hq + Hk)·R
Source   Su et al. 2021, "RoFormer", arXiv:2104.09864
Roof     not measured yet                                               (device, date, % of HBM, shape)

One launch for q and k. A program holds cos and sin of a few positions in registers and walks over several heads.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import (
    INTERPRETED,
    accumulator,
    card_of,
    check_device,
    launch,
    on_device_of,
    takes_reference,
    tl,
    triton,
)
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import load, round_nearest, store_rounded
from tritonspeed.kernels.tuned import Tunable, dtype_name, next_power_of_2

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, sequence_dim: int, rotary_dim: int
) -> tuple[Tensor, Tensor]:
    """What the kernel must equal; also what CPU tensors take. cos and sin may be R/2 or R wide."""
    half = rotary_dim // 2
    columns = slice(None, None, 2) if interleaved and cos.shape[-1] == rotary_dim else slice(half)
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = (table[..., columns].to(wide).unsqueeze(-1 - sequence_dim) for table in (cos, sin))  # one for all heads

    def turned(x: Tensor) -> Tensor:
        pairs, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
        x1, x2 = pairs.unflatten(-1, (half, 2)).unbind(-1) if interleaved else pairs.chunk(2, -1)
        both = (x1 * c - x2 * s, x2 * c + x1 * s)
        done = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
        return torch.cat((done.to(x.dtype), rest), -1)

    return turned(q), turned(k)


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, x_at, out_at, x_head, out_head, first, last, cos, sin, exists,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Heads first to last at some positions: x_at, out_at, exists [BLOCK_S, 1]; cos, sin [BLOCK_S, BLOCK_HALF]."""
    lane = tl.arange(0, BLOCK_HALF)[None, :]
    both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    for head in range(first, last):
        x = x_ptr + tl.cast(head, tl.int64) * x_head + x_at
        out = out_ptr + tl.cast(head, tl.int64) * out_head + out_at
        if INTERLEAVED:
            pairs = load(x + both, exists & (both < 2 * HALF), ACC, "evict_first")
            x1, x2 = tl.split(tl.reshape(pairs, [pairs.shape[0], BLOCK_HALF, 2]))
            turned = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
            turned = round_nearest(tl.reshape(turned, pairs.shape), out_ptr.dtype.element_ty, INTERPRET)
            tl.store(out + both, turned, mask=exists & (both < 2 * HALF))
        else:
            inside = exists & (lane < HALF)
            x1 = load(x + lane, inside, ACC, "evict_first")
            x2 = load(x + HALF + lane, inside, ACC, "evict_first")
            store_rounded(out + lane, x1 * cos - x2 * sin, inside, INTERPRET)
            store_rounded(out + HALF + lane, x2 * cos + x1 * sin, inside, INTERPRET)
        if REST > 0:
            inside = exists & (rest < 2 * HALF + REST)
            tl.store(out + rest, tl.load(x + rest, mask=inside, other=0.0), mask=inside)


_STRIDES = [f"{name}_{axis}" for name in ("q", "k", "q_out", "k_out") for axis in ("batch", "position", "head")] + [
    f"{name}_{axis}" for name in ("cos", "sin") for axis in ("batch", "position")
]


@triton.jit(do_not_specialize=["S", "q_heads", "k_heads", *_STRIDES])
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, S, q_heads, k_heads,
    q_batch, q_position, q_head, k_batch, k_position, k_head,
    q_out_batch, q_out_position, q_out_head, k_out_batch, k_out_position, k_out_head,
    cos_batch, cos_position, sin_batch, sin_position,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, TABLE_STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    group = tl.program_id(0) % groups  # the groups of one position are neighbours: so are their elements
    block = tl.program_id(0) // groups
    blocks = tl.cdiv(S, BLOCK_S)
    batch = (block // blocks).to(tl.int64)
    position = (block % blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]  # int64: so are all offsets
    exists = position < S

    lane = tl.arange(0, BLOCK_HALF)[None, :]
    inside = exists & (lane < HALF)
    # strides come divided by UNIT, so that the compiler sees what divides them
    cos_at = batch * cos_batch * TABLE_UNIT + position * cos_position * TABLE_UNIT + lane * TABLE_STEP
    sin_at = batch * sin_batch * TABLE_UNIT + position * sin_position * TABLE_UNIT + lane * TABLE_STEP
    cos = load(cos_ptr + cos_at, inside, ACC, "evict_last")
    sin = load(sin_ptr + sin_at, inside, ACC, "evict_last")
    if CONJUGATE:
        sin = -sin
    if group < q_groups:
        _rotate_heads(
            q_ptr, q_out_ptr, (batch * q_batch + position * q_position) * UNIT,
            (batch * q_out_batch + position * q_out_position) * UNIT, q_head * UNIT, q_out_head * UNIT,
            group * HEADS, tl.minimum(group * HEADS + HEADS, q_heads), cos, sin, exists,
            HALF, REST, BLOCK_HALF, BLOCK_REST, INTERLEAVED, ACC, INTERPRET,
        )  # fmt: skip
    else:
        group -= q_groups
        _rotate_heads(
            k_ptr, k_out_ptr, (batch * k_batch + position * k_position) * UNIT,
            (batch * k_out_batch + position * k_out_position) * UNIT, k_head * UNIT, k_out_head * UNIT,
            group * HEADS, tl.minimum(group * HEADS + HEADS, k_heads), cos, sin, exists,
            HALF, REST, BLOCK_HALF, BLOCK_REST, INTERLEAVED, ACC, INTERPRET,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RotaryLaunch:
    """How the work is cut up.

    Attributes:
        block_s: positions of a program.
        heads: that a program walks over with the same cos and sin.
    """

    block_s: int
    heads: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card, batch: int, s: int, heads: int, rotary_dim: int, dtype: str) -> "RotaryLaunch":
        """As many heads a program as leave every SM a few."""
        half = next_power_of_2(rotary_dim // 2)
        block_s = min(max(1, 1024 // half), s)
        threads = min(max(block_s * half // 8, card.warp_size), 16 * card.warp_size)
        # 8 + 8 elements a thread: 48 registers (64 where a rest is copied), no shared memory for powers of two (ptxas).
        # cos and sin in fp32 are as many bytes as one bf16 head moves: at 8 heads they add an eighth, from the L2
        shared = 8
        while shared > 1 and batch * triton.cdiv(s, block_s) * triton.cdiv(heads, shared) < 4 * card.num_sms:
            shared //= 2
        return cls(block_s, shared, threads // card.warp_size)

    @classmethod
    def candidates(
        cls, card: Card, batch: int, s: int, heads: int, rotary_dim: int, dtype: str
    ) -> list["RotaryLaunch"]:
        """Tiles of 512 to 2048 pairs, 1 to 16 heads."""
        half = next_power_of_2(rotary_dim // 2)
        blocks = sorted({min(max(1, elems // half), s) for elems in (512, 1024, 2048)})
        warps = sorted({min(16, max(1, block * half // each // card.warp_size)) for block in blocks for each in (4, 8)})
        groups = [shared for shared in (1, 2, 4, 8, 16) if shared < 2 * heads]
        return [cls(block, shared, num) for block in blocks for shared in groups for num in warps]


ROTARY = Tunable("rotary", (_rotary_kernel,), RotaryLaunch, RotaryLaunch.heuristic, RotaryLaunch.candidates)


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is turned how, in the operators' order.

    Attributes:
        sequence_dim: 1 for (B, S, H, D), 2 for (B, H, S, D).
        rotary_dim: R, elements of a head that are turned.
        interleaved: pairs are neighbours.
        conjugate: by −θ.
    """

    sequence_dim: int
    rotary_dim: int
    interleaved: bool
    conjugate: bool


def _strides(x: Tensor, sequence_dim: int) -> list[int]:
    """From one batch, position and head to the next; an axis of one element has none."""
    return [x.stride(axis) if x.shape[axis] > 1 else 0 for axis in (0, sequence_dim, 3 - sequence_dim)]


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_rotary(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, how: Rotation) -> None:
    """The op on a GPU, and on a CPU under the interpreter; the outputs may be the inputs."""
    cos, sin = (_with_dense_rows(table).expand(q.shape[0], *table.shape[-2:]) for table in (cos, sin))
    s, heads, head_dim = q.shape[how.sequence_dim], 3 - how.sequence_dim, q.shape[-1]
    strides = [stride for x in (q, k, q_out, k_out) for stride in _strides(x, how.sequence_dim)]
    table_strides = [table.stride(axis) if table.shape[axis] > 1 else 0 for table in (cos, sin) for axis in (0, 1)]
    unit, table_unit = math.gcd(16 // q.element_size(), *strides), math.gcd(16 // cos.element_size(), *table_strides)
    half, rest = how.rotary_dim // 2, 0 if q_out is q else head_dim - how.rotary_dim
    with on_device_of(q):
        num_heads = q.shape[heads] + k.shape[heads]
        at = ROTARY.resolve(
            card_of(q), batch=next_power_of_2(q.shape[0]), s=next_power_of_2(s), heads=num_heads,
            rotary_dim=how.rotary_dim, dtype=dtype_name(q.dtype),
        )  # fmt: skip
        groups = triton.cdiv(q.shape[heads], at.heads) + triton.cdiv(k.shape[heads], at.heads)
        launch(
            _rotary_kernel, (q.shape[0] * triton.cdiv(s, at.block_s) * groups,),
            q, k, q_out, k_out, cos, sin, s, q.shape[heads], k.shape[heads],
            *(stride // unit for stride in strides), *(stride // table_unit for stride in table_strides),
            HALF=half, REST=rest, BLOCK_S=at.block_s, BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(rest), HEADS=at.heads, UNIT=unit, TABLE_UNIT=table_unit,
            TABLE_STEP=2 if how.interleaved and cos.shape[-1] == how.rotary_dim else 1,
            INTERLEAVED=how.interleaved, CONJUGATE=how.conjugate, ACC=accumulator(q.dtype), INTERPRET=INTERPRETED,
            num_warps=at.num_warps,
        )  # fmt: skip


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    outs = _rotary_shapes(q, k)
    launch_rotary(_with_dense_rows(q), _with_dense_rows(k), *outs, cos, sin, Rotation(*how))
    return outs


def _rotary_shapes(q: Tensor, k: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any) -> None:
    launch_rotary(q, k, q, k, cos, sin, Rotation(*how))


def _rotary_cpu(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sequence_dim: int, rotary_dim: int, interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return rotary_reference(
        q, k, cos, -sin if conjugate else sin, interleaved=interleaved, sequence_dim=sequence_dim,
        rotary_dim=rotary_dim,
    )  # fmt: skip


def _rotary_cpu_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *how: Any) -> None:
    for x, turned in zip((q, k), _rotary_cpu(q, k, cos, sin, *how), strict=True):
        x.copy_(turned)


def _rotary_shapes_(*_arguments: object) -> None:
    """The op in place on tensors without data: it returns nothing and changes no shape."""


_HOW = "Tensor cos, Tensor sin, int sequence_dim, int rotary_dim, bool interleaved, bool conjugate"
register(f"rotary(Tensor q, Tensor k, {_HOW}) -> (Tensor, Tensor)", _rotary, _rotary_shapes, _rotary_cpu)
register(f"rotary_(Tensor(a!) q, Tensor(b!) k, {_HOW}) -> ()", _rotary_, _rotary_shapes_, _rotary_cpu_)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sequence_dim: int, rotary_dim: int, interleaved: bool,
        conjugate: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.how = (sequence_dim, rotary_dim, interleaved, conjugate)
        return torch.ops.tritonspeed.rotary(q, k, cos, sin, *ctx.how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        *how, conjugate = ctx.how
        wanted = [  # a gradient that nobody asked for is turned with no heads
            g if needed else g.narrow(3 - ctx.how[0], 0, 0)
            for g, needed in zip(grads, ctx.needs_input_grad, strict=False)
        ]
        turned = _Rotary.apply(*wanted, cos, sin, *how, not conjugate)  # linear: its derivative is itself, by −θ
        found = [g if needed else None for g, needed in zip(turned, ctx.needs_input_grad, strict=False)]
        return (*found, *[None] * 6)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    in_place: bool = False,
    sequence_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions' angles; differentiable in ``q`` and ``k``, any number of times.

    Args:
        q: (B, S, Hq, D), or (B, Hq, S, D) with sequence_dim 2; float32, bfloat16, float16 or float64. Any strides with
            dense rows of D are read as they are, views of a fused qkv too.
        k: the same with its own number of heads.
        cos, sin: (S, W), (1, S, W) or (B, S, W), any float type; of positions from ``start`` on, pass
            ``cos[start : start + S]``. W is R/2, or R with every value there twice, as in Hugging Face's models:
            repeated halves, or neighbours if interleaved. They take no gradient.
        interleaved: a pair is (2j, 2j + 1) instead of (j, j + R/2).
        in_place: write into q and k, which no gradient may flow through and which must not overlap.
        sequence_dim: the axis of positions, 1 or 2.
        rotary_dim: R, even; the rest of a head stays what it is. Default D.

    Returns:
        q and k turned: contiguous, or q and k themselves if in place.

    Raises:
        ValueError: types, shapes or devices that do not fit; in place with inputs that require a gradient.
    """
    check_device("rotary", q)
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    _check_heads(q, k, sequence_dim, rotary_dim)
    _check_tables(q, cos, sin, sequence_dim, rotary_dim)
    how = (sequence_dim, rotary_dim, interleaved, False)
    if in_place:
        _check_in_place(q, k)
        torch.ops.tritonspeed.rotary_(q, k, cos, sin, *how)
        return q, k
    if takes_reference(q):
        return rotary_reference(
            q, k, cos, sin, interleaved=interleaved, sequence_dim=sequence_dim, rotary_dim=rotary_dim
        )
    return _Rotary.apply(q, k, cos, sin, *how)


def _check_heads(q: Tensor, k: Tensor, sequence_dim: int, rotary_dim: int) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(f"rotary: {name} is {tuple(x.shape)}, must have 4 axes: batch, positions, heads, D")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"rotary: {name} is {x.dtype}, q and k must both be float32, bfloat16, float16 or float64: convert it"
            )
        if x.device != q.device:
            raise ValueError(f"rotary: q is on {q.device}, {name} on {x.device}: move one to the other")
    if sequence_dim not in (1, 2):
        raise ValueError(f"rotary: sequence_dim is {sequence_dim}, must be 1 for (B, S, H, D) or 2 for (B, H, S, D)")
    if any(q.shape[axis] != k.shape[axis] for axis in (0, sequence_dim, 3)):
        raise ValueError(
            f"rotary: q {tuple(q.shape)} and k {tuple(k.shape)} may differ in heads, axis {3 - sequence_dim}, only:"
            " is sequence_dim right?"
        )
    if rotary_dim % 2 or not 0 < rotary_dim <= q.shape[-1]:
        raise ValueError(f"rotary: rotary_dim is {rotary_dim}, must be even and within 2 to D = {q.shape[-1]}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, sequence_dim: int, rotary_dim: int) -> None:
    batch, s = q.shape[0], q.shape[sequence_dim]
    for name, table in (("cos", cos), ("sin", sin)):
        if not table.is_floating_point() or table.device != q.device:
            raise ValueError(f"rotary: {name} is {table.dtype} on {table.device}, must be a float on {q.device}")
        if table.requires_grad:
            raise ValueError(f"rotary: {name} requires a gradient, which it does not get: pass {name}.detach()")
        fits = table.ndim in (2, 3) and table.shape[-2] == s and table.shape[-1] in (rotary_dim, rotary_dim // 2)
        if not fits or table.shape != cos.shape or (table.ndim == 3 and table.shape[0] not in (1, batch)):
            raise ValueError(
                f"rotary: {name} is {tuple(table.shape)}, must be (S, W) or (B, S, W) with S = {s}, B = {batch} or 1"
                f" and W = {rotary_dim // 2} or {rotary_dim}, and cos is {tuple(cos.shape)}:"
                " slice the positions, or pass rotary_dim"
            )


def _check_in_place(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"rotary: {name} requires a gradient and would be overwritten: pass in_place=False")
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
        if overlaps or x.stride(-1) != 1:
            raise ValueError(
                f"rotary: {name} has strides {x.stride()}, in place it must have dense rows and no expanded axis:"
                " pass in_place=False"
            )
