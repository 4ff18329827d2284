"""LayerNorm and RMSNorm of a model's width, plain and with a residual; an odd width; widths beyond any model's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels.layer_norm import layer_norm
from tritonspeed.kernels.rms_norm import rms_norm
from tritonspeed.tuning.case import Case, Draw, Inputs, gradients
from tritonspeed.tuning.shapes import ModelShapes

LONG = (16384, 32768, 65536)  # columns of rows that no registers hold with their gradients: each at 2²⁷ elements
LONG_ELEMS = 2**27


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Every number of tokens forward, the largest backward; the long rows come beside the largest models."""
    rows, n = max(model.tokens), model.hidden
    found = [_forward(name, num, n, dtype) for num in model.tokens for name in ("layer_norm", "rms_norm")]
    for name in ("layer_norm", "rms_norm"):
        found += [_forward(name, rows, n, dtype, residual=True), _backward(name, rows, n - 1, dtype)]
        found += [_backward(name, rows, n, dtype, residual=residual) for residual in (False, True)]
        if n >= 8192:
            for long in LONG:
                found += [make(name, LONG_ELEMS // long, long, dtype) for make in (_forward, _backward)]
    return found


def _norm(name: str, inputs: dict[str, Any]) -> Any:
    function: Any = layer_norm if name == "layer_norm" else rms_norm
    return function(**inputs)


def _plain(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if name == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _inputs(name: str, draw: Draw, rows: int, n: int, dtype: torch.dtype, residual: bool) -> Inputs:
    inputs: Inputs = {"x": draw.normal((rows, n), dtype), "weight": draw.normal((n,), dtype)}
    if name == "layer_norm":
        inputs["bias"] = draw.normal((n,), dtype)
    if residual:
        inputs["residual"] = draw.normal((rows, n), dtype)
    return inputs


def _forward(name: str, rows: int, n: int, dtype: torch.dtype, *, residual: bool = False) -> Case:
    num_parameters, num_statistics = (2, 2) if name == "layer_norm" else (1, 1)

    def reference(inputs: Inputs) -> Any:
        inputs = dict(inputs)
        if not residual:
            return _plain(name, **inputs)
        z = inputs.pop("residual") + inputs.pop("x")
        return _plain(name, z, **inputs), z

    return Case(
        name, "forward", {"rows": rows, "n": n}, dtype, variant="residual" if residual else "",
        num_bytes=((4 if residual else 2) * rows + num_parameters) * n * dtype.itemsize + 4 * num_statistics * rows,
        num_flops=(8 if name == "layer_norm" else 5) * rows * n,
        make=lambda device, seed: _inputs(name, Draw(device, seed), rows, n, dtype, residual),
        run=lambda inputs: _norm(name, inputs), reference=reference, num_summed=n,
    )  # fmt: skip


def _backward(name: str, rows: int, n: int, dtype: torch.dtype, *, residual: bool = False) -> Case:
    """The op alone; with a residual the gradient of z comes in beside y's, and dz goes to x and residual alike."""
    is_layer_norm = name == "layer_norm"
    num_parameters, num_statistics = (2, 2) if is_layer_norm else (1, 1)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        inputs = _inputs(name, draw, rows, n, dtype, residual=False)
        z = inputs["x"].float()
        mean = z.mean(1) if is_layer_norm else z.new_empty(0)
        rstd = (z.var(1, correction=0) + 1e-5 if is_layer_norm else z.square().mean(1) + 1e-6).rsqrt()
        grads = {"g": draw.normal((rows, n), dtype), "gz": draw.normal((rows, n), dtype) if residual else None}
        return inputs | grads | {"mean": mean, "rstd": rstd}

    def run(inputs: Inputs) -> Any:
        dx, dz, *parameters = torch.ops.tritonspeed.norm_backward(
            inputs["g"], inputs["gz"], inputs["x"], inputs["weight"], inputs.get("bias"), None, inputs["mean"],
            inputs["rstd"], is_layer_norm, 1e-5 if is_layer_norm else 1e-6, 0.0, 0.0,
            None if residual else dtype, dtype if residual else None, True, residual,
        )  # fmt: skip
        return [dz if residual else dx, *parameters[:num_parameters]]

    def reference(inputs: Inputs) -> Any:
        leaves = {key: inputs[key] for key in ("x", "weight", "bias")[: 1 + num_parameters]}
        if not residual:
            return gradients(lambda **kw: _plain(name, **kw), leaves, inputs["g"])
        # y · g + z · g_z has these two gradients, and one sum to differentiate
        both = torch.cat((inputs["g"], inputs["gz"]))
        return gradients(lambda **kw: torch.cat((_plain(name, **kw), kw["x"])), leaves, both)

    return Case(
        name, "backward", {"rows": rows, "n": n}, dtype, variant="residual" if residual else "",
        num_bytes=((4 if residual else 3) * rows + 2 * num_parameters) * n * dtype.itemsize + 4 * num_statistics * rows,
        num_flops=(14 if is_layer_norm else 10) * rows * n, make=make, run=run, reference=reference,
        num_summed=max(rows, n),
    )  # fmt: skip
