"""A case: one operation at one shape, type and direction, as the tuner times it and the benches compare it.

A family of kernels has one file ``cases/<family>.py`` with ``cases(model, dtype) -> list[Case]``:

    def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
        return [forward(rows, model.hidden, dtype) for rows in model.tokens] + [...]

    def forward(rows: int, n: int, dtype: torch.dtype) -> Case:
        def make(device: torch.device, seed: int) -> Inputs:
            draw = Draw(device, seed)
            return {"x": draw.normal((rows, n), dtype), "weight": draw.normal((n,), dtype)}

        return Case(
            "rms_norm", "forward", {"rows": rows, "n": n}, dtype,
            num_bytes=2 * rows * n * dtype.itemsize, num_flops=4 * rows * n,            # the kernel's docstring
            make=make,
            run=lambda inputs: rms_norm(inputs["x"], inputs["weight"]),                 # what is timed
            reference=lambda inputs: F.rms_norm(inputs["x"], (n,), inputs["weight"]),   # plain PyTorch
        )

A backward case makes what the forward saved in ``make`` and times the op, so that nothing but the backward runs; its
reference is ``gradients(function, leaves, grad)``. All random contents come from a ``Draw``: where only shapes are
asked for (``unfilled``), it hands out memory that was never touched, and a case of many gigabytes costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tritonspeed.kernels.tuned import dtype_name

Inputs = dict[str, Any]
Direction = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: the operation's, "layer_norm"; the family is the file it stands in.
        direction: "forward", "backward" (the op alone, on prepared inputs) or "both" (forward and autograd).
        shape: name → size, {"rows": 8192, "n": 4096}, in reading order.
        dtype: of the inputs that matter.
        num_bytes: that any implementation must move, from the formula in the kernel's docstring.
        num_flops: likewise.
        make: (device, seed) → fresh inputs, by name; the same for the same seed. May launch kernels (a forward, say).
        run: inputs → outputs, by our kernels; an operation in place returns the tensors that it wrote.
        reference: the same in plain PyTorch, on inputs made with the same seed.
        variant: what else tells it from its sisters: "residual", "causal", "int4, groups of 128".
        num_summed: terms of the longest sum behind an output, for the error that rounding may leave.
    """

    name: str
    direction: Direction
    shape: Mapping[str, int]
    dtype: torch.dtype
    num_bytes: int
    num_flops: int
    make: Callable[[torch.device, int], Inputs]
    run: Callable[[Inputs], Tensor | Sequence[Tensor]]
    reference: Callable[[Inputs], Tensor | Sequence[Tensor]]
    variant: str = ""
    num_summed: int = 1

    @property
    def label(self) -> str:
        """ "layer_norm (residual) forward rows=8192 n=4096 bf16": a key, and a line in a table."""
        name = f"{self.name} ({self.variant})" if self.variant else self.name
        sizes = " ".join(f"{key}={size}" for key, size in self.shape.items())
        return f"{name} {self.direction} {sizes} {dtype_name(self.dtype)}"


_fills = True


@contextmanager
def unfilled() -> Iterator[None]:
    """Within, a ``Draw`` leaves memory as it is: for launches that are recorded and never carried out."""
    global _fills
    before, _fills = _fills, False
    try:
        yield
    finally:
        _fills = before


class Draw:
    """Random contents on a device, one after the other from one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed) if _fills else None

    def normal(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers of this standard deviation."""
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        return x if self._generator is None else x.normal_(0.0, scale, generator=self._generator)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, low: float = 0.0, high: float = 1.0) -> Tensor:
        """low ≤ x < high, uniform."""
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        return x if self._generator is None else x.uniform_(low, high, generator=self._generator)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """low ≤ k < high."""
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        return x if self._generator is None else x.random_(low, high, generator=self._generator)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Nothing but 0."""
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        return x if self._generator is None else x.zero_()


_wrap_reference: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


@contextmanager
def backward_only(wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f) -> Iterator[None]:
    """Within, ``gradients`` runs the forward and returns a call without arguments that runs the backward alone.

    Args:
        wrap: applied to the function before its forward: ``torch.compile``, say.
    """
    global _wrap_reference
    before, _wrap_reference = _wrap_reference, wrap
    try:
        yield
    finally:
        _wrap_reference = before


def gradients(function: Callable[..., Tensor], leaves: Mapping[str, Tensor], grad: Tensor, **others: Any) -> Any:
    """The gradients of function(**leaves, **others) in the leaves' order: the reference of a backward case."""
    fresh = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    wrapped = function if _wrap_reference is None else _wrap_reference(function)
    output = wrapped(**fresh, **others)
    if _wrap_reference is not None:
        return lambda: torch.autograd.grad(output, tuple(fresh.values()), grad, retain_graph=True)
    return torch.autograd.grad(output, tuple(fresh.values()), grad)


def tensors_of(outputs: Tensor | Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of ``run`` or ``reference`` as a tuple, without the Nones."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(x for x in outputs if x is not None)
