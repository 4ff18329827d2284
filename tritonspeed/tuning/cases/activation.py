"""Gated units, of two tensors and packed, and GELU with bias and dropout, at a feed-forward layer's inner width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels.bias_gelu import bias_gelu
from tritonspeed.kernels.glu import swiglu, swiglu_packed
from tritonspeed.tuning.case import Case, Draw, Inputs, gradients
from tritonspeed.tuning.shapes import ModelShapes

OPS = torch.ops.tritonspeed


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Both directions of all three for every number of tokens."""
    makers = (_forward, _backward, _packed_forward, _packed_backward, _gelu_forward, _gelu_backward)
    return [make(rows, model.ffn, dtype) for rows in model.tokens for make in makers]


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _plain_packed(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _plain_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _pair(rows: int, n: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return {name: draw.normal((rows, n), dtype) for name in ("gate", "up", "grad")}


def _packed(rows: int, n: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return {"gate_up": draw.normal((rows, 2 * n), dtype), "grad": draw.normal((rows, n), dtype)}


def _biased(rows: int, n: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return {
        "x": draw.normal((rows, n), dtype), "bias": draw.normal((n,), dtype), "grad": draw.normal((rows, n), dtype)
    }  # fmt: skip


def _forward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "swiglu", "forward", {"rows": rows, "n": n}, dtype, num_bytes=3 * rows * n * dtype.itemsize,
        num_flops=5 * rows * n, make=lambda device, seed: _pair(rows, n, dtype, device, seed),
        run=lambda inputs: swiglu(inputs["gate"], inputs["up"]),
        reference=lambda inputs: _plain(inputs["gate"], inputs["up"]),
    )  # fmt: skip


def _backward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "swiglu", "backward", {"rows": rows, "n": n}, dtype, num_bytes=5 * rows * n * dtype.itemsize,
        num_flops=10 * rows * n, make=lambda device, seed: _pair(rows, n, dtype, device, seed),
        run=lambda inputs: OPS.glu_backward(inputs["grad"], inputs["gate"], inputs["up"], "silu"),
        reference=lambda inputs: gradients(
            _plain, {name: inputs[name] for name in ("gate", "up")}, inputs["grad"]
        ),
    )  # fmt: skip


def _packed_forward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "swiglu", "forward", {"rows": rows, "n": n}, dtype, variant="packed", num_bytes=3 * rows * n * dtype.itemsize,
        num_flops=5 * rows * n, make=lambda device, seed: _packed(rows, n, dtype, device, seed),
        run=lambda inputs: swiglu_packed(inputs["gate_up"]),
        reference=lambda inputs: _plain_packed(inputs["gate_up"]),
    )  # fmt: skip


def _packed_backward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "swiglu", "backward", {"rows": rows, "n": n}, dtype, variant="packed",
        num_bytes=5 * rows * n * dtype.itemsize, num_flops=10 * rows * n,
        make=lambda device, seed: _packed(rows, n, dtype, device, seed),
        run=lambda inputs: OPS.glu_packed_backward(inputs["grad"], inputs["gate_up"], "silu", True),
        reference=lambda inputs: gradients(_plain_packed, {"gate_up": inputs["gate_up"]}, inputs["grad"]),
    )  # fmt: skip


def _gelu_forward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "bias_gelu", "forward", {"rows": rows, "n": n}, dtype, num_bytes=(2 * rows + 1) * n * dtype.itemsize,
        num_flops=30 * rows * n, make=lambda device, seed: _biased(rows, n, dtype, device, seed),
        run=lambda inputs: bias_gelu(inputs["x"], inputs["bias"]),
        reference=lambda inputs: _plain_gelu(inputs["x"], inputs["bias"]),
    )  # fmt: skip


def _gelu_backward(rows: int, n: int, dtype: torch.dtype) -> Case:
    return Case(
        "bias_gelu", "backward", {"rows": rows, "n": n}, dtype, num_bytes=(3 * rows + 1) * n * dtype.itemsize,
        num_flops=50 * rows * n, make=lambda device, seed: _biased(rows, n, dtype, device, seed),
        run=lambda inputs: OPS.bias_gelu_backward(inputs["grad"], inputs["x"], inputs["bias"], None, "gelu", 0),
        reference=lambda inputs: gradients(
            _plain_gelu, {name: inputs[name] for name in ("x", "bias")}, inputs["grad"]
        ),
        num_summed=rows,
    )  # fmt: skip
