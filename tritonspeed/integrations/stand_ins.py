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


class Accelerator:
    """The device of this rank under the names that scripts ask DeepSpeed's accelerator for."""

    def __init__(self) -> None:
        self._module: Any = torch.cuda if torch.cuda.is_available() else torch.cpu
        self._name = "cuda" if torch.cuda.is_available() else "cpu"

    def __getattr__(self, name: str) -> Any:
        """Everything else is torch's: ``synchronize``, ``memory_allocated``, ``manual_seed``, ..."""
        return getattr(self._module, name)

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", "cuda:1" or "cpu"."""
        return self._name if device_index is None or self._name == "cpu" else f"{self._name}:{device_index}"

    def current_device(self) -> int | str:
        """Index of the current GPU; "cpu" where there is none."""
        return torch.cuda.current_device() if self._name == "cuda" else "cpu"

    def current_device_name(self) -> str:
        """ "cuda:0", or "cpu"."""
        return f"cuda:{torch.cuda.current_device()}" if self._name == "cuda" else "cpu"

    def device(self, device_index: int | None = None) -> torch.device:
        """As a torch.device."""
        return torch.device(self.device_name(device_index))

    def device_count(self) -> int:
        """GPUs that are visible; 1 for a CPU."""
        return torch.cuda.device_count() if self._name == "cuda" else 1

    def communication_backend_name(self) -> str:
        """ "nccl" or "gloo"."""
        return "nccl" if self._name == "cuda" else "gloo"

    def is_available(self) -> bool:
        """True: a CPU always is."""
        return True

    def is_bf16_supported(self) -> bool:
        """Whether bf16 runs here; on a CPU it does."""
        return self._name == "cpu" or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """True: on a CPU slowly."""
        return True

    def is_synchronized_device(self) -> bool:
        """Whether operations end before they return."""
        return self._name == "cpu"

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""
        if self._name == "cuda":
            torch.cuda.empty_cache()


def get_accelerator() -> Accelerator:
    """The device of this rank."""
    return Accelerator()
