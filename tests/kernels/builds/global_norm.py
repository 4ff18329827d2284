"""The sum of squares: both stages."""

import torch

from builds import Build
from tritonspeed.kernels.global_norm import launch_sum_of_squares

BUILDS = {
    "fp32, odd": Build(lambda: launch_sum_of_squares([torch.empty(50257)]), widest_load=8),  # fp64 partials: 8 each
    "bf16, odd": Build(lambda: launch_sum_of_squares([torch.empty(50257, dtype=torch.bfloat16)]), widest_load=8),
}
