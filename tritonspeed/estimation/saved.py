"""What a checkpoint is made of: bytes of its flats, in all and of one rank.

For P elements of a bucket (padding included), N ranks, c = bytes of the compute dtype, m moments of 4 bytes (2 in bf16;
those in 8 bits are saved as fp32):

    trained   (4 + m·4)·P, and c·P where parameters are rounded at random; a slice of padding alone has no moments
    frozen    c·P

Every rank writes its P/N at every stage. A save in the background copies that into host memory, which is kept for the
next one, but for what is on disk: that is linked. Headers and indexes come on top: 4 KiB and more for each file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tritonspeed.zero.plan import BucketPlan


def saved_bytes(
    plans: Iterable[BucketPlan], num_moments: int, moment_bytes: int, rounds_at_random: bool = False
) -> tuple[int, int]:
    """(bytes of all ranks' flats, most bytes of one rank's).

    Args:
        plans: every bucket.
        num_moments, moment_bytes: state tensors of the optimizer, and bytes of an element as they are saved.
        rounds_at_random: bf16 parameters are.
    """
    total = most = 0
    for plan in plans:
        layout, types = plan.layout, plan.types
        if not plan.trainable:
            total += layout.numel * types.compute.itemsize
            most += layout.slice_numel * types.compute.itemsize
            continue
        values = types.master.itemsize
        if rounds_at_random and types.compute == torch.bfloat16:
            values += types.compute.itemsize
        last = max((span.end for span in layout.spans if span.numel), default=0)
        with_moments = -(-last // layout.slice_numel) * layout.slice_numel
        total += layout.numel * values + with_moments * num_moments * moment_bytes
        most += layout.slice_numel * (values + num_moments * moment_bytes)
    return total, most
