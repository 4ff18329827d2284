"""LayerNorm, forward and backward: rows held in registers, in two blocks, longer; 16 bytes divide them or not."""

import torch

from builds import Build
from tritonspeed.kernels.norm_gradients import Wanted, launch_norm_backward
from tritonspeed.kernels.norm_rows import Norm, launch_norm_forward


def call(
    n: int,
    dtype: torch.dtype,
    *,
    centred: bool = True,
    residual: bool = False,
    dropout: bool = False,
    weights: torch.dtype | None = None,
) -> None:
    num_rows = 256
    norm = Norm(centred, 1e-5, 0.0, 0.1 if dropout else 0.0)
    x, rstd = torch.empty(num_rows, n, dtype=dtype), torch.empty(num_rows)
    z = torch.empty_like(x) if residual else None
    weight = torch.empty(n, dtype=weights or dtype)
    bias, mean = (torch.empty_like(weight), torch.empty_like(rstd)) if centred else (None, None)
    seed = torch.empty((), dtype=torch.int64) if dropout else None
    launch_norm_forward(x, z, weight, bias, seed, norm)
    wanted = Wanted(dtype if dropout or not residual else None, dtype if residual else None, True, residual)
    launch_norm_backward(x, z, x, weight, bias, seed, mean, rstd, norm, wanted)


BUILDS = {
    "bf16, 1024": Build(lambda: call(1024, torch.bfloat16)),
    "fp16, 1001": Build(lambda: call(1001, torch.float16)),
    "bf16, 4096, residual, dropout": Build(lambda: call(4096, torch.bfloat16, residual=True, dropout=True)),
    "bf16, 8191, dropout": Build(lambda: call(8191, torch.bfloat16, dropout=True)),
    "fp32, 8192, residual": Build(lambda: call(8192, torch.float32, residual=True)),
    "bf16, 16384, fp32 weights": Build(lambda: call(16384, torch.bfloat16, weights=torch.float32)),
    "bf16, 16383, residual, dropout": Build(lambda: call(16383, torch.bfloat16, residual=True, dropout=True)),
    "fp32, 16381": Build(lambda: call(16381, torch.float32)),
    "bf16, 50257, residual, dropout": Build(lambda: call(50257, torch.bfloat16, residual=True, dropout=True)),
}
