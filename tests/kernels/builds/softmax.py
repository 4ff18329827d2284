"""Softmax: rows held and looped over, lengths that 16 bytes divide and not, masks, both directions."""

import torch

from builds import Build
from tritonspeed.kernels.softmax import launch_softmax, launch_softmax_backward


def forward(n: int, dtype: torch.dtype, mask: torch.Tensor | None = None, causal: bool = False) -> None:
    launch_softmax(torch.empty(2, 2, 8, n, dtype=dtype), mask, 0.125, causal)


def backward(n: int, dtype: torch.dtype, causal: bool = False, widened: bool = False) -> None:
    g, y = (torch.empty(2, 2, 8, n, dtype=dtype) for _ in range(2))
    launch_softmax_backward(g, y, 0.125, causal, widened)


def keep(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool)


BF16, FP32 = torch.bfloat16, torch.float32
BUILDS = {
    "bf16 1024": Build(lambda: forward(1024, BF16)),
    "bf16 1001": Build(lambda: forward(1001, BF16)),
    "bf16 17, causal": Build(lambda: forward(17, BF16, causal=True)),
    "fp16 1000, causal, bool mask": Build(lambda: forward(1000, torch.float16, keep(2, 1, 1, 1000), causal=True)),
    "bf16 32768, fp32 mask": Build(lambda: forward(32768, BF16, torch.empty(2, 1, 8, 32768))),
    "fp32 16383, causal, fp32 mask": Build(lambda: forward(16383, FP32, torch.empty(1, 1, 8, 16383), causal=True)),
    "bf16 32767, causal": Build(lambda: forward(32767, BF16, causal=True)),
    "fp32 32768": Build(lambda: forward(32768, FP32)),
    "bf16 50257": Build(lambda: forward(50257, BF16)),
    "bf16 131072, causal": Build(lambda: forward(131072, BF16, causal=True)),
    "fp32 50257, causal, bool mask": Build(lambda: forward(50257, FP32, keep(8, 50257), causal=True)),
    "fp32 200000": Build(lambda: forward(200000, FP32)),
    "backward bf16 1024": Build(lambda: backward(1024, BF16)),
    "backward bf16 1001, causal": Build(lambda: backward(1001, BF16, causal=True)),
    "backward fp32 16384": Build(lambda: backward(16384, FP32)),
    "backward bf16 16383, causal, widened": Build(lambda: backward(16383, BF16, causal=True, widened=True)),
    "backward fp32 32767": Build(lambda: backward(32767, FP32)),
    "backward bf16 50257, causal": Build(lambda: backward(50257, BF16, causal=True)),
    "backward fp32 131072": Build(lambda: backward(131072, FP32)),
}
