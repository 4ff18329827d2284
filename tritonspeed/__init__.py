"""tritonspeed: your ds_config.json, pure Python.

Names resolve on first use, so ``import tritonspeed`` touches neither torch nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritonspeed.version import __version__

if TYPE_CHECKING:
    from tritonspeed import checkpoint as checkpoint
    from tritonspeed import checkpointing as checkpointing
    from tritonspeed import comm as comm
    from tritonspeed import config as config
    from tritonspeed import kernels as kernels
    from tritonspeed import nn as nn
    from tritonspeed import offload as offload
    from tritonspeed import optim as optim
    from tritonspeed import precision as precision
    from tritonspeed import tuning as tuning
    from tritonspeed import zero as zero
    from tritonspeed.comm import init_distributed as init_distributed
    from tritonspeed.engine import Engine as Engine
    from tritonspeed.engine import StepReport as StepReport
    from tritonspeed.engine import initialize as initialize
    from tritonspeed.estimation import estimate as estimate
    from tritonspeed.offload import Offload as Offload

_MODULES = (
    *("checkpoint", "checkpointing", "comm", "config", "kernels", "nn", "offload", "optim", "precision", "tuning"),
    "zero",
)
_NAMES = {
    "Engine": "engine",
    "Offload": "offload",
    "StepReport": "engine",
    "add_config_arguments": "engine",
    "estimate": "estimation",
    "init_distributed": "comm",
    "initialize": "engine",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tritonspeed.{name}")
    if name in _NAMES:
        return getattr(import_module(f"tritonspeed.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'tritonspeed' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
