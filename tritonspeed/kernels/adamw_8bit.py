"""AdamW with its moments in 8 bits: read, updated in fp32 and written back in the same pass over a flat chunk.

    m, v ← a · code[q]                     a: largest magnitude of the block of 256, fp32; q: uint8
    m, v, p, out as in ``adamw.py``        the update takes the moments before they are rounded again
    q ← nearest code to m / a, v / a       a new; a v that is not 0 does not become 0

The codes stand in ``dynamic_code.py``. Blocks are counted from the buffer's element 0, so that chunks cut at multiples
of 256 agree with the whole.

Shapes   p, g, out, codes: (n,)   scales: (blocks,), of the ⌈((first mod 256) + n) / 256⌉ that the chunk touches
Types    p, scales fp32; codes uint8; g fp32, bf16 or fp16; out bf16 or fp16
Bytes    n · (12 + 1/16 + itemsize(g) + itemsize(out)): 16 n with a 16-bit gradient and copy, for AdamW's 28 n
Flops    80 n
Source   Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861
Roof     not measured yet
"""

from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels._ops import register
from tritonspeed.kernels._triton import INTERPRETED, card_of, launch, on_device_of, tl, triton
from tritonspeed.kernels.adamw import AdamWStep, _torch_step_, adamw_reference
from tritonspeed.kernels.dynamic_code import BLOCK_ELEMS, decode, dequantize_state, encode, num_blocks, quantize_state
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
    m = decode(m_codes, load_fp32(m_scale_ptr + rows, rows_inside), True)
    v = decode(v_codes, load_fp32(v_scale_ptr + rows, rows_inside), False)
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
    m_codes, m_scale = encode(m, True, 1.8, 1.0)
    v_codes, v_scale = encode(v, False, 0.9, 2.0)
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
