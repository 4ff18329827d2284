"""The policy for numbers: against fp64 on the same inputs, at most twice PyTorch's own error plus a stated floor.

max|ours − exact| ≤ 2 · max|torch − exact| + floor              floor from tolerances.py, at exact's largest value
rms(ours − exact) / rms(exact) ≤ RELATIVE_RMS[dtype] (fp32: · √K, K the terms of the longest sum)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tolerances import tolerance
from torch import Tensor

Function = Callable[..., Any]
RELATIVE_RMS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def outputs_and_gradients(
    function: Function, inputs: Mapping[str, Tensor | None], grads: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Run function(**inputs) and its backward.

    Args:
        inputs: tensors that require no gradient yet; floating ones get one.
        grads: one gradient per output, or None to leave the backward out.

    Returns:
        "out0", "out1", ... and "d<name>" for every floating input.
    """
    leaves = {
        name: x if x is None or not x.is_floating_point() else x.detach().requires_grad_(grads is not None)
        for name, x in inputs.items()
    }
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    found = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if grads is not None:
        torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)])
        for name, x in leaves.items():
            if x is not None and x.requires_grad:
                assert x.grad is not None, f"no gradient for {name}"
                found[f"d{name}"] = x.grad
    return found


def assert_as_exact_as_torch(
    ours: Function,
    torchs: Function,
    inputs: Mapping[str, Tensor | None],
    grads: Sequence[Tensor] | None = None,
    num_summed: int | Mapping[str, int] = 1,
) -> None:
    """Outputs and every gradient of ``ours`` against ``torchs`` run in fp64, judged by ``torchs`` in the same types.

    Args:
        inputs: by parameter name, in the types under test.
        grads: gradients of the outputs, None for functions without a backward.
        num_summed: terms of the longest sum behind a result, for all or by name ("out0", "dx", ...; default 1).
    """

    def double(x: Tensor | None) -> Tensor | None:
        return x.double() if x is not None and x.is_floating_point() else x

    exact = outputs_and_gradients(torchs, {k: double(x) for k, x in inputs.items()}, grads)
    plain = outputs_and_gradients(torchs, inputs, grads)
    mine = outputs_and_gradients(ours, inputs, grads)
    assert mine.keys() == exact.keys()
    for name, want in exact.items():
        got, known = mine[name], plain[name]
        assert got.shape == want.shape and got.dtype == known.dtype, (
            name,
            got.shape,
            want.shape,
            got.dtype,
            known.dtype,
        )
        terms = num_summed if isinstance(num_summed, int) else num_summed.get(name, 1)
        assert_close_enough(name, got, known, want, terms)


def assert_close_enough(name: str, got: Tensor, known: Tensor, exact: Tensor, num_summed: int = 1) -> None:
    """One result: got (ours) and known (PyTorch's in the same type) against exact (fp64)."""
    dtype = got.dtype
    assert torch.equal(got.isfinite(), known.isfinite()), f"{name}: NaN or infinity at other places than PyTorch"
    finite = known.isfinite() & exact.isfinite()
    got, known, exact = (x.double()[finite] for x in (got, known, exact))
    if not exact.numel():
        return
    error, torchs_error = (got - exact).abs().max().item(), (known - exact).abs().max().item()
    floor = tolerance(dtype, num_summed, magnitude=exact.abs().max().item())["atol"]
    assert error <= 2 * torchs_error + floor, f"{name}: off by {error:.3g}, PyTorch by {torchs_error:.3g}"
    rms, torchs_rms = ((x - exact).norm().item() / max(exact.norm().item(), 1e-300) for x in (got, known))
    allowed = RELATIVE_RMS[dtype] * (num_summed**0.5 if dtype == torch.float32 else 1)
    # a result that cancels to almost nothing has no small relative error in any implementation
    assert rms <= max(allowed, 2 * torchs_rms), f"{name}: relative rms {rms:.3g}, PyTorch {torchs_rms:.3g}"
