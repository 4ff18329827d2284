"""What the tests of LayerNorm and RMSNorm share: sizes, inputs, and the checks that are the same for both."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (rows, columns): one vector and less, every distance from a 16-byte boundary, several rows of a tile, a last tile that
# is not full
SHAPES = [
    (3, 2), (2, 3), (5, 7), (4, 8), (9, 15), (3, 16), (37, 17), (70, 31), (2, 64), (3, 127), (129, 33), (5, 760),
]  # fmt: skip
# one program a row, rows in two blocks (4097 and on), row constants from a kernel of their own and a forward that reads
# twice (16385); a type each, because the interpreter is slow
LONG = [
    ((9, 1001), torch.bfloat16), ((2, 1024), torch.float16), ((3, 1025), torch.float32), ((3, 4095), torch.bfloat16),
    ((2, 4097), torch.float32), ((2, 8192), torch.bfloat16), ((2, 8193), torch.float16), ((1, 16385), torch.float32),
]  # fmt: skip
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + LONG

Function = Callable[..., Any]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *names: str) -> dict[str, Tensor]:
    """x and whichever of residual, weight and bias; the mean is not zero."""
    torch.manual_seed(0)
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    return {name: (torch.randn(shapes[name]) + 0.5).to(dtype).to(device) for name in ("x", *names)}


def random_grads(shape: tuple[int, ...], device: torch.device, num: int) -> list[Tensor]:
    """Gradients of the outputs."""
    torch.manual_seed(1)
    return [torch.randn(shape).to(device) for _ in range(num)]


def terms(shape: tuple[int, ...]) -> dict[str, int]:
    """Terms of the longest sum behind each result: columns, or rows for the parameters' gradients."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return dict.fromkeys(("out0", "out1", "dx", "dresidual"), columns) | dict.fromkeys(("dweight", "dbias"), rows)


def results(function: Function, inputs: dict[str, Tensor], grads: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs and gradients of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    result = function(**leaves, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)])
    found = [out.detach() for out in outputs]
    for name, x in leaves.items():
        assert x.grad is not None, name
        found.append(x.grad)
    return found


def assert_modules_agree(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor) -> None:
    """Outputs and all gradients of two modules with the same parameters."""
    found = []
    for module in (ours, theirs):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
