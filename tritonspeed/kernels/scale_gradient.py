"""A gradient made for 1, times the gradient that came: out = round(x · g · scale), in one pass that converts too.

Shapes   x, out: any, equal   g, scale: ()
Types    x, out fp32, bf16, fp16 or fp64, each its own; the product fp32 (fp64 for fp64)
Bytes    n · (itemsize(x) + itemsize(out))
Flops    n
Roof     not measured yet

g and scale stay on the device. torch.mul would round their product to a 16-bit x's type first: 1 / 8191 to 8 bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, accumulator, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.rounding import load, store_rounded
from tritonspeed.kernels.tuned import Tunable


def scale_gradient_reference(x: Tensor, g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel must equal, and what CPU tensors take; scale has the type of the product."""
    return (x.to(scale.dtype) * (g.to(scale.dtype) * scale)).to(dtype)


@triton.jit(do_not_specialize=["n"])
def _scale_gradient_kernel(
    x_ptr, g_ptr, scale_ptr, out_ptr, n, BLOCK: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr
):
    factor = tl.load(g_ptr).to(ACC) * tl.load(scale_ptr)
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64 once, in the base: n may pass 2³¹; offsets stay int32
    offsets = tl.arange(0, BLOCK)
    x_ptr += start
    out_ptr += start
    if start + BLOCK <= n:
        x = load(x_ptr + offsets, None, ACC, "evict_first")
        store_rounded(out_ptr + offsets, x * factor, None, INTERPRET)
    else:
        inside = offsets < n - start
        x = load(x_ptr + offsets, inside, ACC, "evict_first")
        store_rounded(out_ptr + offsets, x * factor, inside, INTERPRET)


@dataclass(frozen=True, slots=True)
class ScaleGradientLaunch:
    """How the kernel is launched. One rule for every size."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "ScaleGradientLaunch":
        return cls(block=2048, num_warps=256 // card.warp_size)  # 8 elements a thread: 16 bytes of bf16, twice of fp32

    @classmethod
    def candidates(cls, card: Card) -> list["ScaleGradientLaunch"]:
        return [cls(block, n // card.warp_size) for block in (1024, 2048, 4096) for n in (128, 256, 512)]


SCALE_GRADIENT = Tunable(
    "scale_gradient",
    (_scale_gradient_kernel,),
    ScaleGradientLaunch,
    ScaleGradientLaunch.heuristic,
    ScaleGradientLaunch.candidates,
)


def launch_scale_gradient(x: Tensor, g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x · g · scale, rounded to dtype: the op on a GPU, and on a CPU under the interpreter."""
    out = torch.empty_like(x, dtype=dtype)
    with on_device_of(x):
        how = SCALE_GRADIENT.resolve(card_of(x))
        launch(
            _scale_gradient_kernel, (triton.cdiv(x.numel(), how.block),), x, g, scale, out, x.numel(),
            BLOCK=how.block, ACC=accumulator(x.dtype), INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip
    return out


register(
    "scale_gradient(Tensor x, Tensor g, Tensor scale, ScalarType dtype) -> Tensor",
    launch_scale_gradient,
    lambda x, g, scale, dtype: torch.empty_like(x, dtype=dtype),
    scale_gradient_reference,
)


def scale_gradient(x: Tensor, g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x · g · scale in ``dtype``; x contiguous, g of any floating type, scale fp32 (fp64 where x is), on one device."""
    return torch.ops.tritonspeed.scale_gradient(x, g, scale, dtype)
