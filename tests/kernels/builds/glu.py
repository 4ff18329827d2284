"""Gated units: the flat kernels, and the row kernels at every width of access that a row's length leaves."""

import torch

from builds import Build
from tritonspeed.kernels.glu import (
    launch_glu_backward,
    launch_glu_forward,
    launch_glu_packed_backward,
    launch_glu_packed_forward,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def flat(n: int, dtype: torch.dtype, activation: str) -> None:
    grad, gate, up = (torch.empty(1, n, dtype=dtype) for _ in range(3))
    launch_glu_forward(gate, up, activation)
    launch_glu_backward(grad, gate, up, activation)


def packed(n: int, dtype: torch.dtype, activation: str) -> None:
    grad, gate_up = torch.empty(5, n, dtype=dtype), torch.empty(5, 2 * n, dtype=dtype)
    launch_glu_packed_forward(gate_up, activation, True)
    launch_glu_packed_backward(grad, gate_up, activation, True)


BUILDS = {
    "silu bf16": Build(lambda: flat(4096, BF16, "silu")),
    "silu bf16, odd": Build(lambda: flat(50257, BF16, "silu")),
    "gelu bf16, odd": Build(lambda: flat(50257, BF16, "gelu")),
    "gelu_tanh fp16, odd": Build(lambda: flat(50257, FP16, "gelu_tanh")),
    "silu fp32, odd": Build(lambda: flat(50257, FP32, "silu")),
    "packed silu bf16": Build(lambda: packed(14336, BF16, "silu")),
    "packed gelu fp32": Build(lambda: packed(11008, FP32, "gelu")),
    # rows of gate, up and y that start at different places within 16 bytes: as wide as N allows
    "packed silu bf16, N % 4 = 0": Build(lambda: packed(1004, BF16, "silu"), widest_load=8),
    "packed silu bf16, odd": Build(lambda: packed(1001, BF16, "silu"), widest_load=2),
}
