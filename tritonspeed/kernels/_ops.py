"""How an operation becomes ``torch.ops.tritonspeed.<name>``: opaque to torch.compile, with shapes it can reason with.

Plain ``Library.define`` and ``impl``: a call costs 2 to 3.5 µs, through ``torch.library.custom_op`` about 10.
"""

from collections.abc import Callable
from typing import Any

import torch

from tritonspeed.kernels._triton import INTERPRETED

GPU_KEYS = ("CUDA", "XPU")
library = torch.library.Library("tritonspeed", "FRAGMENT")
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # op → what launches its kernels: how a tuner sees them without a GPU


def register(
    schema: str, run: Callable[..., Any], shapes: Callable[..., Any], cpu: Callable[..., Any] | None = None
) -> None:
    """Define an op.

    Args:
        schema: "name(Tensor x, ...) -> Tensor"; what is written in place is marked ``Tensor(a!)``.
        run: launches the kernels: on a GPU, and on a CPU under the interpreter. Returns fresh tensors only.
        shapes: the same on tensors without data.
        cpu: what CPU tensors take else; None where the public function sends them to the reference before.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    LAUNCHERS[name] = run
    on_cpu = run if INTERPRETED else cpu
    if on_cpu is not None:
        library.impl(name, on_cpu, "CPU")
    for key in GPU_KEYS:
        library.impl(name, run, key)
    torch.library.register_fake(f"tritonspeed::{name}", shapes, lib=library)
