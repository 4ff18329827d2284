"""Lion on one flat chunk: unscale, clip, update and write the low-precision copy in a single pass.

    g ← s · g                                  s = 1 / loss scale × clip coefficient, one number on the device
    u ← sign(β₁ · m + (1 − β₁) · g)            0 where the sum is 0, NaN where it is NaN
    p ← p − (η · λ · p + η · u)
    m ← β₂ · m + (1 − β₂) · g
    out ← round(p)                             nearest even, or stochastic

Shapes   p, m, g, out: (n,)   s, found_inf: ()
Types    p, m fp32; g fp32, bf16 or fp16; out bf16 or fp16
Bytes    n · (16 + itemsize(g) + itemsize(out)): 20 n with a 16-bit gradient and copy
Flops    10 n
Source   Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675
Roof     GPU: not measured yet. CPU (2 cores of an AMD EPYC): decision 015

Every operation is rounded by itself, as in ``adamw.py``: the kernel, the CPU form and ``lion_reference`` agree to the
last bit. An update is ± η or 0, so that a rounding which turns the sign of a vanishing sum changes a weight by 2 η.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.flat_update import (
    FlatLaunch,
    FlatTensors,
    check_betas,
    check_flat,
    split_arguments,
    update_on_cpu_,
    update_shapes_,
    write_copy_,
)
from tritonspeed.kernels.host_step import update_compiled_
from tritonspeed.kernels.rounding import load_fp32, store, store_copy
from tritonspeed.kernels.tuned import Tunable


@dataclass(frozen=True, slots=True)
class LionStep:
    """The numbers of one step, in the operator's order; what follows from them is worked out in fp64."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    seed: int | None
    first_element: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """β₁, 1 − β₁, β₂, 1 − β₂, η, η · λ: the kernel's scalars, in its order."""
        return self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.lr, self.lr * self.weight_decay


def _lion_maths(
    g: Tensor, p: Tensor, m: Tensor, beta1: Any, one_minus_beta1: Any, beta2: Any, one_minus_beta2: Any,
    lr: Any, decay: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mixed = beta1 * m + one_minus_beta1 * g
    direction = torch.where(mixed > 0, 1.0, torch.where(mixed < 0, -1.0, mixed))  # 0 and NaN stay
    return p - (decay * p + lr * direction), beta2 * m + one_minus_beta2 * g


def lion_reference(
    master: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    grad_scale: Tensor | None = None,
    param_out: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    first_element: int = 0,
) -> None:
    """The maths above in PyTorch, in place, in master's own dtype: what kernels and the CPU form must equal."""
    if found_inf is not None and found_inf.item() != 0:
        return
    at = LionStep(lr, *betas, weight_decay, stochastic_rounding_seed, first_element)
    g = grad.to(master.dtype)
    if grad_scale is not None:
        g = g * grad_scale
    p, m = _lion_maths(g, master, exp_avg, *at.coefficients)
    exp_avg.copy_(m)
    master.copy_(p)
    write_copy_(param_out, master, stochastic_rounding_seed, first_element)


@triton.jit
def _lion_tile(
    master_ptr, exp_avg_ptr, grad_ptr, out_ptr, scale, offsets, inside, seed, first_element,
    beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)  # [BLOCK], as all below
    g = load_fp32(grad_ptr + offsets, inside)
    m = load_fp32(exp_avg_ptr + offsets, inside)
    if scale is not None:
        g = g * scale
    mixed = beta1 * m + one_minus_beta1 * g
    direction = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # 0 and NaN stay
    p = p - (decay * p + lr * direction)
    m = beta2 * m + one_minus_beta2 * g
    store(exp_avg_ptr + offsets, m, inside)
    store(master_ptr + offsets, p, inside)
    store_copy(out_ptr, p, offsets, inside, seed, first_element, BLOCK, INTERPRET)


@triton.jit(do_not_specialize=["n", "seed", "first_element"])
def _lion_kernel(
    master_ptr, exp_avg_ptr, grad_ptr, out_ptr, scale_ptr, found_inf_ptr, n, seed, first_element,
    beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102 — this test is the compiler's, the next one the GPU's
        if tl.load(found_inf_ptr) != 0.0:
            return
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    # a Python float is fp64 to Inductor and to the interpreter: pinned, or the whole tile would be promoted
    beta1, one_minus_beta1 = tl.cast(beta1, tl.float32), tl.cast(one_minus_beta1, tl.float32)
    beta2, one_minus_beta2 = tl.cast(beta2, tl.float32), tl.cast(one_minus_beta2, tl.float32)
    lr, decay = tl.cast(lr, tl.float32), tl.cast(decay, tl.float32)

    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 once, in the base: n may pass 2³¹; offsets stay int32
    offsets = tl.arange(0, BLOCK)
    master_ptr += start
    exp_avg_ptr += start
    grad_ptr += start
    if out_ptr is not None:
        out_ptr += start
    # the split keeps the hot path's loads 16 bytes wide: a bound that 16 does not divide makes masked ones scalar
    if start + BLOCK <= n:
        _lion_tile(
            master_ptr, exp_avg_ptr, grad_ptr, out_ptr, scale, offsets, None, seed, first_element + start,
            beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay, BLOCK, INTERPRET,
        )  # fmt: skip
    else:
        _lion_tile(
            master_ptr, exp_avg_ptr, grad_ptr, out_ptr, scale, offsets, offsets < n - start, seed,
            first_element + start, beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay, BLOCK, INTERPRET,
        )  # fmt: skip


LION = Tunable("lion_", (_lion_kernel,), FlatLaunch, FlatLaunch.heuristic, FlatLaunch.candidates)


def launch_lion_(tensors: FlatTensors, at: LionStep) -> None:
    """Launch the kernel: the op on a GPU, and on a CPU under the interpreter."""
    master, (exp_avg,), n = tensors.master, tensors.states, tensors.master.numel()
    with on_device_of(master):
        how = LION.resolve(card_of(master))
        launch(
            _lion_kernel, (triton.cdiv(n, how.block),),
            master, exp_avg, tensors.grad, tensors.param_out, tensors.grad_scale, tensors.found_inf, n, at.seed,
            at.first_element, *at.coefficients, BLOCK=how.block, INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip


def _lion_chunk_(master: Tensor, exp_avg: Tensor, grad: Tensor, at: LionStep) -> None:
    """A chunk on a CPU. Products and sums apart: torch's add with alpha contracts them in its vector loop alone."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay = at.coefficients
    part = torch.mul(grad, one_minus_beta1)
    update = torch.mul(exp_avg, beta1).add_(part)
    is_nan = update.isnan()
    update.sign_().masked_fill_(is_nan, math.nan).mul_(lr)
    master.sub_(torch.mul(master, decay, out=part).add_(update))
    exp_avg.mul_(beta2).add_(torch.mul(grad, one_minus_beta2, out=part))


def _split(arguments: tuple[Any, ...]) -> tuple[FlatTensors, LionStep]:
    tensors, numbers = split_arguments(arguments, num_states=1)
    return tensors, LionStep(*numbers)


def _launched_(*arguments: Any) -> None:
    launch_lion_(*_split(arguments))


def _on_cpu_(*arguments: Any) -> None:
    tensors, at = _split(arguments)
    if update_compiled_(_lion_maths, tensors, at.coefficients, at.seed):
        return
    update_on_cpu_(tensors, lambda _, *chunk: _lion_chunk_(*chunk, at=at), at.seed, at.first_element)


register(
    "lion_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor grad, Tensor? grad_scale, Tensor(c!)? param_out,"
    " Tensor? found_inf, float lr, float beta1, float beta2, float weight_decay, SymInt? seed,"
    " SymInt first_element) -> ()",
    _launched_,
    update_shapes_,
    _on_cpu_,
)


def lion_(
    master: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    grad_scale: Tensor | None = None,
    param_out: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    first_element: int = 0,
) -> None:
    """One Lion step of a flat chunk, in place. Cut a buffer into chunks anywhere: the numbers stay the same.

    Args:
        master: (n,) fp32, contiguous: the weights.
        exp_avg: (n,) fp32: the momentum.
        grad: (n,) fp32, bf16 or fp16; not changed.
        lr, weight_decay: the weight decay is decoupled, as AdamW's.
        betas: of the direction, and of the momentum.
        grad_scale: one fp32 element multiplied into the gradient: 1 / loss scale × clip coefficient.
        param_out: (n,) bf16 or fp16, receives the rounded weights.
        found_inf: one fp32 element; anything but 0 leaves every tensor untouched.
        stochastic_rounding_seed: 0 ≤ seed < 2⁶³ rounds param_out (bf16) at random, unbiased; take a new one each step.
        first_element: index of master[0] in the whole buffer, a multiple of 4: the random bits follow it.

    Raises:
        ValueError: types, devices or sizes that do not fit, or coefficients out of range.
    """
    tensors = FlatTensors(master, (exp_avg,), grad, grad_scale, param_out, found_inf)
    check_flat("lion_", tensors, ("exp_avg",), (stochastic_rounding_seed, first_element))
    check_betas("lion_", betas)
    torch.ops.tritonspeed.lion_(
        master, exp_avg, grad, grad_scale, param_out, found_inf, lr, *betas, weight_decay, stochastic_rounding_seed,
        first_element,
    )  # fmt: skip
