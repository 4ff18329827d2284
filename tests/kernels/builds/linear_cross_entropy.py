"""The kernel of its own that the fused output layer has: the gradients' scaling."""

import torch

from builds import Build
from tritonspeed.kernels.scale_gradient import launch_scale_gradient


def call(n: int, dtype: torch.dtype, out: torch.dtype) -> None:
    launch_scale_gradient(torch.empty(n, dtype=dtype), torch.empty(()), torch.empty(()), out)


BUILDS = {
    "fp32 to bf16": Build(lambda: call(50257 * 768, torch.float32, torch.bfloat16)),
    "bf16, odd": Build(lambda: call(50257 * 767, torch.bfloat16, torch.bfloat16)),
}
