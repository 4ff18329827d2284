"""The activation functions of feed-forward layers, with their slopes: the one home of these formulas.

    silu        a = x · σ(x)                    a' = σ(x) · (1 + x · (1 − σ(x)))
    gelu        a = x · Φ(x)                    a' = Φ(x) + x · φ(x)                     Φ(x) = (1 + erf(x / √2)) / 2
    gelu_tanh   a = x · (1 + tanh(z)) / 2       z = √(2/π) · (x + 0.044715 x³)
                  = x · σ(2z)                   a' = s + x · 2 · s · (1 − s) · z'        s = σ(2z)
    relu        a = max(x, 0)                   a' = 1 where x > 0, else 0

φ is the normal density. (1 + tanh(z)) / 2 = σ(2z) needs no tanh, and does not cancel where tanh is near −1.
Source   Hendrycks & Gimpel 2016, arXiv:1606.08415; Elfwing, Uchibe & Doya 2017, arXiv:1702.03118
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels._triton import tl, triton

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}  # torch's ``approximate`` → our name


def gelu_form(operation: str, approximate: str) -> str:
    """torch's ``approximate`` as the name of an activation.

    Raises:
        ValueError: it is neither "none" nor "tanh".
    """
    if approximate not in GELU_FORMS:
        raise ValueError(f"{operation}: approximate is {approximate!r}, must be 'none' or 'tanh'")
    return GELU_FORMS[approximate]


def activate_reference(x: Tensor, activation: str) -> Tensor:
    """The activation in PyTorch, in x's own type."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward_reference(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """grad · a'(x) in PyTorch, in x's own type."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


@triton.jit
def sigmoids(x):
    """(σ(x), σ(−x)): 1 − σ(x) would keep nothing of σ(−x) where σ(x) is near 1, and slopes multiply it by x³."""
    e = tl.exp(-tl.abs(x))  # ≤ 1: no overflow
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x >= 0.0, larger, smaller), tl.where(x >= 0.0, smaller, larger)


@triton.jit
def _gelu_tanh_argument(x):
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2z; 2 · √(2/π)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """a of fp32 or fp64 values of any shape."""
    if ACTIVATION == "silu":
        a = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        a = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        a = x * tl.sigmoid(_gelu_tanh_argument(x))
    else:
        a = tl.where(x <= 0.0, 0.0, x)  # a NaN is not ≤ 0: it passes, as in PyTorch
    return a


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """(a, a') of fp32 or fp64 values of any shape."""
    if ACTIVATION == "silu":
        s, rest = sigmoids(x)
        a, slope = x * s, s * (1.0 + x * rest)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        a, slope = x * below, below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))  # 1 / √(2π)
    elif ACTIVATION == "gelu_tanh":
        s, rest = sigmoids(_gelu_tanh_argument(x))
        a, slope = x * s, s + x * (s * rest) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        a, slope = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    return a, slope
