"""Global norm: the sum of squares over any number of tensors, and whether anything in them overflowed.

    S = Σ_tensors Σ_i x_i²          norm = √S          found_inf = 1 if S is not finite, else 0

Shapes   x: any; S: () fp64; norm, found_inf: () fp32
Types    x fp32, bf16 or fp16; squares in fp32, so an |x| above 1.8e19 may count as an overflow, below 1e-23 as 0
Bytes    n · itemsize(x), and 8 for each SEGMENT of n
Flops    2 n
Source   pairwise summation: Higham 1993, "The accuracy of floating point summation"
Roof     GPU: not measured yet. CPU (2 cores of an AMD EPYC): the table beside ``CPU_ROW_ELEMS``

Two stages without atomics: each program adds up one fixed segment, one program adds up the segments in fp64. The order
of every addition follows from the sizes alone, so two runs, and any number of CPU threads, agree to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import load_fp32
from tritonspeed.kernels.tuned import Tunable

SEGMENT = 32 * 1024  # elements a program adds up: 8 bytes written for 64 KiB read, 32 programs for 1 Mi elements
# ns per element, 1 thread / 2 threads, 32 Mi elements in fp32 (AMD EPYC): rows of 1 Ki 0.107 / 0.058, as fast as longer
# ones and closer to fp64 (4e-10 off, rows of 64 Ki 3e-7); one dot per 512 Ki 0.122 / 0.071 and 3e-6; torch's norm of
# the whole 0.102 / 0.093, on one thread either way
CPU_ROW_ELEMS = 1024
# bf16 through an fp32 scratch of 1 Mi 0.172 / 0.097, of 256 Ki 0.220 / 0.166; torch's bf16 → fp32 norm 0.974 / 0.664
CPU_CHUNK_ELEMS = 1024 * 1024

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sum_of_squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """S in fp64 throughout: what the kernels and the CPU form must equal."""
    return torch.stack([x.double().square().sum() for x in tensors]).sum()


@triton.jit(do_not_specialize=["n"])
def _segment_kernel(x_ptr, partial_ptr, n, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    start = program.to(tl.int64) * SEGMENT  # int64 once, in the base: n may pass 2³¹; offsets stay int32
    x_ptr += start
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    if start + SEGMENT <= n:  # the split keeps the hot path's loads 16 bytes wide whatever n
        for at in tl.static_range(0, SEGMENT, BLOCK):
            x = load_fp32(x_ptr + at + offsets, None)
            sums += x * x
    else:
        for at in range(0, SEGMENT, BLOCK):
            x = load_fp32(x_ptr + at + offsets, at + offsets < n - start)
            sums += x * x
    tl.store(partial_ptr + program, tl.sum(sums.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["num_partials"])
def _total_kernel(partial_ptr, total_ptr, num_partials, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for at in range(0, num_partials, BLOCK):
        sums += tl.load(partial_ptr + at + offsets, mask=at + offsets < num_partials, other=0.0)
    tl.store(total_ptr, tl.sum(sums, axis=0))


@dataclass(frozen=True, slots=True)
class GlobalNormLaunch:
    """How the kernels are launched. One rule for every size."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "GlobalNormLaunch":
        # 256 threads × 16 elements: 4 loads of 16 bytes in flight in 38-48 registers, six blocks an SM; half the block
        # takes 32 registers, twice 64-76 (ptxas, sm_80 and sm_90, triton 3.9)
        return cls(block=4096, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card) -> list["GlobalNormLaunch"]:
        return [cls(block, n // card.warp_size) for block in (2048, 4096, 8192) for n in (128, 256, 512)]


GLOBAL_NORM = Tunable(
    "sum_of_squares",
    (_segment_kernel, _total_kernel),
    GlobalNormLaunch,
    GlobalNormLaunch.heuristic,
    GlobalNormLaunch.candidates,
)


def launch_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The op on a GPU, and on a CPU under the interpreter."""
    num_segments = [triton.cdiv(x.numel(), SEGMENT) for x in tensors]
    partials = torch.empty(sum(num_segments), dtype=torch.float64, device=tensors[0].device)
    total = torch.empty((), dtype=torch.float64, device=tensors[0].device)
    with on_device_of(total):
        how = GLOBAL_NORM.resolve(card_of(total))
        constants = {"BLOCK": how.block, "num_warps": how.num_warps}
        for x, partial in zip(tensors, partials.split(num_segments), strict=True):
            launch(
                _segment_kernel, (partial.numel(),), x.contiguous(), partial, x.numel(), SEGMENT=SEGMENT, **constants
            )  # fmt: skip
        launch(_total_kernel, (1,), partials, total, partials.numel(), **constants)
    return total


def _add_up(x: Tensor) -> Tensor:
    """Σ x of (n,) fp64 in rows, so that no sum is ever split among threads."""
    while x.numel() > CPU_ROW_ELEMS:
        x = F.pad(x, (0, -x.numel() % CPU_ROW_ELEMS)).view(-1, CPU_ROW_ELEMS).sum(1)
    return x.sum()


def _row_norms(x: Tensor) -> list[Tensor]:
    """The fp32 norm of each row of (n,) fp32, and of what is left; a row is one thread's work."""
    whole = x.numel() - x.numel() % CPU_ROW_ELEMS
    rows = (x[:whole].view(-1, CPU_ROW_ELEMS), x[whole:].view(1, -1))
    return [torch.linalg.vector_norm(part, dim=1) for part in rows if part.numel()]


def _sum_of_squares_cpu(tensors: Sequence[Tensor]) -> Tensor:
    """The op on a CPU: the same additions in the same order for any number of threads."""
    norms = [torch.zeros(0)]
    for x in tensors:
        flat = x.reshape(-1)
        if flat.dtype == torch.float32:
            norms += _row_norms(flat)
            continue
        scratch = torch.empty(min(flat.numel(), CPU_CHUNK_ELEMS), dtype=torch.float32)
        for chunk in flat.split(CPU_CHUNK_ELEMS):
            norms += _row_norms(scratch[: chunk.numel()].copy_(chunk))
    return _add_up(torch.cat(norms).double().square_())


def _sum_of_squares_shape(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


register(
    "sum_of_squares(Tensor[] tensors) -> Tensor", launch_sum_of_squares, _sum_of_squares_shape, _sum_of_squares_cpu
)


def _check(operation: str, tensors: Sequence[Tensor]) -> None:
    check_device(operation, tensors[0])
    for i, x in enumerate(tensors):
        if x.dtype not in DTYPES:
            raise ValueError(f"{operation}: tensor {i} is {x.dtype}, must be float32, bfloat16 or float16")
        if x.device != tensors[0].device:
            raise ValueError(
                f"{operation}: tensor {i} is on {x.device}, tensor 0 on {tensors[0].device}: take one norm per device"
                " and add the squares"
            )


def sum_of_squares(x: Tensor) -> Tensor:
    """Σ x², deterministic.

    Args:
        x: any shape, fp32, bf16 or fp16.

    Returns:
        () fp64 on x's device; 0 for an empty x; not finite where x overflowed.

    Raises:
        ValueError: another type, or a device without kernels.
    """
    _check("sum_of_squares", [x])
    return torch.ops.tritonspeed.sum_of_squares([x.detach()])


def global_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The 2-norm of all tensors as one long vector, and the overflow flag; nothing waits for the device.

    Args:
        tensors: at least one, any shapes, fp32, bf16 or fp16, mixed as you like, on one device.

    Returns:
        norm () fp32, found_inf () fp32: 1 where a NaN or infinity is in there or a square overflowed, else 0.

    Raises:
        ValueError: no tensors, another type, or several devices.
    """
    if not tensors:
        raise ValueError("global_norm: the list of tensors is empty, so no device is known: pass at least one tensor")
    _check("global_norm", tensors)
    total = torch.ops.tritonspeed.sum_of_squares([x.detach() for x in tensors])
    return total.sqrt().float(), (~total.isfinite()).float()
