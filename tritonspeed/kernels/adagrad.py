"""Adagrad on one flat chunk: unscale, clip, update and write the low-precision copy in a single pass.

    g ← s · g + λ · p                          s = 1 / loss scale × clip coefficient, one number on the device
    h ← h + g²
    p ← p − η / (1 + (t − 1) · d) · g / (√h + ε)               d: lr_decay
    out ← round(p)                             nearest even, or stochastic

Shapes   p, h, g, out: (n,)   s, found_inf: ()
Types    p, h fp32; g fp32, bf16 or fp16; out bf16 or fp16
Bytes    n · (16 + itemsize(g) + itemsize(out)): 20 n with a 16-bit gradient and copy
Flops    8 n
Source   Duchi, Hazan & Singer 2011, JMLR 12; lr_decay, λ and ε as in ``torch.optim.Adagrad``
Roof     GPU: not measured yet. CPU (2 cores of an AMD EPYC): decision 015

Every operation is rounded by itself, as in ``adamw.py``. h equals the reference's to the last bit, the weights wherever
PyTorch's root is correctly rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.flat_update import (
    FlatLaunch,
    FlatTensors,
    check_flat,
    check_step,
    split_arguments,
    update_on_cpu_,
    update_shapes_,
    write_copy_,
)
from tritonspeed.kernels.host_step import update_compiled_
from tritonspeed.kernels.rounding import load_fp32, store, store_copy
from tritonspeed.kernels.tuned import Tunable


@dataclass(frozen=True, slots=True)
class AdagradStep:
    """The numbers of one step, in the operator's order; what follows from them is worked out in fp64."""

    step: int
    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    seed: int | None
    first_element: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """η / (1 + (t − 1) · d), ε, λ: the kernel's scalars, in its order."""
        return self.lr / (1 + (self.step - 1) * self.lr_decay), self.eps, self.weight_decay


def _adagrad_maths(
    g: Tensor, p: Tensor, h: Tensor, step_size: Any, eps: Any, weight_decay: Any, *, decays: bool = True
) -> tuple[Tensor, Tensor]:
    if decays:
        g = g + weight_decay * p
    h = h + g * g
    return p - step_size * (g / (h.sqrt() + eps)), h


def _adagrad_maths_without_decay(*tensors_and_coefficients: Any) -> tuple[Tensor, Tensor]:
    return _adagrad_maths(*tensors_and_coefficients, decays=False)


def _maths_of(at: AdagradStep) -> Callable[..., tuple[Tensor, Tensor]]:
    return _adagrad_maths if at.weight_decay else _adagrad_maths_without_decay


def adagrad_reference(
    master: Tensor,
    sum_of_squares: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
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
    at = AdagradStep(step, lr, lr_decay, eps, weight_decay, stochastic_rounding_seed, first_element)
    g = grad.to(master.dtype)
    if grad_scale is not None:
        g = g * grad_scale
    p, h = _maths_of(at)(g, master, sum_of_squares, *at.coefficients)
    sum_of_squares.copy_(h)
    master.copy_(p)
    write_copy_(param_out, master, stochastic_rounding_seed, first_element)


@triton.jit
def _adagrad_tile(
    master_ptr, sum_ptr, grad_ptr, out_ptr, scale, offsets, inside, seed, first_element,
    step_size, eps, weight_decay, DECAYS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)  # [BLOCK], as all below
    g = load_fp32(grad_ptr + offsets, inside)
    h = load_fp32(sum_ptr + offsets, inside)
    if scale is not None:
        g = g * scale
    if DECAYS:
        g = g + weight_decay * p
    h = h + g * g
    # a masked lane holds 0 / 0 where ε is 0: NaN that is not stored
    p = p - step_size * tl.div_rn(g, tl.sqrt_rn(h) + eps)
    store(sum_ptr + offsets, h, inside)
    store(master_ptr + offsets, p, inside)
    store_copy(out_ptr, p, offsets, inside, seed, first_element, BLOCK, INTERPRET)


@triton.jit(do_not_specialize=["n", "seed", "first_element"])
def _adagrad_kernel(
    master_ptr, sum_ptr, grad_ptr, out_ptr, scale_ptr, found_inf_ptr, n, seed, first_element,
    step_size, eps, weight_decay, DECAYS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102 — this test is the compiler's, the next one the GPU's
        if tl.load(found_inf_ptr) != 0.0:
            return
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    # a Python float is fp64 to Inductor and to the interpreter: pinned, or the whole tile would be promoted
    step_size, eps = tl.cast(step_size, tl.float32), tl.cast(eps, tl.float32)
    weight_decay = tl.cast(weight_decay, tl.float32)

    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 once, in the base: n may pass 2³¹; offsets stay int32
    offsets = tl.arange(0, BLOCK)
    master_ptr += start
    sum_ptr += start
    grad_ptr += start
    if out_ptr is not None:
        out_ptr += start
    # the split keeps the hot path's loads 16 bytes wide: a bound that 16 does not divide makes masked ones scalar
    if start + BLOCK <= n:
        _adagrad_tile(
            master_ptr, sum_ptr, grad_ptr, out_ptr, scale, offsets, None, seed, first_element + start,
            step_size, eps, weight_decay, DECAYS, BLOCK, INTERPRET,
        )  # fmt: skip
    else:
        _adagrad_tile(
            master_ptr, sum_ptr, grad_ptr, out_ptr, scale, offsets, offsets < n - start, seed, first_element + start,
            step_size, eps, weight_decay, DECAYS, BLOCK, INTERPRET,
        )  # fmt: skip


ADAGRAD = Tunable("adagrad_", (_adagrad_kernel,), FlatLaunch, FlatLaunch.heuristic, FlatLaunch.candidates)


def launch_adagrad_(tensors: FlatTensors, at: AdagradStep) -> None:
    """Launch the kernel: the op on a GPU, and on a CPU under the interpreter."""
    master, (sum_of_squares,), n = tensors.master, tensors.states, tensors.master.numel()
    with on_device_of(master):
        how = ADAGRAD.resolve(card_of(master))
        launch(
            _adagrad_kernel, (triton.cdiv(n, how.block),),
            master, sum_of_squares, tensors.grad, tensors.param_out, tensors.grad_scale, tensors.found_inf, n, at.seed,
            at.first_element, *at.coefficients, DECAYS=at.weight_decay != 0, BLOCK=how.block, INTERPRET=INTERPRETED,
            num_warps=how.num_warps,
        )  # fmt: skip


def _adagrad_chunk_(master: Tensor, sum_of_squares: Tensor, grad: Tensor, at: AdagradStep) -> None:
    """A chunk on a CPU. Products and sums apart: torch's addcmul contracts them in its vector loop alone."""
    step_size, eps, weight_decay = at.coefficients
    if weight_decay:
        grad = torch.mul(master, weight_decay).add_(grad)
    scratch = torch.mul(grad, grad)
    sum_of_squares.add_(scratch)
    torch.sqrt(sum_of_squares, out=scratch).add_(eps)
    master.sub_(torch.div(grad, scratch, out=scratch).mul_(step_size))


def _split(arguments: tuple[Any, ...]) -> tuple[FlatTensors, AdagradStep]:
    tensors, numbers = split_arguments(arguments, num_states=1)
    return tensors, AdagradStep(*numbers)


def _launched_(*arguments: Any) -> None:
    launch_adagrad_(*_split(arguments))


def _on_cpu_(*arguments: Any) -> None:
    tensors, at = _split(arguments)
    if update_compiled_(_maths_of(at), tensors, at.coefficients, at.seed):
        return
    update_on_cpu_(tensors, lambda _, *chunk: _adagrad_chunk_(*chunk, at=at), at.seed, at.first_element)


register(
    "adagrad_(Tensor(a!) master, Tensor(b!) sum_of_squares, Tensor grad, Tensor? grad_scale, Tensor(c!)? param_out,"
    " Tensor? found_inf, SymInt step, float lr, float lr_decay, float eps, float weight_decay, SymInt? seed,"
    " SymInt first_element) -> ()",
    _launched_,
    update_shapes_,
    _on_cpu_,
)


def adagrad_(
    master: Tensor,
    sum_of_squares: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    param_out: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    first_element: int = 0,
) -> None:
    """One Adagrad step of a flat chunk, in place. Cut a buffer into chunks anywhere: the numbers stay the same.

    Args:
        master: (n,) fp32, contiguous: the weights.
        sum_of_squares: (n,) fp32: of all gradients so far.
        grad: (n,) fp32, bf16 or fp16; not changed.
        step: number of this step, from 1.
        lr, lr_decay, eps, weight_decay: as in ``torch.optim.Adagrad``; the weight decay is added to the gradient.
        grad_scale: one fp32 element multiplied into the gradient: 1 / loss scale × clip coefficient.
        param_out: (n,) bf16 or fp16, receives the rounded weights.
        found_inf: one fp32 element; anything but 0 leaves every tensor untouched.
        stochastic_rounding_seed: 0 ≤ seed < 2⁶³ rounds param_out (bf16) at random, unbiased; take a new one each step.
        first_element: index of master[0] in the whole buffer, a multiple of 4: the random bits follow it.

    Raises:
        ValueError: types, devices or sizes that do not fit, or a step below 1.
    """
    tensors = FlatTensors(master, (sum_of_squares,), grad, grad_scale, param_out, found_inf)
    check_flat("adagrad_", tensors, ("sum_of_squares",), (stochastic_rounding_seed, first_element))
    check_step("adagrad_", step)
    torch.ops.tritonspeed.adagrad_(
        master, sum_of_squares, grad, grad_scale, param_out, found_inf, step, lr, lr_decay, eps, weight_decay,
        stochastic_rounding_seed, first_element,
    )  # fmt: skip
