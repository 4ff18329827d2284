"""The kernels as ``torch.nn`` modules: drop-in replacements, whose parameters and state dicts are the originals'."""

from importlib import import_module
from typing import Any

_HOMES: dict[str, str] = {  # name → file in this folder
    "BiasGELU": "activation",
    "CrossEntropyLoss": "loss",
    "GEGLU": "activation",
    "LayerNorm": "norm",
    "LinearCrossEntropyLoss": "loss",
    "QuantizedLinear": "linear",
    "RMSNorm": "norm",
    "RotaryEmbedding": "rotary",
    "ScaledMaskedSoftmax": "softmax",
    "Softmax": "softmax",
    "SwiGLU": "activation",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
