"""Muon's elementwise halves, before and after the orthogonalisation: momentum and direction; decay, step and copy.

    g ← s · g                                  s = 1 / loss scale × clip coefficient, one number on the device
    m ← m + (1 − μ) · (g − m)
    d = g + μ · (m − g)                        Nesterov's; else d = m
    O = newton_schulz(d)                       of the whole matrix: newton_schulz.py
    p ← p − η · λ · p − η' · O                 η' = η · what the matrix's shape asks for
    out ← round(p)                             to nearest even

Shapes   p, m, g, d, O, out: (n,)   s: ()
Types    p, m fp32; g fp32, bf16 or fp16; d and O fp32, bf16 or fp16; out bf16 or fp16
Bytes    before: n · (8 + itemsize(g) + itemsize(d)); after: n · (8 + itemsize(O) + itemsize(out)): 24 n with 16 bits
Flops    before 6 n, after 4 n
Source   Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"
Roof     not measured yet

Every operation is rounded by itself: where a buffer was cut changes no bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import load_fp32, store, store_rounded
from tritonspeed.kernels.tuned import Tunable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)


def muon_direction_reference(
    momentum: Tensor, grad: Tensor, out: Tensor, beta: float, nesterov: bool, grad_scale: Tensor | None = None
) -> None:
    """Momentum in place and in its own dtype, the direction into ``out``."""
    g = grad.to(momentum.dtype)
    if grad_scale is not None:
        g = g * grad_scale
    momentum.add_((g - momentum) * (1 - beta))
    out.copy_(g + (momentum - g) * beta if nesterov else momentum)


def muon_step_reference(
    master: Tensor, update: Tensor, decay: float, step_size: float, param_out: Tensor | None = None
) -> None:
    """p − decay · p − step_size · O in place and in p's own dtype; ``decay`` is η · λ."""
    master.sub_(master * decay + update.to(master.dtype) * step_size)
    if param_out is not None:
        param_out.copy_(master)


@triton.jit
def _direction_tile(
    momentum_ptr, grad_ptr, out_ptr, scale, offsets, inside, beta, one_minus_beta,
    NESTEROV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    g = load_fp32(grad_ptr + offsets, inside)
    m = load_fp32(momentum_ptr + offsets, inside)
    if scale is not None:
        g = g * scale
    m = m + (g - m) * one_minus_beta
    store(momentum_ptr + offsets, m, inside)
    if NESTEROV:
        m = g + (m - g) * beta
    store_rounded(out_ptr + offsets, m, inside, INTERPRET)


@triton.jit(do_not_specialize=["n"])
def _direction_kernel(
    momentum_ptr, grad_ptr, out_ptr, scale_ptr, n, beta, one_minus_beta,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    beta, one_minus_beta = tl.cast(beta, tl.float32), tl.cast(one_minus_beta, tl.float32)
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    momentum_ptr += start
    grad_ptr += start
    out_ptr += start
    if start + BLOCK <= n:  # the split keeps the hot path's loads 16 bytes wide whatever n
        _direction_tile(
            momentum_ptr, grad_ptr, out_ptr, scale, offsets, None, beta, one_minus_beta, NESTEROV, INTERPRET
        )  # fmt: skip
    else:
        _direction_tile(
            momentum_ptr, grad_ptr, out_ptr, scale, offsets, offsets < n - start, beta, one_minus_beta, NESTEROV,
            INTERPRET,
        )  # fmt: skip


@triton.jit
def _step_tile(master_ptr, update_ptr, out_ptr, offsets, inside, decay, step_size, INTERPRET: tl.constexpr):
    p = load_fp32(master_ptr + offsets, inside)
    p = p - (p * decay + load_fp32(update_ptr + offsets, inside) * step_size)
    store(master_ptr + offsets, p, inside)
    if out_ptr is not None:
        store_rounded(out_ptr + offsets, p, inside, INTERPRET)


@triton.jit(do_not_specialize=["n"])
def _step_kernel(
    master_ptr, update_ptr, out_ptr, n, decay, step_size, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    decay, step_size = tl.cast(decay, tl.float32), tl.cast(step_size, tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    master_ptr += start
    update_ptr += start
    if out_ptr is not None:
        out_ptr += start
    if start + BLOCK <= n:
        _step_tile(master_ptr, update_ptr, out_ptr, offsets, None, decay, step_size, INTERPRET)
    else:
        _step_tile(master_ptr, update_ptr, out_ptr, offsets, offsets < n - start, decay, step_size, INTERPRET)


@dataclass(frozen=True, slots=True)
class MuonLaunch:
    """How the kernels are launched. One rule for every size."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "MuonLaunch":
        # 256 threads × 8 elements: 16 bytes an access of 16-bit tensors and two of fp32 ones
        return cls(block=2048, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card) -> list["MuonLaunch"]:
        return [cls(block, n // card.warp_size) for block in (1024, 2048, 4096) for n in (128, 256, 512)]


MUON = Tunable("muon_", (_direction_kernel, _step_kernel), MuonLaunch, MuonLaunch.heuristic, MuonLaunch.candidates)


def launch_muon_direction_(
    momentum: Tensor, grad: Tensor, out: Tensor, grad_scale: Tensor | None, beta: float, nesterov: bool
) -> None:
    """The op on a GPU, and on a CPU under the interpreter."""
    n = momentum.numel()
    with on_device_of(momentum):
        how = MUON.resolve(card_of(momentum))
        launch(
            _direction_kernel, (triton.cdiv(n, how.block),), momentum, grad, out, grad_scale, n, beta, 1 - beta,
            NESTEROV=nesterov, BLOCK=how.block, INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip


def launch_muon_step_(master: Tensor, update: Tensor, param_out: Tensor | None, decay: float, step_size: float) -> None:
    """The op on a GPU, and on a CPU under the interpreter."""
    n = master.numel()
    with on_device_of(master):
        how = MUON.resolve(card_of(master))
        launch(
            _step_kernel, (triton.cdiv(n, how.block),), master, update, param_out, n, decay, step_size,
            BLOCK=how.block, INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip


def _direction_cpu_(
    momentum: Tensor, grad: Tensor, out: Tensor, grad_scale: Tensor | None, beta: float, nesterov: bool
) -> None:
    muon_direction_reference(momentum, grad, out, beta, nesterov, grad_scale)


def _step_cpu_(master: Tensor, update: Tensor, param_out: Tensor | None, decay: float, step_size: float) -> None:
    muon_step_reference(master, update, decay, step_size, param_out)


register(
    "muon_direction_(Tensor(a!) momentum, Tensor grad, Tensor(b!) out, Tensor? grad_scale, float beta,"
    " bool nesterov) -> ()",
    launch_muon_direction_,
    lambda *arguments: None,
    _direction_cpu_,
)
register(
    "muon_step_(Tensor(a!) master, Tensor update, Tensor(b!)? param_out, float decay, float step_size) -> ()",
    launch_muon_step_,
    lambda *arguments: None,
    _step_cpu_,
)


def _check(operation: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{operation}: {name} is {tensor.dtype}, must be {allowed}: convert it with {name}.to(...)")
    if tensor.device != like.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, not on {like.device}: move one to the other")
    if tensor.ndim != 1 or tensor.shape != like.shape or not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, must be contiguous and"
            f" flat with {like.numel()} elements: pass a flat view, .flatten()"
        )


def muon_direction_(
    momentum: Tensor, grad: Tensor, out: Tensor, *, beta: float, nesterov: bool = True, grad_scale: Tensor | None = None
) -> None:
    """Momentum in place, and what is to be orthogonalised.

    Args:
        momentum: (n,) fp32, contiguous.
        grad: (n,) fp32, bf16 or fp16; not changed.
        out: (n,) fp32, bf16 or fp16, receives the direction.
        beta: μ, in [0, 1).
        nesterov: look ahead.
        grad_scale: one fp32 element multiplied into the gradient.

    Raises:
        ValueError: types, devices or sizes that do not fit, or μ out of range.
    """
    check_device("muon_direction_", momentum)
    _check("muon_direction_", "momentum", momentum, (torch.float32,), momentum)
    _check("muon_direction_", "grad", grad, FLOATS, momentum)
    _check("muon_direction_", "out", out, FLOATS, momentum)
    if not 0 <= beta < 1:
        raise ValueError(f"muon_direction_: beta is {beta}, must be in [0, 1)")
    torch.ops.tritonspeed.muon_direction_(momentum, grad, out, grad_scale, beta, nesterov)


def muon_step_(
    master: Tensor, update: Tensor, *, decay: float, step_size: float, param_out: Tensor | None = None
) -> None:
    """Weight decay, step and low-precision copy, in place.

    Args:
        master: (n,) fp32, contiguous: the weights.
        update: (n,) fp32, bf16 or fp16: these elements of the orthogonalised matrix.
        decay: η · λ.
        step_size: η'.
        param_out: (n,) bf16 or fp16, receives the rounded weights.

    Raises:
        ValueError: types, devices or sizes that do not fit.
    """
    check_device("muon_step_", master)
    _check("muon_step_", "master", master, (torch.float32,), master)
    _check("muon_step_", "update", update, FLOATS, master)
    if param_out is not None:
        _check("muon_step_", "param_out", param_out, COPY_DTYPES, master)
    torch.ops.tritonspeed.muon_step_(master, update, param_out, decay, step_size)
