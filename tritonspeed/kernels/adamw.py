"""AdamW on one flat chunk: unscale, clip, update and write the low-precision copy in a single pass.

    g ← s · g                                  s = 1 / loss scale × clip coefficient, one number on the device
    g ← g + λ · p                              only Adam with L2 (decoupled=False)
    m ← β₁ · m + (1 − β₁) · g
    v ← β₂ · v + (1 − β₂) · g²
    p ← p − (η · λ · p + η / c₁ · m / (√v / √c₂ + ε))          cₖ = 1 − βₖᵗ, or 1 without bias correction
    out ← round(p)                             nearest even, or stochastic; the λ · p term only when decoupled

Shapes   p, m, v, g, out: (n,)   s, found_inf: ()
Types    p fp32; m, v fp32, or both bf16; g fp32, bf16 or fp16; out bf16 or fp16
Bytes    n · (24 + itemsize(g) + itemsize(out)): 28 n with a 16-bit gradient and copy; 8 n less with bf16 moments
Flops    15 n
Source   Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101
Roof     GPU: not measured yet. CPU (2 cores of an AMD EPYC): the table in ``flat_update.py``

Every operation is rounded by itself, with the IEEE quotient and root and no contraction into fused multiply-adds: an
element's result depends neither on where the buffer was cut nor on whether its tile was full. The moments equal those
of ``adamw_reference`` to the last bit, the weights wherever PyTorch's root is correctly rounded (on a CPU, one in six
is an ulp off). η, ε, λ and s are runtime values: no schedule recompiles anything.
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
    check_rounding,
    check_step,
    split_arguments,
    update_on_cpu_,
    update_shapes_,
    write_copy_,
)
from tritonspeed.kernels.host_step import update_compiled_
from tritonspeed.kernels.rounding import (
    load_fp32,
    round_nearest,
    round_stochastic,
    round_stochastic_reference,
    store,
    store_copy,
)
from tritonspeed.kernels.tuned import Tunable

STATE_SHIFT = (
    16  # exp_avg_sq takes the high halves of the random words, param_out the low ones: one seed may serve both
)
CPU_LANE_ELEMS = 64  # torch's loop is vectorised in steps of at most this many; its scalar rest rounds differently


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """The numbers of one step, in the operator's order.

    What follows from them is worked out here in fp64: 1 − 0.999 in fp32 would keep only 14 bits of 0.001.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    bias_correction: bool
    seed: int | None
    first_element: int
    state_seed: int | None = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """β₁, 1 − β₁, β₂, 1 − β₂, ε, λ, η · λ, η / c₁, 1 / √c₂: the kernel's scalars, in its order."""
        c1, c2 = (1 - self.beta1**self.step, 1 - self.beta2**self.step) if self.bias_correction else (1.0, 1.0)
        return (
            self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.eps, self.weight_decay,
            self.lr * self.weight_decay, self.lr / c1, 1 / math.sqrt(c2),
        )  # fmt: skip


def _adamw_maths(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, beta1: Any, one_minus_beta1: Any, beta2: Any, one_minus_beta2: Any,
    eps: Any, weight_decay: Any, decay: Any, step_size: Any, inverse_root_c2: Any, *, decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not decoupled:
        g = g + weight_decay * p
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    update = step_size * (m / (v.sqrt() * inverse_root_c2 + eps))
    return p - (decay * p + update if decoupled else update), m, v


def _adam_maths(*tensors_and_coefficients: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _adamw_maths(*tensors_and_coefficients, decoupled=False)


def adamw_reference(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    bias_correction: bool = True,
    grad_scale: Tensor | None = None,
    param_out: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    first_element: int = 0,
    state_rounding_seed: int | None = None,
) -> None:
    """The maths above in PyTorch, in place, in master's own dtype: what kernels and the CPU form must equal."""
    if found_inf is not None and found_inf.item() != 0:
        return
    at = AdamWStep(
        step, lr, *betas, eps, weight_decay, decoupled, bias_correction, stochastic_rounding_seed, first_element
    )
    g = grad.to(master.dtype)
    if grad_scale is not None:
        g = g * grad_scale
    maths = _adamw_maths if decoupled else _adam_maths
    p, m, v = maths(g, master, exp_avg.to(master.dtype), exp_avg_sq.to(master.dtype), *at.coefficients)
    exp_avg.copy_(m)
    is_random = state_rounding_seed is not None and exp_avg_sq.dtype == torch.bfloat16
    exp_avg_sq.copy_(round_stochastic_reference(v, state_rounding_seed, first_element, STATE_SHIFT) if is_random else v)
    master.copy_(p)
    write_copy_(param_out, master, stochastic_rounding_seed, first_element)


@triton.jit
def _adamw_tile(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, out_ptr, scale, offsets, inside, seed, state_seed,
    first_element, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)  # [BLOCK], as all below
    g = load_fp32(grad_ptr + offsets, inside)
    m = load_fp32(exp_avg_ptr + offsets, inside)
    v = load_fp32(exp_avg_sq_ptr + offsets, inside)
    if scale is not None:
        g = g * scale
    if not DECOUPLED:
        g = g + weight_decay * p
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    update = step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_c2 + eps)
    if DECOUPLED:
        update = decay * p + update
    p = p - update
    store(exp_avg_ptr + offsets, round_nearest(m, exp_avg_ptr.dtype.element_ty, INTERPRET), inside)
    if state_seed is None:
        store(exp_avg_sq_ptr + offsets, v, inside)
    else:
        store(exp_avg_sq_ptr + offsets, round_stochastic(v, first_element, state_seed, BLOCK, 16), inside)
    store(master_ptr + offsets, p, inside)
    store_copy(out_ptr, p, offsets, inside, seed, first_element, BLOCK, INTERPRET)


@triton.jit(do_not_specialize=["n", "seed", "state_seed", "first_element"])
def _adamw_kernel(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, out_ptr, scale_ptr, found_inf_ptr, n, seed, state_seed,
    first_element, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
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
    eps, weight_decay, decay = tl.cast(eps, tl.float32), tl.cast(weight_decay, tl.float32), tl.cast(decay, tl.float32)
    step_size, inverse_root_c2 = tl.cast(step_size, tl.float32), tl.cast(inverse_root_c2, tl.float32)

    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 once, in the base: n may pass 2³¹; offsets stay int32
    offsets = tl.arange(0, BLOCK)
    master_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    grad_ptr += start
    if out_ptr is not None:
        out_ptr += start
    # the split keeps the hot path's loads 16 bytes wide: a bound that 16 does not divide makes masked ones scalar
    if start + BLOCK <= n:
        _adamw_tile(
            master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, out_ptr, scale, offsets, None, seed,
            state_seed, first_element + start,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
            DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip
    else:
        _adamw_tile(
            master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, out_ptr, scale, offsets, offsets < n - start, seed,
            state_seed, first_element + start,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size, inverse_root_c2,
            DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip


# 256 threads × 4 elements take 38-44 registers a thread (sm_80 to sm_120), so every SM is full, and no layout changes
# through shared memory. Eight elements took 72 registers and 8 KiB of shared memory for the fp32 stores (triton 3.9).
ADAMW = Tunable("adamw_", (_adamw_kernel,), FlatLaunch, FlatLaunch.heuristic, FlatLaunch.candidates)


def launch_adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    param_out: Tensor | None,
    found_inf: Tensor | None,
    at: AdamWStep,
) -> None:
    """Launch the kernel: the op on a GPU, and on a CPU under the interpreter."""
    n = master.numel()
    with on_device_of(master):
        how = ADAMW.resolve(card_of(master))
        launch(
            _adamw_kernel, (triton.cdiv(n, how.block),),
            master, exp_avg, exp_avg_sq, grad, param_out, grad_scale, found_inf, n, at.seed, at.state_seed,
            at.first_element, *at.coefficients, DECOUPLED=at.decoupled, BLOCK=how.block, INTERPRET=INTERPRETED,
            num_warps=how.num_warps,
        )  # fmt: skip


def _torch_step_(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, at: AdamWStep) -> None:
    """torch's vectorised loop over fp32, without its scalar rest: that rounds differently, and would show the cut."""
    fused_ = torch._fused_adamw_ if at.decoupled else torch._fused_adam_
    # torch derives c₁ and c₂ from the step: βᵗ is 0 at t = ∞, which is "no bias correction"
    step = torch.tensor(float(at.step) if at.bias_correction else math.inf)

    def update_(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> None:
        fused_(
            [p], [g], [m], [v], [], [step], lr=at.lr, beta1=at.beta1, beta2=at.beta2, weight_decay=at.weight_decay,
            eps=at.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    n = master.numel()
    whole = n - n % CPU_LANE_ELEMS
    update_(master[:whole], exp_avg[:whole], exp_avg_sq[:whole], grad[:whole])
    if whole < n:
        rests = [t[whole:] for t in (master, exp_avg, exp_avg_sq, grad)]
        padded = [torch.cat((rest, rest.new_zeros(CPU_LANE_ELEMS - rest.numel()))) for rest in rests]
        update_(*padded)
        for rest, updated in zip(rests[:3], padded[:3], strict=True):
            rest.copy_(updated[: rest.numel()])


def _chunk_step_(start: int, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, at: AdamWStep) -> None:
    if at.state_seed is None:
        _torch_step_(master, exp_avg, exp_avg_sq, grad, at)
        return
    m, v = exp_avg.float(), exp_avg_sq.float()
    _torch_step_(master, m, v, grad, at)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(round_stochastic_reference(v, at.state_seed, at.first_element + start, STATE_SHIFT))


def _launched_(*arguments: Any) -> None:
    launch_adamw_(*arguments[:7], at=AdamWStep(*arguments[7:]))


def _on_cpu_(*arguments: Any) -> None:
    tensors, numbers = split_arguments(arguments, num_states=2)
    at = AdamWStep(*numbers)
    if update_compiled_(_adamw_maths if at.decoupled else _adam_maths, tensors, at.coefficients, at.seed):
        return
    update_on_cpu_(tensors, lambda *chunk: _chunk_step_(*chunk, at=at), at.seed, at.first_element)


register(
    "adamw_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor? grad_scale,"
    " Tensor(d!)? param_out, Tensor? found_inf, SymInt step, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool decoupled, bool bias_correction, SymInt? seed, SymInt first_element,"
    " SymInt? state_seed=None) -> ()",
    _launched_,
    update_shapes_,
    _on_cpu_,
)


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    bias_correction: bool = True,
    grad_scale: Tensor | None = None,
    param_out: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    first_element: int = 0,
    state_rounding_seed: int | None = None,
) -> None:
    """One optimizer step of a flat chunk, in place. Cut a buffer into chunks anywhere: the numbers stay the same.

    Args:
        master: (n,) fp32, contiguous: the weights.
        exp_avg: (n,) fp32 or bf16: first moment.
        exp_avg_sq: (n,) of the same type: second moment.
        grad: (n,) fp32, bf16 or fp16; not changed.
        step: number of this step, from 1.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        decoupled: AdamW's weight decay; False adds weight_decay · master to the gradient (Adam with L2).
        bias_correction: False takes the moments as they are.
        grad_scale: one fp32 element multiplied into the gradient: 1 / loss scale × clip coefficient.
        param_out: (n,) bf16 or fp16, receives the rounded weights.
        found_inf: one fp32 element; anything but 0 leaves every tensor untouched.
        stochastic_rounding_seed: 0 ≤ seed < 2⁶³ rounds param_out (bf16) at random, unbiased; take a new one each step.
        first_element: index of master[0] in the whole buffer, a multiple of 4: the random bits follow it.
        state_rounding_seed: 0 ≤ seed < 2⁶³, for bf16 moments: exp_avg_sq is rounded at random; a new one each step,
            which may be the other seed's.

    Raises:
        ValueError: types, devices or sizes that do not fit, or coefficients out of range.
    """
    tensors = FlatTensors(master, (exp_avg, exp_avg_sq), grad, grad_scale, param_out, found_inf)
    rounding = stochastic_rounding_seed, first_element
    state_dtype = torch.float32 if state_rounding_seed is None else torch.bfloat16
    check_flat("adamw_", tensors, ("exp_avg", "exp_avg_sq"), rounding, state_dtype)
    check_rounding("adamw_", exp_avg_sq, state_rounding_seed, first_element)
    check_betas("adamw_", betas)
    check_step("adamw_", step)
    torch.ops.tritonspeed.adamw_(
        master, exp_avg, exp_avg_sq, grad, grad_scale, param_out, found_inf, step, lr, *betas, eps, weight_decay,
        decoupled, bias_correction, stochastic_rounding_seed, first_element, state_rounding_seed,
    )  # fmt: skip
