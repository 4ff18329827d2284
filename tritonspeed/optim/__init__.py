"""Optimizers that can step one flat chunk. The names resolve on first use: importing the package stays cheap."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonspeed.optim.adagrad import Adagrad as Adagrad
    from tritonspeed.optim.adamw import AdamW as AdamW
    from tritonspeed.optim.build import build_optimizer as build_optimizer
    from tritonspeed.optim.build import build_scheduler as build_scheduler
    from tritonspeed.optim.build import check_elementwise as check_elementwise
    from tritonspeed.optim.lamb import Lamb as Lamb
    from tritonspeed.optim.lion import Lion as Lion
    from tritonspeed.optim.muon import Muon as Muon
    from tritonspeed.optim.muon import mark_hidden_matrices as mark_hidden_matrices
    from tritonspeed.optim.schedules import VALID_LR_SCHEDULES as VALID_LR_SCHEDULES
    from tritonspeed.optim.schedules import LRRangeTest as LRRangeTest
    from tritonspeed.optim.schedules import OneCycle as OneCycle
    from tritonspeed.optim.schedules import WarmupCosineLR as WarmupCosineLR
    from tritonspeed.optim.schedules import WarmupDecayLR as WarmupDecayLR
    from tritonspeed.optim.schedules import WarmupLR as WarmupLR

_HOMES = {
    "Adagrad": "tritonspeed.optim.adagrad",
    "AdamW": "tritonspeed.optim.adamw",
    "build_optimizer": "tritonspeed.optim.build",
    "build_scheduler": "tritonspeed.optim.build",
    "check_elementwise": "tritonspeed.optim.build",
    "Lamb": "tritonspeed.optim.lamb",
    "Lion": "tritonspeed.optim.lion",
    "mark_hidden_matrices": "tritonspeed.optim.muon",
    "Muon": "tritonspeed.optim.muon",
    "LRRangeTest": "tritonspeed.optim.schedules",
    "OneCycle": "tritonspeed.optim.schedules",
    "VALID_LR_SCHEDULES": "tritonspeed.optim.schedules",
    "WarmupCosineLR": "tritonspeed.optim.schedules",
    "WarmupDecayLR": "tritonspeed.optim.schedules",
    "WarmupLR": "tritonspeed.optim.schedules",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
