"""The few objects of DeepSpeed's surface that are not an alias of a native one: small, and without training logic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tritonspeed import comm

DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"  # the file of variables that the launcher reads, in the home folder

logger = logging.getLogger("tritonspeed")


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on some ranks.

    Args:
        message: what to say.
        ranks: which ranks say it; None or [-1] is all.
        level: of the log record.
    """
    chosen = list(ranks or [-1])
    if -1 in chosen or comm.mesh_of().rank in chosen:
        logger.log(level, "%s", message)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Accepts anything."""


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """The same nested value with every tensor in memory of its own: parameters are views of one buffer, and whoever
    saves views takes them for one tensor under many names.

    Args:
        item: tensors in dicts, lists and tuples, of any class: ``state_dict()`` is an OrderedDict.
        device: where the copies are.
    """
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, dict):
        return type(item)((key, clone_tensors_for_torch_save(value, device)) for key, value in item.items())
    if isinstance(item, list | tuple):
        parts = [clone_tensors_for_torch_save(value, device) for value in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return item


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], target_fp_dtype: torch.dtype) -> Callable[..., Any]:
    """The constructor as it is: ``zero.Init`` patches none. Hugging Face replaces this name while it builds a model."""
    return fn
