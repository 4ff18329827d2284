"""Softmax: a vocabulary's logits, and attention's scores, plain under a mask of keys and causal."""

import torch
from torch import Tensor

from tritonspeed.kernels.softmax import softmax, softmax_reference
from tritonspeed.tuning.case import Case, Draw, Inputs, gradients
from tritonspeed.tuning.shapes import ModelShapes

LONGEST = 2048  # positions: scores of 32 heads are 256 MiB in bf16


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Logits of every number of tokens, up to a quarter of the largest; scores of the longest sequence."""
    logits = [(1, 1, min(tokens, 2048), model.vocab) for tokens in model.tokens]
    s = min(max(model.tokens), LONGEST)
    scores = (1, model.heads, s, s)
    found = [make(shape, dtype) for shape in dict.fromkeys(logits) for make in (_forward, _backward)]
    found += [make(scores, dtype, causal=True) for make in (_forward, _backward)]
    return [*found, _forward(scores, dtype, masked=True)]


def _shape(shape: tuple[int, ...]) -> dict[str, int]:
    batch, heads, queries, keys = shape
    return {"heads": heads, "queries": queries, "keys": keys} if heads > 1 else {"rows": batch * queries, "n": keys}


def _sizes(shape: tuple[int, ...], causal: bool) -> tuple[int, int]:
    """(elements that are seen, all elements)."""
    batch, heads, queries, keys = shape
    rows = batch * heads * queries
    return rows * (keys + 1) // 2 if causal else rows * keys, rows * keys


def _forward(shape: tuple[int, ...], dtype: torch.dtype, causal: bool = False, masked: bool = False) -> Case:
    seen, total = _sizes(shape, causal)
    scale = shape[-1] ** -0.5 if causal or masked else 1.0

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        keep = draw.integers(0, 8, (shape[0], 1, 1, shape[-1])) > 0 if masked else None
        return {"x": draw.normal(shape, dtype, 3.0), "mask": keep}

    return Case(
        "softmax", "forward", _shape(shape), dtype, variant="causal" if causal else "masked keys" if masked else "",
        num_bytes=(seen + total) * dtype.itemsize + (shape[-1] if masked else 0), num_flops=5 * seen, make=make,
        run=lambda inputs: softmax(inputs["x"], scale=scale, mask=inputs["mask"], causal=causal),
        reference=lambda inputs: softmax_reference(inputs["x"], scale=scale, mask=inputs["mask"], causal=causal)
        if causal or masked else torch.softmax(inputs["x"], -1),
        num_summed=shape[-1],
    )  # fmt: skip


def _backward(shape: tuple[int, ...], dtype: torch.dtype, causal: bool = False) -> Case:
    seen, total = _sizes(shape, causal)
    scale = shape[-1] ** -0.5 if causal else 1.0

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        x = draw.normal(shape, dtype, 3.0)
        return {"x": x, "y": softmax(x, scale=scale, causal=causal), "g": draw.normal(shape, dtype)}

    def plain(x: Tensor) -> Tensor:
        return softmax_reference(x, scale=scale, causal=True) if causal else torch.softmax(x, -1)

    return Case(
        "softmax", "backward", _shape(shape), dtype, variant="causal" if causal else "",
        num_bytes=(2 * seen + total) * dtype.itemsize, num_flops=4 * seen, make=make,
        run=lambda inputs: torch.ops.tritonspeed.softmax_backward(inputs["g"], inputs["y"], scale, causal, False),
        reference=lambda inputs: gradients(plain, {"x": inputs["x"]}, inputs["g"]),
        num_summed=shape[-1],
    )  # fmt: skip
