"""Newton-Schulz: a matrix's singular values are drawn towards 1, its singular vectors kept. Muon's whole cost.

    X ← G / max(‖G‖, ε)                        Frobenius norm; Gᵀ where M > N, so that A is the smaller square
    k times:  A = X · Xᵀ    B = b · A + c · A · A    X ← a · X + B · X

Shapes   G: (M, N) or (batch, M, N), the result likewise; batched matrices do not know of each other
Types    fp32, bf16 or fp16, in which X, A and B are rounded and kept; products are added up in fp32 (fp64 for fp64,
         which only CPUs take). fp32 products are IEEE's, not tf32
Bytes    m = min(M, N), n = max(M, N): k · itemsize · (3 m · n + 5 m²) from the second-level cache outwards at least
Flops    k · (m² · n + m³ + 2 m² · n): A and A · A are symmetric, so their upper tiles are computed and mirrored;
         all of every product would be k · (4 m² · n + 2 m³)
Source   Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Higham 2008, chapter 8
Roof     not measured yet

X, A and B stand in zeroed buffers whose sides are multiples of a tile. Zeros add nothing to any product, so no tile has
a mask and every load is 16 bytes wide, whatever the shape. The launch does not depend on the size of the batch: a
matrix comes out the same to the last bit alone and among others, on whichever rank it is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, check_device, launch, on_device_of, tl, triton
from tritonspeed.kernels.cards import KIB, Card
from tritonspeed.kernels.global_norm import launch_sum_of_squares
from tritonspeed.kernels.rounding import round_nearest
from tritonspeed.kernels.tuned import Tunable, dtype_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0, and within [0.7, 1.2] of 1 after five steps
NUM_STEPS = 5
EPS = 1e-7
GROUP = 8  # rows of tiles that are worked on together: their operands stay in the second-level cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def newton_schulz_reference(
    x: Tensor, steps: int = NUM_STEPS, coefficients: Sequence[float] = COEFFICIENTS, eps: float = EPS
) -> Tensor:
    """The maths above in PyTorch and x's own dtype, one matrix or a batch."""
    a, b, c = coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    g = x.mT if is_tall else x
    norm = torch.linalg.vector_norm(
        g, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    ).clamp(min=eps)
    g = (g / norm).to(x.dtype)
    for _ in range(steps):
        gram = g @ g.mT
        gram = b * gram + c * (gram @ gram)
        g = a * g + gram @ g
    return (g.mT if is_tall else g).contiguous()


@triton.jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a · b; the interpreter knows no bf16 products, and fp32 ones are not to be rounded to tf32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["alpha", "beta"])
def _symmetric_kernel(
    x_ptr, out_ptr, length, side, alpha, beta, ADDS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = β · x · xᵀ (+ α · x, of a symmetric x): (side, length) → (side, side), upper tiles and their mirrors."""
    num_tiles = side // BLOCK
    row, col = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    if col < row:
        return
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * side * length
    out_ptr += matrix * side * side
    alpha, beta = tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32)
    tile, within = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    left = x_ptr + (row * BLOCK).to(tl.int64) * length + (tile[:, None] * length + within[None, :])  # [BLOCK, BLOCK_K]
    right = x_ptr + (col * BLOCK).to(tl.int64) * length + (tile[:, None] * length + within[None, :])
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, length, BLOCK_K):
        acc = _dot(tl.load(left), tl.trans(tl.load(right)), acc, INTERPRET)
        left += BLOCK_K
        right += BLOCK_K
    acc = acc * beta
    at = (row * BLOCK).to(tl.int64) * side + col * BLOCK + (tile[:, None] * side + tile[None, :])
    if ADDS_X:
        acc = acc + alpha * tl.load(x_ptr + at).to(tl.float32)
    out = round_nearest(acc, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + at, out)
    if row != col:
        mirror = (col * BLOCK).to(tl.int64) * side + row * BLOCK + (tile[:, None] * side + tile[None, :])
        tl.store(out_ptr + mirror, tl.trans(out))


@triton.jit(do_not_specialize=["alpha"])
def _update_kernel(
    b_ptr, x_ptr, out_ptr, length, side, alpha, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = b · x + α · x: (side, side), (side, length) → (side, length)."""
    num_rows, num_cols = side // BLOCK, length // BLOCK
    in_group = GROUP * num_cols
    first = tl.program_id(0) // in_group * GROUP
    height = min(num_rows - first, GROUP)
    row = first + tl.program_id(0) % in_group % height
    col = tl.program_id(0) % in_group // height
    matrix = tl.program_id(1).to(tl.int64)
    b_ptr += matrix * side * side
    x_ptr += matrix * side * length
    out_ptr += matrix * side * length
    alpha = tl.cast(alpha, tl.float32)
    tile, within = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    left = b_ptr + (row * BLOCK).to(tl.int64) * side + (tile[:, None] * side + within[None, :])  # [BLOCK, BLOCK_K]
    right = x_ptr + col * BLOCK + (within[:, None] * length + tile[None, :])  # [BLOCK_K, BLOCK]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, side, BLOCK_K):
        acc = _dot(tl.load(left), tl.load(right), acc, INTERPRET)
        left += BLOCK_K
        right += BLOCK_K * length
    at = (row * BLOCK).to(tl.int64) * length + col * BLOCK + (tile[:, None] * length + tile[None, :])
    acc = acc + alpha * tl.load(x_ptr + at).to(tl.float32)
    tl.store(out_ptr + at, round_nearest(acc, out_ptr.dtype.element_ty, INTERPRET))


@dataclass(frozen=True, slots=True)
class NewtonSchulzLaunch:
    """How the products are launched."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, card: Card, *, side: int, dtype: str) -> "NewtonSchulzLaunch":
        """For matrices whose smaller side, rounded up to a power of two, is ``side``; never for a batch's size."""
        stages = 3 if card.backend == "cuda" else 2
        if dtype == "fp32":  # no matrix units: 80 registers a thread on 256 threads, 16 KiB of shared memory
            return cls(64, 32, 256 // card.warp_size, 2)
        if (
            side < 512
        ):  # tiles of 128 would leave most of the card idle; two stages spill 16 bytes on sm_100, three none
            return cls(64, 64 if card.max_shared_bytes > 64 * KIB else 32, 128 // card.warp_size, stages)
        # 256 threads hold a tile of 128² in 86 to 201 registers; 96 KiB of shared memory where 64 columns go ahead in
        # three stages (sm_90), which 99 KiB cards would have no second block beside: 32 columns, 32 KiB there
        block_k = 64 if card.max_shared_bytes >= 160 * KIB else 32
        return cls(128, block_k, 256 // card.warp_size, stages)

    @classmethod
    def candidates(cls, card: Card, *, side: int, dtype: str) -> list["NewtonSchulzLaunch"]:
        """Tiles whose operands fit the card's shared memory in that many stages."""
        itemsize = 4 if dtype == "fp32" else 2
        return [
            cls(block, block_k, threads // card.warp_size, stages)
            for block, threads in ((64, 128), (64, 256), (128, 128), (128, 256))
            for block_k in (32, 64)
            for stages in (2, 3, 4)
            if 2 * block * block_k * itemsize * stages <= card.max_shared_bytes
        ]


NEWTON_SCHULZ = Tunable(
    "newton_schulz",
    (_symmetric_kernel, _update_kernel),
    NewtonSchulzLaunch,
    NewtonSchulzLaunch.heuristic,
    NewtonSchulzLaunch.candidates,
)


def launch_newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The op on a GPU, and on a CPU under the interpreter: (batch, M, N) → the same."""
    is_tall = x.shape[-2] > x.shape[-1]
    g = x.mT if is_tall else x
    batch, m, n = g.shape
    if not g.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device_of(x):
        how = NEWTON_SCHULZ.resolve(card_of(x), side=triton.next_power_of_2(m), dtype=dtype_name(x.dtype))
        side, length = (triton.cdiv(size, how.block) * how.block for size in (m, n))
        now, then = (x.new_zeros(batch, side, length) for _ in range(2))
        gram, square = (x.new_empty(batch, side, side) for _ in range(2))
        for matrix, place in zip(g, now, strict=True):  # each by itself, so that no sum depends on the others
            place[:m, :n].copy_(matrix)
            place.div_(launch_sum_of_squares([place]).sqrt().float().clamp(min=eps))
        constants = {"BLOCK": how.block, "BLOCK_K": how.block_k, "INTERPRET": INTERPRETED}
        options = {"num_warps": how.num_warps, "num_stages": how.num_stages, "fp_fusion": True}
        tiles, num_rows = (side // how.block) ** 2, side // how.block
        for _ in range(steps):
            launch(_symmetric_kernel, (tiles, batch), now, gram, length, side, 0.0, 1.0, ADDS_X=False,
                   **constants, **options)  # fmt: skip
            launch(_symmetric_kernel, (tiles, batch), gram, square, side, side, b, c, ADDS_X=True,
                   **constants, **options)  # fmt: skip
            launch(_update_kernel, (num_rows * (length // how.block), batch), square, now, then, length, side, a,
                   GROUP=GROUP, **constants, **options)  # fmt: skip
            now, then = then, now
    found = now[:, :m, :n]
    return (found.mT if is_tall else found).contiguous()


def _newton_schulz_cpu(x: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """The op on a CPU, matrix by matrix and with torch's fused sums; each in memory of its own."""
    found = []
    for matrix in x:
        is_tall = matrix.shape[0] > matrix.shape[1]
        g = matrix.mT if is_tall else matrix
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(g.contiguous(), dtype=wide).clamp(min=eps)
        g = (g / norm).to(x.dtype).contiguous()
        for _ in range(steps):
            gram = g @ g.mT
            gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            g = torch.addmm(g, gram, g, beta=a)
        found.append(g.mT if is_tall else g)
    return torch.stack(found) if found else torch.empty_like(x, memory_format=torch.contiguous_format)


def _newton_schulz_shape(x: Tensor, *numbers: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "newton_schulz(Tensor x, int steps, float a, float b, float c, float eps) -> Tensor",
    launch_newton_schulz,
    _newton_schulz_shape,
    _newton_schulz_cpu,
)


def newton_schulz(
    x: Tensor, steps: int = NUM_STEPS, coefficients: Sequence[float] = COEFFICIENTS, eps: float = EPS
) -> Tensor:
    """The matrix with x's singular vectors, and singular values near 1.

    Args:
        x: (M, N), or (batch, M, N): fp32, bf16 or fp16. Nothing is differentiated: give it a detached tensor.
        steps: iterations; five are Muon's.
        coefficients: a, b, c.
        eps: the norm is taken to be at least this.

    Returns:
        x's shape and type, contiguous.

    Raises:
        ValueError: another number of dimensions or type, a tensor that requires a gradient, or no such device.
    """
    check_device("newton_schulz", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"newton_schulz: x has shape {tuple(x.shape)}, must be (M, N) or (batch, M, N): view it so")
    if x.dtype not in DTYPES:
        raise ValueError(f"newton_schulz: x is {x.dtype}, must be float32, bfloat16 or float16: convert it")
    if len(coefficients) != 3:
        raise ValueError(f"newton_schulz: {len(coefficients)} coefficients were given, must be three: a, b, c")
    if not 0 <= steps < 100:
        raise ValueError(f"newton_schulz: steps is {steps}, must be in [0, 100)")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("newton_schulz: x requires a gradient, and there is no backward: pass x.detach()")
    batched = x if x.ndim == 3 else x.unsqueeze(0)
    found = torch.ops.tritonspeed.newton_schulz(batched, steps, *coefficients, eps)
    return found if x.ndim == 3 else found.squeeze(0)
