"""Quantised communication and weights: a block's gradient to codes, a projection back, and the sum of eight ranks."""

import torch
from torch import Tensor

from tritonspeed.kernels.codes import FORMATS, Quantized
from tritonspeed.kernels.dequantize import dequantize, dequantize_reference, dequantize_sum_reference, requantize_sum
from tritonspeed.kernels.quantize import quantize, quantize_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes

NUM_RANKS = 8  # of one node: the first, intra-node step of a quantised reduction


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Gradients in groups of 256 or less, weights in groups of 128 or less."""
    gradient, weight = (model.num_block_params, 1), (model.ffn, model.hidden)
    gradient_group, weight_group = _group(256, gradient[0]), _group(128, weight[1])
    return [
        _forth(gradient[0] // 4096, 4096, "int8", _group(256, 4096), dtype),
        _forth(*weight, "int4", weight_group, dtype),
        _forth(*weight, "fp8", weight[1], dtype),
        _back(*weight, "int4", weight_group, dtype),
        _sum(gradient[0] // NUM_RANKS // gradient_group, gradient_group, "int8", dtype),
        _sum(gradient[0] // NUM_RANKS // gradient_group, gradient_group, "int4", dtype),
    ]


def _group(wanted: int, n: int) -> int:
    while n % wanted:
        wanted //= 2
    return wanted


def _bytes(rows: int, n: int, format: str, group_size: int) -> int:
    groups = n // group_size
    return rows * groups * (FORMATS[format].num_codes(group_size) + 4)


def _reference(x: Tensor, format: str, group_size: int) -> Tensor:
    return quantize_reference(x, format, group_size, True)[0]


def _forth(rows: int, n: int, format: str, group_size: int, dtype: torch.dtype) -> Case:
    return Case(
        "quantize", "forward", {"rows": rows, "n": n}, dtype, variant=f"{format}, groups of {group_size}",
        num_bytes=rows * n * dtype.itemsize + _bytes(rows, n, format, group_size), num_flops=4 * rows * n,
        make=lambda device, seed: {"x": Draw(device, seed).normal((rows, n), dtype)},
        run=lambda inputs: quantize(inputs["x"], format, group_size).codes.view(torch.uint8),
        reference=lambda inputs: _reference(inputs["x"], format, group_size),
    )  # fmt: skip


def _draw(ranks: int, rows: int, n: int, format: str, group_size: int, device: torch.device, seed: int) -> Inputs:
    draw, groups = Draw(device, seed), n // group_size
    width = groups * FORMATS[format].num_codes(group_size)
    # 0x7F and 0xFF are fp8's NaN: codes below them, in two steps of sign
    codes = draw.integers(0, 127, (ranks, rows, width), torch.uint8)
    return {"codes": codes, "scales": draw.normal((ranks, rows, groups), torch.float32).abs_()}


def _quantized(inputs: Inputs, format: str, group_size: int, shape: tuple[int, ...]) -> Quantized:
    codes, scales = inputs["codes"].view(FORMATS[format].dtype), inputs["scales"]
    lead = shape[:-1]
    return Quantized(codes.view(*lead, -1), scales.float().view(*lead, -1), None, format, group_size, torch.Size(shape))


def _back(rows: int, n: int, format: str, group_size: int, dtype: torch.dtype) -> Case:
    return Case(
        "dequantize", "forward", {"rows": rows, "n": n}, dtype, variant=f"{format}, groups of {group_size}",
        num_bytes=rows * n * dtype.itemsize + _bytes(rows, n, format, group_size), num_flops=3 * rows * n,
        make=lambda device, seed: _draw(1, rows, n, format, group_size, device, seed),
        run=lambda inputs: dequantize(_quantized(inputs, format, group_size, (rows, n)), dtype),
        reference=lambda inputs: dequantize_reference(
            inputs["codes"][0], inputs["scales"][0], None, format, group_size, dtype
        ),
    )  # fmt: skip


def _sum(rows: int, n: int, format: str, dtype: torch.dtype) -> Case:
    empty = torch.empty(0)

    def reference(inputs: Inputs) -> Tensor:
        total = dequantize_sum_reference(inputs["codes"], inputs["scales"], empty, format, n, torch.float32)
        return _reference(total, format, n)

    return Case(
        "requantize_sum", "forward", {"ranks": NUM_RANKS, "rows": rows, "n": n}, dtype, variant=format,
        num_bytes=(NUM_RANKS + 1) * _bytes(rows, n, format, n), num_flops=(3 * NUM_RANKS + 4) * rows * n,
        make=lambda device, seed: _draw(NUM_RANKS, rows, n, format, n, device, seed),
        run=lambda inputs: requantize_sum(_quantized(inputs, format, n, (NUM_RANKS, rows, n))).codes.view(torch.uint8),
        reference=reference,
    )  # fmt: skip
