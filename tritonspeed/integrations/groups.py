"""Which ranks share what, under DeepSpeed's names: one mesh axis, data parallel, and every other has one rank."""

from __future__ import annotations

from typing import Any

from tritonspeed import comm

NO_MPU = None  # what deepspeed.utils.groups keeps where nobody gave it a model parallel unit


def get_world_group() -> Any:
    """The default process group."""
    return comm.mesh_of().group


def get_data_parallel_group() -> Any:
    """The ranks that share a model: all of them."""
    return comm.mesh_of().group


def get_data_parallel_rank() -> int:
    """This rank's number among them."""
    return comm.mesh_of().rank


def get_data_parallel_world_size() -> int:
    """How many they are."""
    return comm.mesh_of().world


def get_model_parallel_group() -> None:
    """No group: no model is split but by ZeRO."""


def get_model_parallel_rank() -> int:
    """0: this rank has the whole of each tensor."""
    return 0


def get_model_parallel_world_size() -> int:
    """1: no tensor is split between ranks but by ZeRO."""
    return 1


get_tensor_model_parallel_group = get_model_parallel_group
get_tensor_model_parallel_rank = get_model_parallel_rank
get_tensor_model_parallel_world_size = get_model_parallel_world_size


def get_tensor_model_parallel_src_rank() -> int:
    """This rank: it is alone on that axis."""
    return comm.mesh_of().rank


def yes(*args: Any, **kwargs: Any) -> bool:
    """True, whatever is asked about."""
    return True


def no(*args: Any, **kwargs: Any) -> bool:
    """False, whatever is asked about."""
    return False
