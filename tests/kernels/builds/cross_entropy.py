"""Cross-entropy: rows that start on 16-byte boundaries, rows that start anywhere, gradients that start elsewhere."""

import torch

from builds import Build
from tritonspeed.kernels.cross_entropy import (
    launch_cross_entropy_backward,
    launch_cross_entropy_forward,
    launch_cross_entropy_in_place_,
)
from tritonspeed.kernels.cross_entropy_rows import CrossEntropyOptions

PLAIN, FULL = CrossEntropyOptions(), CrossEntropyOptions(-100, 0.1, 1e-4, 30.0)


def call(n: int, dtype: torch.dtype, options: CrossEntropyOptions = PLAIN, m: int = 4) -> None:
    logits, target = torch.empty(m, n, dtype=dtype), torch.empty(m, dtype=torch.int64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    statistics, scale, g = torch.empty(2, m, dtype=acc), torch.empty((), dtype=acc), torch.empty((), dtype=dtype)
    launch_cross_entropy_forward(logits, target, "mean", options)
    launch_cross_entropy_backward(g, logits, target, statistics, scale, options, torch.empty_like(logits))
    launch_cross_entropy_in_place_(logits, target, None, statistics[0], options)


def call_misplaced() -> None:
    """Logits one element off a boundary, into a gradient that is on one."""
    logits = torch.empty(4 * 50257 + 1, dtype=torch.bfloat16)[1:].view(4, 50257)
    statistics = torch.empty(2, 4)
    target = torch.empty(4, dtype=torch.int64)
    launch_cross_entropy_backward(
        statistics[0], logits, target, statistics, torch.empty(0), PLAIN, torch.empty_like(logits)
    )


BUILDS = {
    "bf16, 32000": Build(lambda: call(32000, torch.bfloat16), widest_load=8),  # the sum's targets are 8 bytes
    "bf16, 50257": Build(lambda: call(50257, torch.bfloat16), widest_load=8),
    "bf16, 50257, all options": Build(lambda: call(50257, torch.bfloat16, FULL), widest_load=8),
    "bf16, 50257, misplaced": Build(call_misplaced),
    "fp16, 7": Build(lambda: call(7, torch.float16), widest_load=8),
    "fp32, 50257, all options": Build(lambda: call(50257, torch.float32, FULL), widest_load=8),
    "fp64, 1000": Build(lambda: call(1000, torch.float64), widest_load=8, cards=("sm_90", "gfx942")),  # tests' type
}
