"""Optimizers that can step one flat chunk. The names resolve on first use: importing the package stays cheap."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonspeed.optim.adamw import AdamW as AdamW

_HOMES = {
    "AdamW": "tritonspeed.optim.adamw",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
