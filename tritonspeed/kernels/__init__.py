"""Kernels for any PyTorch program: one file per operation, with its maths, reference, kernel and wrapper.

GPU tensors take the Triton kernel, CPU tensors PyTorch. Importing this needs neither a GPU nor Triton; names resolve
on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonspeed.kernels.adamw import adamw_ as adamw_
    from tritonspeed.kernels.global_norm import global_norm as global_norm
    from tritonspeed.kernels.global_norm import sum_of_squares as sum_of_squares

_HOMES = {  # name → file in this folder
    "adamw_": "adamw",
    "global_norm": "global_norm",
    "sum_of_squares": "global_norm",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # a function may share its file's name, which the import has just put here as a module
    return value
