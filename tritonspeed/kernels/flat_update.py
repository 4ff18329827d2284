"""What the optimizers' flat kernels share: their launch, the checks of their arguments, the loop over chunks on a CPU.

An update reads a gradient in fp32, bf16 or fp16, keeps master and states in fp32, and may write a rounded copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._triton import check_device
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import GROUP_ELEMS, round_stochastic_reference

# AdamW, ns per element on one thread at 32 Mi (bf16 gradient, scale, bf16 copy; AMD EPYC with 1 MiB of L2 a core), by
# chunk: 128 Ki 1.13, 256 Ki 0.95, 512 Ki 0.94, 1 Mi 0.98, 2 Mi 1.10. In a quieter run, 64 Mi on large pages, 1 thread /
# 2 threads:
#     in chunks, as here             0.60 / 0.40
#     one pass, ``host_step``        0.43 / 0.24    wants a C++ compiler and 12 s: for large models
#     torch.compile as it is         0.59 / 0.32
#     torch fused, whole tensors     1.61 / 1.02
# torch foreach was 5 and adamw_reference 20 times slower than chunks.
CPU_CHUNK_ELEMS = 512 * 1024
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class FlatLaunch:
    """How an elementwise kernel over a flat chunk is launched: the work per element does not depend on n."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "FlatLaunch":
        # 256 threads × 4 elements: fp32 moves 16 bytes an access; the registers stand in docs/compiled-kernels.md
        return cls(block=1024, num_warps=256 // card.warp_size)

    @classmethod
    def candidates(cls, card: Card) -> list["FlatLaunch"]:
        threads = {512: (128,), 1024: (128, 256), 2048: (256, 512), 4096: (512, 1024)}
        return [cls(block, num // card.warp_size) for block, numbers in threads.items() for num in numbers]


@dataclass(frozen=True, slots=True)
class FlatTensors:
    """The tensors of one update; ``states`` are in the operator's order.

    Attributes:
        master, states: (n,) fp32.
        grad: (n,) in one of ``GRAD_DTYPES``.
        grad_scale, found_inf: one fp32 element, or None.
        param_out: (n,) in one of ``COPY_DTYPES``, or None.
    """

    master: Tensor
    states: tuple[Tensor, ...]
    grad: Tensor
    grad_scale: Tensor | None
    param_out: Tensor | None
    found_inf: Tensor | None


def check_flat(
    operation: str,
    tensors: FlatTensors,
    names: Sequence[str],
    rounding: tuple[int | None, int],
    state_dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse what a kernel would read wrongly.

    Args:
        operation: the public function's name, for the messages.
        names: of the states.
        rounding: (seed of stochastic rounding or None, first element).
        state_dtype: of the states.

    Raises:
        ValueError: types, devices or sizes that do not fit, or a seed without a bf16 ``param_out``.
    """
    master = tensors.master
    check_device(operation, master)
    fp32 = (torch.float32,)
    check_tensor(operation, "master", master, fp32, master)
    for name, state in zip(names, tensors.states, strict=True):
        check_tensor(operation, name, state, (state_dtype,), master)
    check_tensor(operation, "grad", tensors.grad, GRAD_DTYPES, master)
    for name, scalar in (("grad_scale", tensors.grad_scale), ("found_inf", tensors.found_inf)):
        if scalar is not None:
            check_tensor(operation, name, scalar, fp32, master, numel=1)
    if tensors.param_out is not None:
        check_tensor(operation, "param_out", tensors.param_out, COPY_DTYPES, master)
    check_rounding(operation, tensors.param_out, *rounding)


def check_tensor(
    operation: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], master: Tensor, numel: int | None = None
) -> None:
    """Refuse a tensor of another type, device or size than ``master`` asks for, or one that is not contiguous.

    Args:
        numel: elements it must have; None is master's.

    Raises:
        ValueError: what was given, what it must be, and the remedy.
    """
    numel = master.numel() if numel is None else numel
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{operation}: {name} is {x.dtype}, must be {allowed}: convert it with {name}.to(...)")
    if x.device != master.device:
        raise ValueError(f"{operation}: {name} is on {x.device}, master on {master.device}: move one to the other")
    if x.numel() != numel or not x.is_contiguous():
        raise ValueError(
            f"{operation}: {name} has shape {tuple(x.shape)} and strides {x.stride()}, must be contiguous with"
            f" {numel} elements (master has shape {tuple(master.shape)}): pass a flat view, .flatten()"
        )


def check_rounding(operation: str, param_out: Tensor | None, seed: int | None, first_element: int) -> None:
    """Refuse a seed that nothing is rounded with, or a first element inside a group of random words.

    Raises:
        ValueError: what was given, and what it must be.
    """
    if seed is None:
        return
    if param_out is None or param_out.dtype != torch.bfloat16:
        given = "missing" if param_out is None else str(param_out.dtype)
        raise ValueError(
            f"{operation}: stochastic rounding writes a bfloat16 param_out, which is {given}: drop the seed"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{operation}: stochastic_rounding_seed is {seed}, must be in [0, 2**63)")
    if first_element < 0 or first_element % GROUP_ELEMS:
        raise ValueError(
            f"{operation}: first_element is {first_element}, must be a multiple of {GROUP_ELEMS}, not negative"
        )


def check_betas(operation: str, betas: tuple[float, float]) -> None:
    """Refuse decay rates outside [0, 1).

    Raises:
        ValueError: one is.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{operation}: betas are {betas}, each must be in [0, 1)")


def check_step(operation: str, step: int) -> None:
    """Refuse a step that nothing was counted for.

    Raises:
        ValueError: it is below 1.
    """
    if step < 1:
        raise ValueError(f"{operation}: step is {step}, must be at least 1: count the step before the call")


def split_arguments(arguments: tuple[Any, ...], num_states: int) -> tuple[FlatTensors, tuple[Any, ...]]:
    """An operator's arguments: (its tensors, the numbers of the step).

    Args:
        arguments: master, the states, grad, grad_scale, param_out, found_inf, then the numbers.
    """
    first, last = 1 + num_states, 5 + num_states
    return FlatTensors(arguments[0], arguments[1:first], *arguments[first:last]), arguments[last:]


def update_shapes_(*_arguments: object) -> None:
    """An update on tensors without data: it returns nothing and changes no shape."""


def update_on_cpu_(tensors: FlatTensors, update_: Callable[..., None], seed: int | None, first_element: int) -> None:
    """Chunk by chunk: the gradient to fp32 and scaled, the update, the rounded copy.

    Args:
        update_: (start, master, *states, fp32 gradient) of a chunk, in place; the gradient is not to be written.
        seed, first_element: of stochastic rounding, as in ``round_stochastic_reference``; None rounds to nearest.
    """
    if tensors.found_inf is not None and tensors.found_inf.item() != 0:
        return
    master, grad, out = tensors.master, tensors.grad, tensors.param_out
    n = master.numel()
    is_fp32 = grad.dtype == torch.float32
    needs_scratch = tensors.grad_scale is not None or not is_fp32
    scratch = torch.empty(min(n, CPU_CHUNK_ELEMS) if needs_scratch else 0, dtype=torch.float32)
    for start in range(0, n, CPU_CHUNK_ELEMS):
        chunk = slice(start, min(start + CPU_CHUNK_ELEMS, n))
        p, g = master[chunk], grad[chunk]
        if not is_fp32:
            g = scratch[: p.numel()].copy_(g)
        if tensors.grad_scale is not None:
            g = torch.mul(g, tensors.grad_scale, out=scratch[: p.numel()])
        update_(start, p, *(state[chunk] for state in tensors.states), g)
        if out is not None:
            out[chunk].copy_(p if seed is None else round_stochastic_reference(p, seed, first_element + start))


def write_copy_(param_out: Tensor | None, master: Tensor, seed: int | None, first_element: int) -> None:
    """The references' last line: the rounded weights."""
    if param_out is not None:
        param_out.copy_(master if seed is None else round_stochastic_reference(master, seed, first_element))
