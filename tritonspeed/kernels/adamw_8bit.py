"""AdamW with its moments in 8 bits: read, updated in fp32 and written back in the same pass over a flat chunk.

    m, v ← a · code[q]                     a: largest magnitude of the block of 256, fp32; q: uint8
    m, v, p, out as in ``adamw.py``        the update takes the moments before they are rounded again
    q ← nearest code to m / a, v / a       a new; a v that is not 0 does not become 0

Dynamic code: decade i of 0 to 6 is cut into 2^(i + s) equal cells, whose middles are its codes (s = 0 for m, which has
a sign, and 1 for v): value = 10^(i − 6) · (0.1 + 0.9 · (j + ½) / 2^(i + s)), j in [0, 2^(i + s)). With 0 and 1 that
makes 256, and seven decades in a byte. Of q, m takes 7 bits as k = 2^i + j, v all 8 as k = 2^(i + 1) + j − 1; k = 0 is
0. The top bit is m's sign; "−0" stands for +1 (−1 is 0.7 % off), and 255 is v's 1. i and 2^i are a float's exponent: no
table.

Blocks are counted from the buffer's element 0, so that chunks cut at multiples of 256 agree with the whole.

Shapes   p, g, out, codes: (n,)   scales: (blocks,), of the ⌈((first mod 256) + n) / 256⌉ that the chunk touches
Types    p, scales fp32; codes uint8; g fp32, bf16 or fp16; out bf16 or fp16
Bytes    n · (12 + 1/16 + itemsize(g) + itemsize(out)): 16 n with a 16-bit gradient and copy, for AdamW's 28 n
Flops    80 n
Source   Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861
Roof     not measured yet

Why v is kept from 0: its code ends at 3·10⁻⁷ of the block's largest, √ of which is 6·10⁻⁴, where m has codes left to
go. A v of 0 beneath an m that is not would step by m / ε.
"""

from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.adamw import AdamWStep, _torch_step_, adamw_reference
from tritonspeed.kernels.flat_update import (
    FlatLaunch,
    FlatTensors,
    check_betas,
    check_flat,
    check_step,
    check_tensor,
    split_arguments,
    update_on_cpu_,
    update_shapes_,
)
from tritonspeed.kernels.rounding import load_fp32, round_nearest, round_stochastic, store
from tritonspeed.kernels.tuned import Tunable

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


def adamw_8bit_reference(
    master: Tensor,
    exp_avg_code: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_code: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    *,
    found_inf: Tensor | None = None,
    first_element: int = 0,
    **options: Any,
) -> None:
    """The maths above in PyTorch, in place; ``options`` are those of ``adamw_reference``."""
    if found_inf is not None and found_inf.item() != 0:
        return
    m = dequantize_state(exp_avg_code, exp_avg_scale, True, first_element)
    v = dequantize_state(exp_avg_sq_code, exp_avg_sq_scale, False, first_element)
    adamw_reference(master, m, v, grad, first_element=first_element, **options)
    for codes, scales, x, is_signed in (
        (exp_avg_code, exp_avg_scale, m, True),
        (exp_avg_sq_code, exp_avg_sq_scale, v, False),
    ):
        new_codes, new_scales = quantize_state(x, is_signed, first_element)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


@triton.jit
def _decode(codes, scale, SIGNED: tl.constexpr):
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
def _encode(x, SIGNED: tl.constexpr, HALF_STEP: tl.constexpr, FIRST_CELLS: tl.constexpr):
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


@triton.jit
def _adamw_8bit_tile(
    master_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, grad_ptr, out_ptr, scale, offsets, inside, rows, rows_inside,
    seed, first_element, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size,
    inverse_root_c2, DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    p = load_fp32(master_ptr + offsets, inside)  # [rows, 256], as all below
    g = load_fp32(grad_ptr + offsets, inside)
    if inside is None:
        m_codes, v_codes = tl.load(m_ptr + offsets), tl.load(v_ptr + offsets)
    else:
        m_codes = tl.load(m_ptr + offsets, mask=inside, other=0)
        v_codes = tl.load(v_ptr + offsets, mask=inside, other=0)
    m = _decode(m_codes, load_fp32(m_scale_ptr + rows, rows_inside), True)
    v = _decode(v_codes, load_fp32(v_scale_ptr + rows, rows_inside), False)
    if scale is not None:
        g = g * scale
    if not DECOUPLED:
        g = g + weight_decay * p
    if inside is not None:
        g = tl.where(inside, g, 0.0)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    update = step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_c2 + eps)
    if DECOUPLED:
        update = decay * p + update
    p = p - update
    m_codes, m_scale = _encode(m, True, 1.8, 1.0)
    v_codes, v_scale = _encode(v, False, 0.9, 2.0)
    store(m_ptr + offsets, m_codes, inside)
    store(v_ptr + offsets, v_codes, inside)
    store(m_scale_ptr + rows, m_scale, rows_inside)
    store(v_scale_ptr + rows, v_scale, rows_inside)
    store(master_ptr + offsets, p, inside)
    if out_ptr is not None:
        if seed is None:
            out = round_nearest(p, out_ptr.dtype.element_ty, INTERPRET)
        else:
            out = tl.reshape(round_stochastic(tl.reshape(p, [BLOCK]), first_element, seed, BLOCK), p.shape)
        store(out_ptr + offsets, out, inside)


@triton.jit(do_not_specialize=["n", "seed", "first_element"])
def _adamw_8bit_kernel(
    master_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, grad_ptr, out_ptr, scale_ptr, found_inf_ptr, n, shift, seed,
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

    ROWS: tl.constexpr = BLOCK // 256
    start = tl.program_id(0).to(tl.int64) * BLOCK - shift  # of the chunk; whole blocks, so the first may start before 0
    master_ptr += start
    m_ptr += start
    v_ptr += start
    grad_ptr += start
    if out_ptr is not None:
        out_ptr += start
    rows = tl.arange(0, ROWS)
    m_scale_ptr += tl.program_id(0).to(tl.int64) * ROWS
    v_scale_ptr += tl.program_id(0).to(tl.int64) * ROWS
    offsets = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
    # the split keeps the hot path's loads wide: a bound that 16 does not divide makes masked ones scalar
    if (start >= 0) & (start + BLOCK <= n):
        _adamw_8bit_tile(
            master_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, grad_ptr, out_ptr, scale, offsets, None, rows, None,
            seed, first_element + start, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay,
            step_size, inverse_root_c2, DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip
    else:
        inside = (offsets >= -start) & (offsets < n - start)
        _adamw_8bit_tile(
            master_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, grad_ptr, out_ptr, scale, offsets, inside, rows,
            rows * 256 < n - start, seed, first_element + start, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
            weight_decay, decay, step_size, inverse_root_c2, DECOUPLED, BLOCK, INTERPRET,
        )  # fmt: skip


def _heuristic(card: Any) -> FlatLaunch:
    # four elements a thread, as AdamW: a row of 256 is two warps', whose maximum crosses through shared memory
    return FlatLaunch(block=1024, num_warps=256 // card.warp_size)


def _candidates(card: Any) -> list[FlatLaunch]:
    threads = {512: (128,), 1024: (128, 256), 2048: (256, 512)}
    return [FlatLaunch(block, num // card.warp_size) for block, numbers in threads.items() for num in numbers]


ADAMW_8BIT = Tunable("adamw_8bit_", (_adamw_8bit_kernel,), FlatLaunch, _heuristic, _candidates)


def launch_adamw_8bit_(tensors: FlatTensors, at: AdamWStep) -> None:
    """Launch the kernel: the op on a GPU, and on a CPU under the interpreter. States: codes and scales of m, then v."""
    master, n, shift = tensors.master, tensors.master.numel(), at.first_element % BLOCK_ELEMS
    with on_device_of(master):
        how = ADAMW_8BIT.resolve(card_of(master))
        launch(
            _adamw_8bit_kernel, (triton.cdiv(n + shift, how.block) if n else 0,),
            master, *tensors.states, tensors.grad, tensors.param_out, tensors.grad_scale, tensors.found_inf, n, shift,
            at.seed, at.first_element, *at.coefficients, DECOUPLED=at.decoupled, BLOCK=how.block,
            INTERPRET=INTERPRETED, num_warps=how.num_warps,
        )  # fmt: skip


def _split(arguments: tuple[Any, ...]) -> tuple[FlatTensors, AdamWStep]:
    tensors, numbers = split_arguments(arguments, num_states=4)
    return tensors, AdamWStep(*numbers)


def _launched_(*arguments: Any) -> None:
    launch_adamw_8bit_(*_split(arguments))


def _on_cpu_(*arguments: Any) -> None:
    tensors, at = _split(arguments)
    n = tensors.master.numel()
    head = min(n, -at.first_element % BLOCK_ELEMS)  # to the first block's end, so that chunks end where blocks do
    for start, end in ((0, head), (head, n)):
        _piece_on_cpu_(tensors, at, start, end)


def _piece_on_cpu_(tensors: FlatTensors, at: AdamWStep, piece_start: int, piece_end: int) -> None:
    m_codes, m_scales, v_codes, v_scales = tensors.states
    first = at.first_element + piece_start

    def update_(start: int, master: Tensor, grad: Tensor) -> None:
        here = slice(piece_start + start, piece_start + start + master.numel())
        row = (first + start) // BLOCK_ELEMS - at.first_element // BLOCK_ELEMS
        rows = slice(row, row + num_blocks(first + start, master.numel()))
        m = dequantize_state(m_codes[here], m_scales[rows], True, first + start)
        v = dequantize_state(v_codes[here], v_scales[rows], False, first + start)
        _torch_step_(master, m, v, grad, at)
        for codes, scales, x, is_signed in ((m_codes, m_scales, m, True), (v_codes, v_scales, v, False)):
            codes[here], scales[rows] = quantize_state(x, is_signed, first + start)

    piece = slice(piece_start, piece_end)
    out = None if tensors.param_out is None else tensors.param_out[piece]
    bare = FlatTensors(tensors.master[piece], (), tensors.grad[piece], tensors.grad_scale, out, tensors.found_inf)
    update_on_cpu_(bare, update_, at.seed, first)


register(
    "adamw_8bit_(Tensor(a!) master, Tensor(b!) exp_avg_code, Tensor(c!) exp_avg_scale, Tensor(d!) exp_avg_sq_code,"
    " Tensor(e!) exp_avg_sq_scale, Tensor grad, Tensor? grad_scale, Tensor(f!)? param_out, Tensor? found_inf,"
    " SymInt step, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled,"
    " bool bias_correction, SymInt? seed, SymInt first_element) -> ()",
    _launched_,
    update_shapes_,
    _on_cpu_,
)


def adamw_8bit_(
    master: Tensor,
    exp_avg_code: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_code: Tensor,
    exp_avg_sq_scale: Tensor,
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
) -> None:
    """One AdamW step of a flat chunk with 8-bit moments, in place. Cut a buffer at multiples of 256: the numbers stay.

    Args:
        master: (n,) fp32, contiguous: the weights.
        exp_avg_code, exp_avg_sq_code: (n,) uint8; zeros to start with.
        exp_avg_scale, exp_avg_sq_scale: (``num_blocks(first_element, n)``,) fp32; zeros to start with.
        grad: (n,) fp32, bf16 or fp16; not changed.
        first_element: index of master[0] in the whole buffer, a multiple of 4: blocks are counted from its element 0.
        others: as of ``adamw_``.

    Raises:
        ValueError: types, devices or sizes that do not fit, or coefficients out of range.
    """
    tensors = FlatTensors(master, (), grad, grad_scale, param_out, found_inf)
    check_flat("adamw_8bit_", tensors, (), (stochastic_rounding_seed, first_element))
    for name, codes in (("exp_avg_code", exp_avg_code), ("exp_avg_sq_code", exp_avg_sq_code)):
        check_tensor("adamw_8bit_", name, codes, (torch.uint8,), master)
    blocks = num_blocks(first_element, master.numel())
    for name, scales in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        check_tensor("adamw_8bit_", name, scales, (torch.float32,), master, numel=blocks)
    check_betas("adamw_8bit_", betas)
    check_step("adamw_8bit_", step)
    torch.ops.tritonspeed.adamw_8bit_(
        master, exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale, grad, grad_scale, param_out, found_inf,
        step, lr, *betas, eps, weight_decay, decoupled, bias_correction, stochastic_rounding_seed, first_element,
    )  # fmt: skip
