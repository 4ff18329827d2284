"""Rotary: both styles, both layouts, a fused qkv, heads that are turned in part or in place, one position."""

import torch

from builds import Build
from tritonspeed.kernels.rotary import Rotation, launch_rotary


def call(
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    s: int = 4096,
    sequence_dim: int = 1,
    interleaved: bool = False,
    is_full: bool = False,
    in_place: bool = False,
) -> None:
    """32 heads and 8, as views of one projection."""
    batch, width = 2, rotary_dim if is_full else rotary_dim // 2
    qkv = torch.empty(batch, s, 48, head_dim, dtype=dtype)
    q, k = (x if sequence_dim == 1 else x.transpose(1, 2) for x in qkv.split([32, 8, 8], 2)[:2])
    outs = (q, k) if in_place else (torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype))
    cos, sin = torch.empty(s, width), torch.empty(s, width)
    launch_rotary(q, k, *outs, cos, sin, Rotation(sequence_dim, rotary_dim, interleaved, conjugate=False))


BUILDS = {
    "bf16 128": Build(lambda: call(128, 128)),
    "bf16 128, interleaved": Build(lambda: call(128, 128, interleaved=True)),
    "bf16 128, (B, H, S, D), full cos": Build(lambda: call(128, 128, sequence_dim=2, is_full=True)),
    # 64 pairs are 2 for each thread of a warp
    "bf16 128, in place, one position": Build(lambda: call(128, 128, s=1, in_place=True), widest_load=0),
    "bf16 64, odd positions": Build(lambda: call(64, 64, s=1001)),
    "fp16 80, 32 turned": Build(lambda: call(80, 32, torch.float16)),
    "fp16 72, 40 turned, interleaved, full cos": Build(
        lambda: call(72, 40, torch.float16, interleaved=True, is_full=True)
    ),
    "fp32 256": Build(lambda: call(256, 256, torch.float32)),
    "fp32 96, interleaved, in place": Build(lambda: call(96, 96, torch.float32, interleaved=True, in_place=True)),
}
