"""LAMB on one flat chunk that many tensors share: a step as long as the tensor's norm says.

    g ← s · g                                  s = 1 / loss scale × clip coefficient, one number on the device
    m ← β₁ · m + (1 − β₁) · g
    v ← β₂ · v + (1 − β₂) · g²
    u = m / (√v + ε) + λ · p                   m / √(v + ε) with ε inside the root
    r = min(max(‖p‖ / ‖u‖, r_min), r_max)      per tensor, over all of it; 1 where a norm is 0
    p ← p − η · √c₂ / c₁ · r · u               cₖ = 1 − βₖᵗ, or 1 without bias correction
    out ← round(p)                             to nearest even

The bias correction stands in the step, not in u, as in DeepSpeed's FusedLamb: a trained recipe keeps its numbers.

Shapes   p, m, v, g, out: (n,)   s: ()   ‖p‖², ‖u‖²: (T, 2) for the T tensors that the chunk has elements of
Types    p, m, v fp32; g fp32, bf16 or fp16; out bf16 or fp16; squares and norms fp64, so exact squares are added
Bytes    n · (20 + itemsize(g)) for the moments and norms, n · (16 + itemsize(out)) for the step: 40 n with 16 bits
Flops    24 n
Source   You et al. 2020, arXiv:1904.00962
Roof     not measured yet

u is not kept: working it out again costs the 8 n bytes that writing and reading it would, and no memory. A table names
the segments (start, length, tensor) of a chunk, a program each, so the launches are three whatever T is; the trust
ratios never leave the device. Between the two halves the norms of a sharded tensor can be added up over the ranks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.intervals import ALIGNMENT, Intervals, cpu_tiles
from tritonspeed.kernels.rounding import load_fp32, store, store_rounded
from tritonspeed.kernels.tuned import Tunable

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LambStep:
    """The numbers of one step; what follows from them is worked out here, in fp64."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool = True
    eps_inside_sqrt: bool = False
    min_coeff: float = 0.01
    max_coeff: float = 10.0

    @property
    def step_size(self) -> float:
        """η · √c₂ / c₁."""
        if not self.bias_correction:
            return self.lr
        return self.lr * math.sqrt(1 - self.beta2**self.step) / (1 - self.beta1**self.step)


def lamb_moments_reference(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, at: LambStep, grad_scale: Tensor | None = None
) -> Tensor:
    """One tensor's moments, in place and in its own dtype; returns (2,) fp64: ‖p‖² and ‖u‖²."""
    g = grad.to(master.dtype)
    if grad_scale is not None:
        g = g * grad_scale
    exp_avg.copy_(at.beta1 * exp_avg + (1 - at.beta1) * g)
    exp_avg_sq.copy_(at.beta2 * exp_avg_sq + (1 - at.beta2) * g * g)
    u = lamb_direction_reference(master, exp_avg, exp_avg_sq, at)
    return torch.stack([master.double().square().sum(), u.double().square().sum()])


def lamb_direction_reference(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, at: LambStep) -> Tensor:
    """u, of moments that are already this step's."""
    root = (exp_avg_sq + at.eps).sqrt() if at.eps_inside_sqrt else exp_avg_sq.sqrt() + at.eps
    return exp_avg / root + at.weight_decay * master


def trust_ratio_reference(norms: Tensor, at: LambStep) -> Tensor:
    """r of (..., 2) squared norms, in their dtype."""
    ratio = (norms[..., 0].sqrt() / norms[..., 1].sqrt()).clamp(at.min_coeff, at.max_coeff)
    return torch.where((norms != 0).all(-1), ratio, 1.0)


@triton.jit
def _direction(p, m, v, eps, weight_decay, EPS_INSIDE: tl.constexpr):
    """u, the same to the last bit in both kernels: nothing is contracted, quotient and root are IEEE's."""
    if EPS_INSIDE:
        root = tl.sqrt_rn(v + eps)
    else:
        root = tl.sqrt_rn(v) + eps
    return tl.div_rn(m, root) + weight_decay * p


@triton.jit
def _moments_tile(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, scale, offsets, inside, sum_p, sum_u,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, EPS_INSIDE: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)  # [BLOCK], as all below
    g = load_fp32(grad_ptr + offsets, inside)
    m = load_fp32(exp_avg_ptr + offsets, inside)
    v = load_fp32(exp_avg_sq_ptr + offsets, inside)
    if scale is not None:
        g = g * scale
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    store(exp_avg_ptr + offsets, m, inside)
    store(exp_avg_sq_ptr + offsets, v, inside)
    u = _direction(p, m, v, eps, weight_decay, EPS_INSIDE)
    if inside is not None:
        u = tl.where(inside, u, 0.0)  # 0 / 0 where ε is 0
    p, u = p.to(tl.float64), u.to(tl.float64)
    return sum_p + p * p, sum_u + u * u


@triton.jit(do_not_specialize=["num_segments"])
def _lamb_moments_kernel(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, scale_ptr, table_ptr, partial_ptr, num_segments,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    ALIGNMENT: tl.constexpr, EPS_INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    beta1, one_minus_beta1 = tl.cast(beta1, tl.float32), tl.cast(one_minus_beta1, tl.float32)
    beta2, one_minus_beta2 = tl.cast(beta2, tl.float32), tl.cast(one_minus_beta2, tl.float32)
    eps, weight_decay = tl.cast(eps, tl.float32), tl.cast(weight_decay, tl.float32)
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    segment = tl.program_id(0)
    start = tl.load(table_ptr + segment * 3).to(tl.int64) * ALIGNMENT  # the factor tells the compiler of the alignment
    numel = tl.load(table_ptr + segment * 3 + 1)
    master_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    grad_ptr += start
    offsets = tl.arange(0, BLOCK)
    sum_p, sum_u = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    whole = numel // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        sum_p, sum_u = _moments_tile(
            master_ptr + at, exp_avg_ptr + at, exp_avg_sq_ptr + at, grad_ptr + at, scale, offsets, None, sum_p, sum_u,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, EPS_INSIDE,
        )  # fmt: skip
    if whole < numel:
        sum_p, sum_u = _moments_tile(
            master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, scale, whole + offsets, whole + offsets < numel,
            sum_p, sum_u, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, EPS_INSIDE,
        )  # fmt: skip
    tl.store(partial_ptr + segment, tl.sum(sum_p, axis=0))
    tl.store(partial_ptr + num_segments + segment, tl.sum(sum_u, axis=0))


@triton.jit(do_not_specialize=["num_segments"])
def _lamb_norms_kernel(partial_ptr, first_ptr, norms_ptr, num_segments, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    start, end = tl.load(first_ptr + tensor), tl.load(first_ptr + tensor + 1)
    offsets = tl.arange(0, BLOCK)
    sum_p, sum_u = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for at in range(start, end, BLOCK):
        inside = at + offsets < end
        sum_p += tl.load(partial_ptr + at + offsets, mask=inside, other=0.0)
        sum_u += tl.load(partial_ptr + num_segments + at + offsets, mask=inside, other=0.0)
    tl.store(norms_ptr + tensor * 2, tl.sum(sum_p, axis=0))
    tl.store(norms_ptr + tensor * 2 + 1, tl.sum(sum_u, axis=0))


@triton.jit
def _step_tile(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, offsets, inside, eps, weight_decay, step_size,
    EPS_INSIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)
    m = load_fp32(exp_avg_ptr + offsets, inside)
    v = load_fp32(exp_avg_sq_ptr + offsets, inside)
    p = p - step_size * _direction(p, m, v, eps, weight_decay, EPS_INSIDE)
    store(master_ptr + offsets, p, inside)
    if out_ptr is not None:
        store_rounded(out_ptr + offsets, p, inside, INTERPRET)


@triton.jit
def _lamb_step_kernel(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, table_ptr, norms_ptr, eps, weight_decay, step_size, min_coeff,
    max_coeff, ALIGNMENT: tl.constexpr, EPS_INSIDE: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    eps, weight_decay = tl.cast(eps, tl.float32), tl.cast(weight_decay, tl.float32)
    step_size = tl.cast(step_size, tl.float32)
    min_coeff, max_coeff = tl.cast(min_coeff, tl.float64), tl.cast(max_coeff, tl.float64)
    segment = tl.program_id(0)
    start = tl.load(table_ptr + segment * 3).to(tl.int64) * ALIGNMENT
    numel = tl.load(table_ptr + segment * 3 + 1)
    tensor = tl.load(table_ptr + segment * 3 + 2)
    norm_p, norm_u = tl.load(norms_ptr + tensor * 2), tl.load(norms_ptr + tensor * 2 + 1)
    ratio = tl.minimum(tl.maximum(tl.sqrt(norm_p) / tl.sqrt(norm_u), min_coeff), max_coeff)
    ratio = tl.where((norm_p != 0.0) & (norm_u != 0.0), ratio, 1.0)
    step_size = step_size * ratio.to(tl.float32)
    master_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    if out_ptr is not None:
        out_ptr += start
    offsets = tl.arange(0, BLOCK)
    whole = numel // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        _step_tile(
            master_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, at + offsets, None, eps, weight_decay, step_size,
            EPS_INSIDE, INTERPRET,
        )  # fmt: skip
    if whole < numel:
        _step_tile(
            master_ptr, exp_avg_ptr, exp_avg_sq_ptr, out_ptr, whole + offsets, whole + offsets < numel, eps,
            weight_decay, step_size, EPS_INSIDE, INTERPRET,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LambLaunch:
    """How the kernels are launched. One rule for every size."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "LambLaunch":
        return cls(block=1024, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card) -> list["LambLaunch"]:
        threads = {512: (128,), 1024: (128, 256), 2048: (256, 512)}
        return [cls(block, num // card.warp_size) for block, numbers in threads.items() for num in numbers]


LAMB = Tunable(
    "lamb_",
    (_lamb_moments_kernel, _lamb_norms_kernel, _lamb_step_kernel),
    LambLaunch,
    LambLaunch.heuristic,
    LambLaunch.candidates,
)


def launch_lamb_moments_(
    exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor, grad: Tensor, grad_scale: Tensor | None, table: Tensor,
    first: Tensor, bounds: list[int], beta1: float, beta2: float, eps: float, weight_decay: float,
    eps_inside_sqrt: bool,
) -> Tensor:  # fmt: skip
    """The op on a GPU, and on a CPU under the interpreter: moments in place, (T, 2) fp64 norms returned."""
    num_segments = table.shape[0]
    partials = torch.empty(2, num_segments, dtype=torch.float64, device=master.device)
    norms = torch.empty(first.numel() - 1, 2, dtype=torch.float64, device=master.device)
    with on_device_of(master):
        how = LAMB.resolve(card_of(master))
        launch(
            _lamb_moments_kernel, (num_segments,),
            master, exp_avg, exp_avg_sq, grad, grad_scale, table, partials, num_segments,
            beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
            ALIGNMENT=ALIGNMENT, EPS_INSIDE=eps_inside_sqrt, BLOCK=how.block, num_warps=how.num_warps,
        )  # fmt: skip
        launch(
            _lamb_norms_kernel, (norms.shape[0],), partials, first, norms, num_segments, BLOCK=128,
            num_warps=max(1, 128 // card_of(master).warp_size),
        )  # fmt: skip
    return norms


def launch_lamb_step_(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param_out: Tensor | None, norms: Tensor, table: Tensor,
    bounds: list[int], eps: float, weight_decay: float, step_size: float, min_coeff: float, max_coeff: float,
    eps_inside_sqrt: bool,
) -> None:  # fmt: skip
    """The op on a GPU, and on a CPU under the interpreter: weights and copy in place."""
    with on_device_of(master):
        how = LAMB.resolve(card_of(master))
        launch(
            _lamb_step_kernel, (table.shape[0],),
            master, exp_avg, exp_avg_sq, param_out, table, norms, eps, weight_decay, step_size, min_coeff, max_coeff,
            ALIGNMENT=ALIGNMENT, EPS_INSIDE=eps_inside_sqrt, BLOCK=how.block, INTERPRET=INTERPRETED,
            num_warps=how.num_warps,
        )  # fmt: skip


def _cpu_direction(p: Tensor, m: Tensor, v: Tensor, eps: float, weight_decay: float, eps_inside_sqrt: bool) -> Tensor:
    """u by operations that round once each: where a tensor is cut, or which thread works on it, changes no bit."""
    root = torch.sqrt(v + eps) if eps_inside_sqrt else torch.sqrt(v).add_(eps)
    return torch.div(m, root, out=root).add_(p * weight_decay)


def _lamb_moments_cpu_(
    exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor, grad: Tensor, grad_scale: Tensor | None, table: Tensor,
    first: Tensor, bounds: list[int], beta1: float, beta2: float, eps: float, weight_decay: float,
    eps_inside_sqrt: bool,
) -> Tensor:  # fmt: skip
    norms = torch.zeros(len(bounds) // 2, 2, dtype=torch.float64)
    for tensor, tile in cpu_tiles(bounds):
        p, m, v, g = master[tile], exp_avg[tile], exp_avg_sq[tile], grad[tile].float()
        g = g if grad_scale is None else g * grad_scale
        m.mul_(beta1).add_(g * (1 - beta1))
        v.mul_(beta2).add_((g * (1 - beta2)).mul_(g))
        u = _cpu_direction(p, m, v, eps, weight_decay, eps_inside_sqrt)
        norms[tensor, 0] += p.double().square_().sum()
        norms[tensor, 1] += u.double().square_().sum()
    return norms


def _lamb_step_cpu_(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param_out: Tensor | None, norms: Tensor, table: Tensor,
    bounds: list[int], eps: float, weight_decay: float, step_size: float, min_coeff: float, max_coeff: float,
    eps_inside_sqrt: bool,
) -> None:  # fmt: skip
    at = LambStep(1, step_size, 0.0, 0.0, eps, weight_decay, min_coeff=min_coeff, max_coeff=max_coeff)
    steps = trust_ratio_reference(norms, at).float() * step_size
    for tensor, tile in cpu_tiles(bounds):
        p = master[tile]
        u = _cpu_direction(p, exp_avg[tile], exp_avg_sq[tile], eps, weight_decay, eps_inside_sqrt)
        p.sub_(u.mul_(steps[tensor]))
        if param_out is not None:
            param_out[tile].copy_(p)


register(
    "lamb_moments_(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor master, Tensor grad, Tensor? grad_scale,"
    " Tensor table, Tensor first, int[] bounds, float beta1, float beta2, float eps, float weight_decay,"
    " bool eps_inside_sqrt) -> Tensor",
    launch_lamb_moments_,
    lambda exp_avg, exp_avg_sq, master, grad, grad_scale, table, first, bounds, *numbers: master.new_empty(
        len(bounds) // 2, 2, dtype=torch.float64
    ),
    _lamb_moments_cpu_,
)
register(
    "lamb_step_(Tensor(a!) master, Tensor exp_avg, Tensor exp_avg_sq, Tensor(b!)? param_out, Tensor norms,"
    " Tensor table, int[] bounds, float eps, float weight_decay, float step_size, float min_coeff, float max_coeff,"
    " bool eps_inside_sqrt) -> ()",
    launch_lamb_step_,
    lambda *arguments: None,
    _lamb_step_cpu_,
)


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"lamb_: {name} is {tensor.dtype}, must be {allowed}: convert it with {name}.to(...)")
    if tensor.device != like.device:
        raise ValueError(f"lamb_: {name} is on {tensor.device}, master on {like.device}: move one to the other")
    if tensor.shape != like.shape or like.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"lamb_: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, must be contiguous and flat"
            f" with master's {like.numel()} elements: pass a flat view, .flatten()"
        )


def lamb_moments_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    intervals: Intervals,
    at: LambStep,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """The first half of a step: moments in place, and what the chunk's elements add to each tensor's norms.

    Args:
        master: (n,) fp32, contiguous: the weights, only read.
        exp_avg, exp_avg_sq: (n,) fp32.
        grad: (n,) fp32, bf16 or fp16; not changed.
        intervals: where the tensors are in the chunk; elements in none of them stay as they are.
        at: the numbers of the step, counted from 1.
        grad_scale: one fp32 element multiplied into the gradient.

    Returns:
        (T, 2) fp64: ‖p‖², ‖u‖². Of a tensor in several chunks, add them up before ``lamb_step_``.

    Raises:
        ValueError: types, devices or sizes that do not fit, or coefficients out of range.
    """
    check_device("lamb_", master)
    for name, tensor in (("master", master), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check(name, tensor, (torch.float32,), master)
    _check("grad", grad, GRAD_DTYPES, master)
    if not (0 <= at.beta1 < 1 and 0 <= at.beta2 < 1):
        raise ValueError(f"lamb_: betas are {at.beta1}, {at.beta2}, each must be in [0, 1)")
    if at.step < 1:
        raise ValueError(f"lamb_: step is {at.step}, must be at least 1: count the step before the call")
    if intervals.bounds and max(intervals.bounds) > master.numel():
        raise ValueError(f"lamb_: intervals end at {max(intervals.bounds)}, the chunk has {master.numel()} elements")
    return torch.ops.tritonspeed.lamb_moments_(
        exp_avg, exp_avg_sq, master, grad, grad_scale, intervals.table, intervals.first, intervals.bounds,
        at.beta1, at.beta2, at.eps, at.weight_decay, at.eps_inside_sqrt,
    )  # fmt: skip


def lamb_step_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    norms: Tensor,
    intervals: Intervals,
    at: LambStep,
    param_out: Tensor | None = None,
) -> None:
    """The second half: weights, and their low-precision copy, in place.

    Args:
        master: (n,) fp32, as it was in ``lamb_moments_``.
        exp_avg, exp_avg_sq: (n,) fp32, as that left them.
        norms: (T, 2) fp64 of the whole tensors.
        intervals, at: as there.
        param_out: (n,) bf16 or fp16, receives the rounded weights.

    Raises:
        ValueError: types, devices or sizes that do not fit.
    """
    check_device("lamb_", master)
    if param_out is not None:
        _check("param_out", param_out, COPY_DTYPES, master)
    if norms.shape != (intervals.num_tensors, 2) or norms.dtype != torch.float64:
        raise ValueError(
            f"lamb_: norms are {tuple(norms.shape)} {norms.dtype}, must be ({intervals.num_tensors}, 2) float64"
        )
    torch.ops.tritonspeed.lamb_step_(
        master, exp_avg, exp_avg_sq, param_out, norms.contiguous(), intervals.table, intervals.bounds, at.eps,
        at.weight_decay, at.step_size, at.min_coeff, at.max_coeff, at.eps_inside_sqrt,
    )  # fmt: skip
