"""Activation checkpointing: what a region computes is computed again in backward, and what it starts from may wait
in host memory. ``ts.checkpointing`` has the names of ``deepspeed.checkpointing``.

Bottom up: ``host_inputs`` moves tensors there and back, ahead of use · ``torch_hook`` makes torch.utils.checkpoint save
through it · ``random_states`` generators of model parallel regions · ``settings`` the functions to call.
"""

from tritonspeed.checkpointing.random_states import RandomStates, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from tritonspeed.checkpointing.settings import (
    CheckpointFunction,
    checkpoint,
    configure,
    configure_from,
    host_bytes,
    is_configured,
    reset,
)

__all__ = [
    "CheckpointFunction",
    "RandomStates",
    "checkpoint",
    "configure",
    "configure_from",
    "get_cuda_rng_tracker",
    "host_bytes",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "reset",
]
