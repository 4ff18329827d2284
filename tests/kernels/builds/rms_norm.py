"""RMSNorm, forward and backward: the variants of its own; the other paths are LayerNorm's."""

import torch

from builds import Build
from builds.layer_norm import call

BUILDS = {
    "bf16, 4096": Build(lambda: call(4096, torch.bfloat16, centred=False)),
    "bf16, 4095, residual": Build(lambda: call(4095, torch.bfloat16, centred=False, residual=True)),
    "bf16, 8192, fp32 weights": Build(lambda: call(8192, torch.bfloat16, centred=False, weights=torch.float32)),
    "bf16, 16384, residual": Build(lambda: call(16384, torch.bfloat16, centred=False, residual=True)),
    "fp32, 131072": Build(lambda: call(131072, torch.float32, centred=False)),
}
