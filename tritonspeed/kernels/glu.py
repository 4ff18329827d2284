"""Gated linear units: an activated gate times a linear branch, the middle of a SwiGLU or GeGLU feed-forward layer.

    y = a(gate) · up                       a: silu, gelu (exact or tanh), relu: see activations.py
    dgate = dy · up · a'(gate)
    dup   = dy · a(gate)

Shapes   gate, up, y, dy, dgate, dup: (..., N); packed: gate and up are the halves of one (..., 2N), as are dgate, dup
Types    fp32, bf16, fp16 (computed in fp32), fp64; gate and up alike
Bytes    forward 3 n · itemsize, backward 5 n · itemsize, n = elements of y: nothing is saved but gate and up
Flops    forward about 5 n, backward about 10 n (silu)
Source   Shazeer 2020, arXiv:2002.05202
Roof     not measured yet

Contiguous tensors are one flat run of n elements: full tiles without a mask, so every access has 16 bytes whatever n
is, and one masked tile at the end. Views whose rows lie apart (a half of a fused projection) are read where they are,
see strided_rows.py: 16 bytes an access where N and the strides are multiples of 8 elements (4 in fp32), else fewer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._autograd import once_differentiable
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
from tritonspeed.kernels.activations import (
    ACTIVATIONS,
    activate,
    activate_backward_reference,
    activate_reference,
    activate_with_slope,
    gelu_form,
)
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import load, store_rounded
from tritonspeed.kernels.strided_rows import Rows, as_rows, halves, place, plain_rows, row_tile, tiling
from tritonspeed.kernels.tuned import Tunable, dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDTHS = {"fp64": 8, "fp32": 4}  # bytes of an element; 2 of all others
# what the rows kernels must not be compiled anew for: VEC says all that matters of these
ROW_NUMBERS = ["num_rows", "N", "gate_offset", "up_offset", "gate_stride", "up_stride"]
BACKWARD_ROW_NUMBERS = [*ROW_NUMBERS, "dgate_offset", "dup_offset", "grad_stride", "dgate_stride", "dup_stride"]


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y in PyTorch, rounded once: what the kernels must equal; what CPU tensors take."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (activate_reference(gate.to(wide), activation) * up.to(wide)).to(gate.dtype).contiguous()


@triton.jit
def _forward_tile(
    gate_at, up_at, y_at, inside, ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    gate = load(gate_at, inside, ACC, "evict_first")
    up = load(up_at, inside, ACC, "evict_first")
    store_rounded(y_at, activate(gate, ACTIVATION) * up, inside, INTERPRET)


@triton.jit
def _backward_tile(
    grad_at, gate_at, up_at, dgate_at, dup_at, inside,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    grad = load(grad_at, inside, ACC, "evict_first")
    gate = load(gate_at, inside, ACC, "evict_first")
    up = load(up_at, inside, ACC, "evict_first")
    activated, slope = activate_with_slope(gate, ACTIVATION)
    dgate = grad * up * slope
    if ACTIVATION == "relu":  # 0 · ∞ is no 0, but relu's gradient is, as in PyTorch
        dgate = tl.where(gate <= 0.0, 0.0, dgate)
    store_rounded(dgate_at, dgate, inside, INTERPRET)
    store_rounded(dup_at, grad * activated, inside, INTERPRET)


@triton.jit(do_not_specialize=["n"])
def _glu_forward_flat_kernel(
    gate_ptr, up_ptr, y_ptr, n,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 once, in the base; offsets stay int32
    at = tl.arange(0, BLOCK)
    gate_ptr += start
    up_ptr += start
    y_ptr += start
    if start + BLOCK <= n:
        _forward_tile(gate_ptr + at, up_ptr + at, y_ptr + at, None, ACTIVATION, ACC, INTERPRET)
    else:
        _forward_tile(gate_ptr + at, up_ptr + at, y_ptr + at, at < n - start, ACTIVATION, ACC, INTERPRET)


@triton.jit(do_not_specialize=["n"])
def _glu_backward_flat_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    grad_ptr += start
    gate_ptr += start
    up_ptr += start
    dgate_ptr += start
    dup_ptr += start
    if start + BLOCK <= n:
        _backward_tile(
            grad_ptr + at, gate_ptr + at, up_ptr + at, dgate_ptr + at, dup_ptr + at, None, ACTIVATION, ACC, INTERPRET
        )
    else:
        _backward_tile(
            grad_ptr + at, gate_ptr + at, up_ptr + at, dgate_ptr + at, dup_ptr + at, at < n - start,
            ACTIVATION, ACC, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=ROW_NUMBERS)
def _glu_forward_rows_kernel(
    gate_ptr, up_ptr, y_ptr, num_rows, N, gate_offset, up_offset, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, cols, inside = row_tile(num_rows, N, VEC, ROWS, BLOCK_N)  # [ROWS, 1], [1, BLOCK_N], [ROWS, BLOCK_N]
    _forward_tile(
        place(gate_ptr, gate_offset, gate_stride, rows, cols, VEC),
        place(up_ptr, up_offset, up_stride, rows, cols, VEC),
        place(y_ptr, 0, N, rows, cols, VEC),
        inside, ACTIVATION, ACC, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=BACKWARD_ROW_NUMBERS)
def _glu_backward_rows_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, num_rows, N,
    gate_offset, up_offset, dgate_offset, dup_offset, grad_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, cols, inside = row_tile(num_rows, N, VEC, ROWS, BLOCK_N)
    _backward_tile(
        place(grad_ptr, 0, grad_stride, rows, cols, VEC),
        place(gate_ptr, gate_offset, gate_stride, rows, cols, VEC),
        place(up_ptr, up_offset, up_stride, rows, cols, VEC),
        place(dgate_ptr, dgate_offset, dgate_stride, rows, cols, VEC),
        place(dup_ptr, dup_offset, dup_stride, rows, cols, VEC),
        inside, ACTIVATION, ACC, INTERPRET,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GLULaunch:
    """How a kernel is launched: elements of a tile, and warps; no size of the problem matters."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card, *, dtype: str) -> "GLULaunch":
        # 256 threads, one 16-byte access of each operand a thread
        return cls(block=256 * 16 // _WIDTHS.get(dtype, 2), num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card, *, dtype: str) -> list["GLULaunch"]:
        """One to four accesses of 16 bytes a thread."""
        lane = 16 // _WIDTHS.get(dtype, 2)
        return [
            cls(threads * lane * accesses, threads // card.warp_size)
            for threads in (128, 256, 512, 1024)
            for accesses in (1, 2, 4)
        ]


FORWARD_KERNELS = (_glu_forward_flat_kernel, _glu_forward_rows_kernel)
BACKWARD_KERNELS = (_glu_backward_flat_kernel, _glu_backward_rows_kernel)
FORWARD = Tunable("glu_forward", FORWARD_KERNELS, GLULaunch, GLULaunch.heuristic, GLULaunch.candidates)
BACKWARD = Tunable("glu_backward", BACKWARD_KERNELS, GLULaunch, GLULaunch.heuristic, GLULaunch.candidates)


def _constants(x: Tensor, activation: str) -> dict[str, Any]:
    return {"ACTIVATION": activation, "ACC": accumulator(x.dtype), "INTERPRET": INTERPRETED}


def launch_glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y of gate and up, read where they are if their rows are contiguous."""
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    with on_device_of(gate):
        how = FORWARD.resolve(card_of(gate), dtype=dtype_name(gate.dtype))
        constants = _constants(gate, activation)
        if gate.is_contiguous() and up.is_contiguous():
            grid = (triton.cdiv(y.numel(), how.block),)
            constants |= {"BLOCK": how.block, "num_warps": how.num_warps}
            launch(_glu_forward_flat_kernel, grid, gate, up, y, y.numel(), **constants)
        else:
            _forward_rows(plain_rows(as_rows(gate)), plain_rows(as_rows(up)), y, how, constants)
    return y


def launch_glu_packed_forward(gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    """y of the halves of gate_up."""
    n = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], n))
    if y.numel() == 0:
        return y
    gate, up = halves(as_rows(gate_up), gate_first)
    with on_device_of(y):
        how = FORWARD.resolve(card_of(y), dtype=dtype_name(y.dtype))
        _forward_rows(gate, up, y, how, _constants(y, activation))
    return y


def _forward_rows(gate: Rows, up: Rows, y: Tensor, how: GLULaunch, constants: dict[str, Any]) -> None:
    n = y.shape[-1]
    num_rows = y.numel() // n
    grid, tile = tiling(how.block, num_rows, n, [gate, up])
    launch(
        _glu_forward_rows_kernel, grid, gate.base, up.base, y, num_rows, n, gate.offset, up.offset, gate.stride,
        up.stride, **constants, **tile, num_warps=how.num_warps,
    )  # fmt: skip


def launch_glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate and dup, contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel() == 0:
        return dgate, dup
    with on_device_of(grad):
        how = BACKWARD.resolve(card_of(grad), dtype=dtype_name(grad.dtype))
        constants = _constants(grad, activation)
        if gate.is_contiguous() and up.is_contiguous():
            grid = (triton.cdiv(grad.numel(), how.block),)
            constants |= {"BLOCK": how.block, "num_warps": how.num_warps}
            flat = grad.contiguous(), gate, up, dgate, dup, grad.numel()  # grad may be an expanded scalar: stride 0
            launch(_glu_backward_flat_kernel, grid, *flat, **constants)
        else:
            places = [plain_rows(as_rows(x)) for x in (gate, up, dgate, dup)]
            _backward_rows(as_rows(grad), places, how, constants)
    return dgate, dup


def launch_glu_packed_backward(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    """dgate and dup as the halves of one contiguous tensor, in gate_up's order."""
    dgate_up = gate_up.new_empty(gate_up.shape)
    if grad.numel() == 0:
        return dgate_up
    places = [half for x in (gate_up, dgate_up) for half in halves(as_rows(x), gate_first)]
    with on_device_of(grad):
        how = BACKWARD.resolve(card_of(grad), dtype=dtype_name(grad.dtype))
        _backward_rows(as_rows(grad), places, how, _constants(grad, activation))
    return dgate_up


def _backward_rows(grad: Tensor, places: list[Rows], how: GLULaunch, constants: dict[str, Any]) -> None:
    """places: gate, up, dgate, dup."""
    num_rows, n = grad.shape
    grid, tile = tiling(how.block, num_rows, n, [plain_rows(grad), *places])
    launch(
        _glu_backward_rows_kernel, grid, grad, *(place.base for place in places), num_rows, n,
        *(place.offset for place in places), grad.stride(0), *(place.stride for place in places),
        **constants, **tile, num_warps=how.num_warps,
    )  # fmt: skip


def _packed_reference(gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    first, second = gate_up.chunk(2, dim=-1)
    return glu_reference(*((first, second) if gate_first else (second, first)), activation)


def _backward_cpu(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dtype, wide = gate.dtype, torch.float64 if gate.dtype == torch.float64 else torch.float32
    grad, gate, up = grad.to(wide), gate.to(wide), up.to(wide)
    dgate = activate_backward_reference(grad * up, gate, activation)
    dup = grad * activate_reference(gate, activation)
    return dgate.to(dtype).contiguous(), dup.to(dtype).contiguous()


def _packed_backward_cpu(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    first, second = gate_up.chunk(2, dim=-1)
    dgate, dup = _backward_cpu(grad, *((first, second) if gate_first else (second, first)), activation)
    return torch.cat((dgate, dup) if gate_first else (dup, dgate), dim=-1)


def _forward_shapes(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_shapes(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _packed_forward_shapes(gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _packed_backward_shapes(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


register(
    "glu_forward(Tensor gate, Tensor up, str activation) -> Tensor",
    launch_glu_forward,
    _forward_shapes,
    glu_reference,
)
register(
    "glu_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    launch_glu_backward,
    _backward_shapes,
    _backward_cpu,
)
register(
    "glu_packed_forward(Tensor gate_up, str activation, bool gate_first) -> Tensor",
    launch_glu_packed_forward,
    _packed_forward_shapes,
    _packed_reference,
)
register(
    "glu_packed_backward(Tensor grad, Tensor gate_up, str activation, bool gate_first) -> Tensor",
    launch_glu_packed_backward,
    _packed_backward_shapes,
    _packed_backward_cpu,
)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.tritonspeed.glu_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *torch.ops.tritonspeed.glu_backward(grad, *ctx.saved_tensors, ctx.activation), None


class _PackedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, activation, gate_first):
        ctx.save_for_backward(gate_up)
        ctx.options = activation, gate_first
        return torch.ops.tritonspeed.glu_packed_forward(gate_up, activation, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.ops.tritonspeed.glu_packed_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


def _check(operation: str, name: str, x: Tensor, activation: str) -> None:
    check_device(operation, x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operation}: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{operation}: {name} is {x.dtype}, must be float32, bfloat16, float16 or float64: convert it with .to(...)"
        )


def glu(gate: Tensor, up: Tensor, activation: str = "silu", *, operation: str = "glu") -> Tensor:
    """a(gate) · up, differentiable in both.

    Args:
        gate, up: (..., N), fp32, bf16, fp16 or fp64; the halves of a fused projection are read without a copy, though
            ``glu_packed`` also saves the copy of their gradients.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        operation: the name in error messages.

    Returns:
        (..., N) of gate's type, contiguous; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes, types or devices that differ, an unknown activation, a device without kernels.
    """
    _check(operation, "gate", gate, activation)
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"{operation}: gate is {tuple(gate.shape)} {gate.dtype} on {gate.device}, up {tuple(up.shape)} {up.dtype}"
            f" on {up.device}: both must be alike; expand or convert one of them"
        )
    if takes_reference(gate):
        return glu_reference(gate, up, activation)
    return _GLU.apply(gate, up, activation)


def glu_packed(
    gate_up: Tensor, activation: str = "silu", *, gate_first: bool = True, operation: str = "glu_packed"
) -> Tensor:
    """a(gate) · up of the two halves of one tensor: the output of a fused gate-and-up projection.

    Args:
        gate_up: (..., 2N), fp32, bf16, fp16 or fp64; its gradient is written in place of both halves, without a copy.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gate_first: the gate is the first half; False: the second.
        operation: the name in error messages.

    Returns:
        (..., N) of gate_up's type, contiguous; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: an odd last axis, an unknown activation, a type or device without kernels.
    """
    _check(operation, "gate_up", gate_up, activation)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"{operation}: gate_up is {tuple(gate_up.shape)}, its last axis must be two halves of equal size:"
            " concatenate gate and up along it"
        )
    if takes_reference(gate_up):
        return _packed_reference(gate_up, activation, gate_first)
    return _PackedGLU.apply(gate_up, activation, gate_first)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up: see ``glu``."""
    return glu(gate, up, "silu", operation="swiglu")


def swiglu_packed(gate_up: Tensor, *, gate_first: bool = True) -> Tensor:
    """silu(gate) · up of the halves of one tensor: see ``glu_packed``."""
    return glu_packed(gate_up, "silu", gate_first=gate_first, operation="swiglu_packed")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) · up, ``approximate`` as in ``torch.nn.functional.gelu``: see ``glu``."""
    return glu(gate, up, gelu_form("geglu", approximate), operation="geglu")


def geglu_packed(gate_up: Tensor, approximate: str = "none", *, gate_first: bool = True) -> Tensor:
    """gelu(gate) · up of the halves of one tensor: see ``glu_packed``."""
    activation = gelu_form("geglu_packed", approximate)
    return glu_packed(gate_up, activation, gate_first=gate_first, operation="geglu_packed")


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) · up: see ``glu``."""
    return glu(gate, up, "relu", operation="reglu")
