"""Quantised matmuls: the feed-forward projection of a decoder, from one token to a prompt."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels.matmul_w4a16 import matmul_w4a16
from tritonspeed.kernels.matmul_w8a8 import matmul_w8a8, matmul_w8a8_reference
from tritonspeed.kernels.matmul_w8a16 import matmul_w8a16
from tritonspeed.kernels.packing import CHUNK, values_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes

GROUP = 128


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Every number of tokens, down and up the feed-forward part; 16-bit activations only."""
    if dtype not in (torch.float16, torch.bfloat16):
        return []
    found = []
    for m in model.tokens:
        for n, k in ((model.ffn, model.hidden), (model.hidden, model.ffn)):
            if k % CHUNK == 0:
                found += [_w4a16(m, n, k, dtype), _w8a16(m, n, k, dtype)]
                found += [_w8a8(m, n, k, dtype, "int8"), _w8a8(m, n, k, dtype, "fp8")]
    return found


def _case(
    name: str, variant: str, m: int, n: int, k: int, dtype: torch.dtype, weight_bytes: int,
    make: Callable[[Draw], Inputs], run: Callable[[Inputs], Tensor], reference: Callable[[Inputs], Tensor],
    x_bytes: int = 2,
) -> Case:  # fmt: skip
    return Case(
        name, "forward", {"m": m, "n": n, "k": k}, dtype, variant=variant,
        num_bytes=weight_bytes + x_bytes * m * k + 2 * m * n, num_flops=2 * m * n * k, num_summed=k,
        make=lambda device, seed: make(Draw(device, seed)), run=run, reference=reference,
    )  # fmt: skip


def _w4a16(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    group = GROUP if k % GROUP == 0 else CHUNK

    def make(draw: Draw) -> Inputs:
        return {
            "x": draw.normal((m, k), dtype),
            "codes": draw.integers(0, 256, (n, k // 2), torch.uint8),
            "scales": draw.uniform((k // group, n), torch.float16, 0.01, 0.02),
            "zeros": draw.integers(6, 10, (k // group, n), torch.uint8),
        }

    return _case(
        "matmul_w4a16", f"groups of {group}", m, n, k, dtype, n * k // 2 + 3 * n * k // group, make,
        lambda i: matmul_w4a16(i["x"], i["codes"], i["scales"], i["zeros"]),
        lambda i: F.linear(i["x"], values_reference(i["codes"], i["scales"], i["zeros"], i["x"].dtype)),
    )  # fmt: skip


def _w8a16(m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    def make(draw: Draw) -> Inputs:
        return {
            "x": draw.normal((m, k), dtype),
            "codes": draw.integers(-127, 128, (n, k), torch.int8),
            "scales": draw.uniform((1, n), torch.float32, 0.001, 0.002),
        }

    return _case(
        "matmul_w8a16", "", m, n, k, dtype, n * k + 4 * n, make,
        lambda i: matmul_w8a16(i["x"], i["codes"], i["scales"]),
        lambda i: F.linear(i["x"], values_reference(i["codes"], i["scales"], None, i["x"].dtype)),
    )  # fmt: skip


def _w8a8(m: int, n: int, k: int, dtype: torch.dtype, format: str) -> Case:
    codes = torch.int8 if format == "int8" else torch.float8_e4m3fn

    def make(draw: Draw) -> Inputs:
        return {
            "x": draw.integers(0, 127, (m, k), torch.uint8),  # below fp8's NaN, 0x7F
            "x_scales": draw.uniform((m,), torch.float32, 0.01, 0.02),
            "codes": draw.integers(0, 127, (n, k), torch.uint8),
            "scales": draw.uniform((1, n), torch.float32, 0.001, 0.002),
        }

    def arguments(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, None, torch.dtype]:
        return i["x"].view(codes), i["x_scales"], i["codes"].view(codes), i["scales"], None, dtype

    return _case(
        "matmul_w8a8", format, m, n, k, dtype, n * k + 4 * n, make,
        lambda i: matmul_w8a8(*arguments(i)), lambda i: matmul_w8a8_reference(*arguments(i)), x_bytes=1,
    )  # fmt: skip
