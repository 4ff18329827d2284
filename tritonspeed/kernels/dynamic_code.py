"""Dynamic code: optimizer moments in 8 bits, in blocks of 256 that share a scale.

Decade i of 0 to 6 is cut into 2^(i + s) equal cells, whose middles are its codes (s = 0 for m, which has a sign, and 1
for v): value = 10^(i − 6) · (0.1 + 0.9 · (j + ½) / 2^(i + s)), j in [0, 2^(i + s)). With 0 and 1 that makes 256, and
seven decades in a byte. Of q, m takes 7 bits as k = 2^i + j, v all 8 as k = 2^(i + 1) + j − 1; k = 0 is 0. The top bit
is m's sign; "−0" stands for +1 (−1 is 0.7 % off), and 255 is v's 1. i and 2^i are a float's exponent: no table.

Blocks are counted from the buffer's element 0, so that chunks cut at multiples of 256 agree with the whole.

Why v is kept from 0: its code ends at 3·10⁻⁷ of the block's largest, √ of which is 6·10⁻⁴, where m has codes left to
go. A v of 0 beneath an m that is not would step by m / ε.

Source   Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861
"""

import torch
from torch import Tensor

from tritonspeed.kernels._triton import tl, triton

BLOCK_ELEMS = 256
MIN_ELEMS = 4096  # below, moments stay fp32: little to save, and norms and biases are the most sensitive
_EXPONENT = 0x7F800000


def num_blocks(first_element: int, n: int) -> int:
    """Blocks that elements [first_element, first_element + n) touch."""
    return -(-(first_element % BLOCK_ELEMS + n) // BLOCK_ELEMS)


def decode_reference(codes: Tensor, is_signed: bool) -> Tensor:
    """uint8 → fp32 in [−1, 1], as the kernel does it: every operation is exact or rounded by itself."""
    q = codes.to(torch.int32)
    k = (q & 127) if is_signed else q
    counted = (k if is_signed else k + 1).to(torch.float32)
    exponent = (counted.view(torch.int32) & _EXPONENT) >> 23
    cells = torch.where(k > 0, exponent << 23, 127 << 23).to(torch.int32).view(torch.float32)
    decade = exponent - (127 if is_signed else 128)
    ten = torch.full_like(counted, 1e-6)
    for i in range(1, 7):
        ten = torch.where(decade >= i, 10.0 ** (i - 6), ten)
    value = (0.1 + 0.9 * ((counted - cells + 0.5) / cells)) * ten
    value = torch.where(k > 0, value, 0.0)
    if is_signed:
        return torch.where(q == 128, 1.0, torch.where(q > 128, -value, value))
    return torch.where(q == 255, 1.0, value)


def encode_reference(x: Tensor, is_signed: bool) -> Tensor:
    """fp32 in [−1, 1] → uint8: the nearest code, and for v none that is 0 but for 0; NaN becomes 0."""
    a = torch.where(x.isnan(), 0.0, x.abs())
    half_step = 1.8 if is_signed else 0.9
    ten, cells = torch.full_like(a, 1e6), torch.full_like(a, 1.0 if is_signed else 2.0)
    for i in range(1, 7):
        is_above = a >= _float32(10.0 ** (i - 7) * (1 + half_step / 2**i))  # between the last code below and the first
        ten = torch.where(is_above, 10.0 ** (6 - i), ten)
        cells = torch.where(is_above, 2.0 ** (i if is_signed else i + 1), cells)
    j = ((a * ten - 0.1) * (cells * _float32(1 / 0.9))).clamp(min=0.0).to(torch.int32)
    whole = cells.to(torch.int32)
    k = whole + torch.minimum(j, whole - 1) - (0 if is_signed else 1)
    if is_signed:
        k = torch.where(a < _float32(2.75e-7), 0, k)
        q = torch.where((x < 0) & (k > 0), k | 128, k)
        q = torch.where(x >= _float32(1 - 0.225 / 64), 128, q)
    else:
        k = torch.where(a == 0, 0, k)
        q = torch.where(a >= _float32(1 - 0.225 / 128), 255, k)
    return q.to(torch.uint8)


def _float32(x: float) -> float:
    """x as the nearest fp32: the constant that a kernel compares with."""
    return torch.tensor(x, dtype=torch.float32).item()


def _blocks(x: Tensor, first_element: int) -> Tensor:
    """(n,) → (blocks, 256), zeros where the chunk does not reach."""
    shift, n = first_element % BLOCK_ELEMS, x.numel()
    rest = num_blocks(first_element, n) * BLOCK_ELEMS - shift - n
    return torch.nn.functional.pad(x, (shift, rest)).view(-1, BLOCK_ELEMS)


def dequantize_state(codes: Tensor, scales: Tensor, is_signed: bool, first_element: int = 0) -> Tensor:
    """The moments that codes and scales stand for: fp32 (n,)."""
    values = decode_reference(_blocks(codes, first_element), is_signed) * scales[:, None]
    shift = first_element % BLOCK_ELEMS
    return values.view(-1)[shift : shift + codes.numel()]


def quantize_state(x: Tensor, is_signed: bool, first_element: int = 0) -> tuple[Tensor, Tensor]:
    """fp32 (n,) → codes uint8 (n,) and scales fp32 (blocks,). A block with a NaN reads as NaN from then on."""
    blocks = _blocks(x.to(torch.float32), first_element)
    # as integers, so that NaN is the largest
    scales = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1).to(torch.int32).view(torch.float32)
    safe = torch.where(scales == 0, 1.0, scales)
    codes = encode_reference(blocks / safe[:, None], is_signed)
    shift = first_element % BLOCK_ELEMS
    return codes.view(-1)[shift : shift + x.numel()], scales


@triton.jit
def decode(codes, scale, SIGNED: tl.constexpr):
    """uint8 [rows, 256] → fp32, times the scale of each row."""
    q = codes.to(tl.int32)
    if SIGNED:
        k = q & 127
        counted = k.to(tl.float32)
        exponent = (counted.to(tl.int32, bitcast=True) & 0x7F800000) >> 23
        decade = exponent - 127
    else:
        k = q
        counted = (k + 1).to(tl.float32)
        exponent = (counted.to(tl.int32, bitcast=True) & 0x7F800000) >> 23
        decade = exponent - 128
    # the reciprocal of a power of two is one, and exact
    cells = tl.where(k > 0, exponent << 23, 127 << 23).to(tl.int32).to(tl.float32, bitcast=True)
    per_cell = tl.where(k > 0, (254 - exponent) << 23, 127 << 23).to(tl.int32).to(tl.float32, bitcast=True)
    ten = tl.where(decade >= 1, 1e-5, 1e-6)
    ten = tl.where(decade >= 2, 1e-4, ten)
    ten = tl.where(decade >= 3, 1e-3, ten)
    ten = tl.where(decade >= 4, 1e-2, ten)
    ten = tl.where(decade >= 5, 1e-1, ten)
    ten = tl.where(decade >= 6, 1.0, ten).to(tl.float32)
    value = (0.1 + 0.9 * ((counted - cells + 0.5) * per_cell)) * ten
    value = tl.where(k > 0, value, 0.0)
    if SIGNED:
        value = tl.where(q > 128, -value, value)
        value = tl.where(q == 128, 1.0, value)
    else:
        value = tl.where(q == 255, 1.0, value)
    return value * scale[:, None]


@triton.jit
def encode(x, SIGNED: tl.constexpr, HALF_STEP: tl.constexpr, FIRST_CELLS: tl.constexpr):
    """fp32 [rows, 256] → codes uint8 and the scale of each row."""
    # as integers, so that NaN is the largest: the block is NaN from then on, and is seen
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.cast(largest, tl.float32, bitcast=True)
    safe = tl.where(scale == 0.0, 1.0, scale)
    x = tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape))
    a = tl.where(x == x, tl.abs(x), 0.0)
    ten = tl.where(a >= 1e-6 * (1 + HALF_STEP / 2), 1e5, 1e6)
    cells = tl.where(a >= 1e-6 * (1 + HALF_STEP / 2), 2.0 * FIRST_CELLS, FIRST_CELLS)
    ten = tl.where(a >= 1e-5 * (1 + HALF_STEP / 4), 1e4, ten)
    cells = tl.where(a >= 1e-5 * (1 + HALF_STEP / 4), 4.0 * FIRST_CELLS, cells)
    ten = tl.where(a >= 1e-4 * (1 + HALF_STEP / 8), 1e3, ten)
    cells = tl.where(a >= 1e-4 * (1 + HALF_STEP / 8), 8.0 * FIRST_CELLS, cells)
    ten = tl.where(a >= 1e-3 * (1 + HALF_STEP / 16), 1e2, ten)
    cells = tl.where(a >= 1e-3 * (1 + HALF_STEP / 16), 16.0 * FIRST_CELLS, cells)
    ten = tl.where(a >= 1e-2 * (1 + HALF_STEP / 32), 1e1, ten)
    cells = tl.where(a >= 1e-2 * (1 + HALF_STEP / 32), 32.0 * FIRST_CELLS, cells)
    ten = tl.where(a >= 1e-1 * (1 + HALF_STEP / 64), 1.0, ten).to(tl.float32)
    cells = tl.where(a >= 1e-1 * (1 + HALF_STEP / 64), 64.0 * FIRST_CELLS, cells).to(tl.float32)
    j = (a * ten - 0.1) * (cells * 1.1111111111111112)
    j = tl.where(j > 0.0, j, 0.0).to(tl.int32)
    whole = cells.to(tl.int32)
    k = whole + tl.minimum(j, whole - 1)
    if SIGNED:
        k = tl.where(a < 2.75e-7, 0, k)
        q = tl.where((x < 0.0) & (k > 0), k | 128, k)
        q = tl.where(x >= 0.996484375, 128, q)
    else:
        q = tl.where(a == 0.0, 0, k - 1)
        q = tl.where(a >= 0.9982421875, 255, q)
    return q.to(tl.uint8), scale
