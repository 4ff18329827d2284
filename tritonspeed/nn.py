"""``ts.nn``: the kernels as modules. They live beside the kernels, in ``tritonspeed/kernels/nn/``."""

from typing import Any

from tritonspeed.kernels import nn as _modules

__all__ = list(_modules.__all__)


def __getattr__(name: str) -> Any:
    return getattr(_modules, name)
