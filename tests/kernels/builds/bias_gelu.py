"""Bias + GELU + dropout: both directions with all of it, aligned and odd rows, and the plain GELU."""

import torch

from builds import Build
from tritonspeed.kernels.bias_gelu import launch_bias_gelu_backward, launch_bias_gelu_forward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(m: int, n: int, dtype: torch.dtype, activation: str, has_bias: bool = True, drops: bool = False) -> None:
    grad, x = torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    bias, seed = torch.empty(n, dtype=dtype) if has_bias else None, torch.zeros((), dtype=torch.int64)
    threshold = 6554 if drops else 0
    launch_bias_gelu_forward(x, bias, x if drops else None, seed if drops else None, activation, threshold)
    launch_bias_gelu_backward(grad, x, bias, seed if drops else None, activation, threshold)


# db's partial rows of odd length are read an element at a time, 4 bytes; test_bias_gelu.py sees to x there
BUILDS = {
    "gelu bf16": Build(lambda: call(4096, 3072, BF16, "gelu")),
    "gelu bf16, odd": Build(lambda: call(4096, 3073, BF16, "gelu"), widest_load=4),
    "gelu bf16, dropout, odd": Build(lambda: call(4096, 3073, BF16, "gelu", drops=True), widest_load=4),
    "gelu_tanh fp16, dropout": Build(lambda: call(4096, 3072, FP16, "gelu_tanh", drops=True)),
    "gelu fp32, dropout": Build(lambda: call(4096, 3072, FP32, "gelu", drops=True)),
    "gelu bf16, no bias, odd": Build(lambda: call(33, 3073, BF16, "gelu", has_bias=False)),
}
