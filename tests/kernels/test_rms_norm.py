"""RMSNorm: exactness against fp64, every gradient, weights around zero; what LayerNorm's tests hold is not repeated."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from norms import CASES, DTYPES, assert_modules_agree, random_grads, random_inputs, results, terms
from torch import Tensor

from tritonspeed.kernels import rms_norm
from tritonspeed.kernels.nn import RMSNorm
from tritonspeed.kernels.norm_gradients import NORM_BACKWARD, NormBackwardLaunch
from tritonspeed.kernels.norm_rows import NORM_FORWARD, NormForwardLaunch
from tritonspeed.kernels.rms_norm import rms_norm_reference

CPU = torch.device("cpu")


def torchs(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)


def torchs_prenorm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = residual + x
    return torchs(z, weight), z


@pytest.mark.parametrize(("shape", "dtype"), [((3, 1), torch.float32), *CASES[::2]], ids=str)
def test_as_exact_as_torch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(shape, dtype, device, "weight")
    assert_as_exact_as_torch(rms_norm, torchs, inputs, random_grads(shape, device, 1), terms(shape))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 8), torch.float32), ((5, 17), torch.float16), ((1, 16383), torch.bfloat16)],
    ids=str,
)
def test_with_a_residual(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(shape, dtype, device, "residual", "weight")
    assert_as_exact_as_torch(rms_norm, torchs_prenorm, inputs, random_grads(shape, device, 2), terms(shape))


def test_without_a_weight(device: torch.device) -> None:
    inputs = random_inputs((4, 33), torch.float32, device)
    assert_as_exact_as_torch(rms_norm, torchs, inputs, random_grads((4, 33), device, 1), terms((4, 33)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [33, 64], ids=str)
def test_weights_around_zero(n: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = (2, n)
    inputs = random_inputs(shape, dtype, device, "weight")
    inputs["weight"] -= 0.5
    ours = partial(rms_norm, offset=1.0)
    grads = random_grads(shape, device, 1)
    assert_as_exact_as_torch(ours, lambda x, weight: torchs(x, 1 + weight), inputs, grads, terms(shape))


@pytest.mark.parametrize("n", [64, 61, 4103], ids=str)
@pytest.mark.parametrize("names", [("weight",), ("residual", "weight")], ids=["alone", "residual"])
def test_dropout_has_the_references_mask(n: int, names: tuple[str, ...], device: torch.device) -> None:
    shape, options = (2, n), {"dropout_p": 0.25, "seed": 2**62 + 5, "offset": 1.0}
    ours, theirs = (partial(f, **options) for f in (rms_norm, rms_norm_reference))
    inputs, grads = random_inputs(shape, torch.bfloat16, device, *names), random_grads(shape, device, len(names))
    assert_as_exact_as_torch(ours, theirs, inputs, grads, terms(shape))


@interpreted
@pytest.mark.parametrize(("n", "block"), [(61, 16), (61, 32), (64, 64)])
def test_every_path_gives_the_same(n: int, block: int) -> None:
    inputs, grads = random_inputs((7, n), torch.float32, CPU, "weight"), random_grads((7, n), CPU, 1)
    with (
        NORM_FORWARD.pinned(NormForwardLaunch(4 if block >= n else 1, block, 4)),
        NORM_BACKWARD.pinned(NormBackwardLaunch(2 if block >= n else 1, block, 4, 2, 1)),
    ):
        got = results(rms_norm, inputs, grads)
    for a, b in zip(got, results(rms_norm_reference, inputs, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_any_strides(device: torch.device) -> None:
    x = torch.randn(33, 5, 4, device=device).permute(2, 1, 0)
    weight = torch.randn(66, device=device)[::2]
    assert_as_exact_as_torch(rms_norm, torchs, {"x": x, "weight": weight}, [torch.randn_like(x)], 33)
    leaf = x.detach().requires_grad_()
    (got,) = torch.autograd.grad(rms_norm(leaf, weight).sum(), leaf)  # an expanded gradient: stride 0
    (want,) = torch.autograd.grad(torchs(leaf, weight).sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7), (3, 0)], ids=str)
def test_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    inputs = random_inputs(shape, torch.float32, device, "weight")
    y, dx, dweight = results(rms_norm, inputs, [torch.zeros(shape, device=device)])
    assert y.shape == dx.shape == shape and not dweight.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float, device: torch.device) -> None:
    x = torch.randn(7, 37, device=device)
    clean = rms_norm(x)
    x[3, 5] = bad
    got = rms_norm(x)
    others = torch.arange(7, device=device) != 3
    assert got[~others].isnan().any() and torch.equal(got[others], clean[others])


def test_two_runs_are_equal(device: torch.device) -> None:
    inputs, grads = random_inputs((90, 65), torch.bfloat16, device, "weight"), random_grads((90, 65), device, 1)
    for a, b in zip(results(rms_norm, inputs, grads), results(rms_norm, inputs, grads), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(1, 40),
    names=st.sets(st.sampled_from(["residual", "weight"])),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.5]),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_combination(
    shape: list[int], n: int, names: set[str], dtype: torch.dtype, dropout_p: float, offset: float
) -> None:
    options = {"dropout_p": dropout_p, "seed": 3, "offset": offset}
    inputs: dict[str, Any] = random_inputs((*shape[:-1], n), dtype, CPU, *sorted(names))
    ours, theirs = (partial(f, **options) for f in (rms_norm, rms_norm_reference))
    grads = random_grads(inputs["x"].shape, CPU, 1 + ("residual" in names))
    assert_as_exact_as_torch(ours, theirs, inputs, grads, 200)


@interpreted
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual, dropout, offset"])
def test_gradcheck(extras: bool) -> None:
    inputs = random_inputs((3, 7), torch.float64, CPU, *(("residual", "weight") if extras else ("weight",)))
    options = {"dropout_p": 0.3, "seed": 1, "offset": 1.0} if extras else {}

    def function(*tensors: Tensor) -> Any:
        return rms_norm(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs.values()), fast_mode=True)


def test_under_torch_compile(device: torch.device) -> None:
    compiled = torch.compile(partial(rms_norm, offset=1.0), fullgraph=True, backend="aot_eager")
    inputs, grads = (
        random_inputs((4, 33), torch.float32, device, "residual", "weight"),
        random_grads((4, 33), device, 2),
    )
    want = results(rms_norm, inputs, grads, offset=1.0)
    for a, b in zip(results(compiled, inputs, grads), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_export(device: torch.device) -> None:
    module, x = RMSNorm(17).to(device), torch.randn(3, 17, device=device)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 1e-3}], ids=str)
@pytest.mark.parametrize("shape", [(33,), (3, 11), 33], ids=str)
def test_the_module_is_torchs(shape: Any, options: dict[str, Any], device: torch.device) -> None:
    theirs, ours = torch.nn.RMSNorm(shape, **options).to(device), RMSNorm(shape, **options).to(device)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert_modules_agree(ours, theirs, torch.randn(4, *ours.normalized_shape, device=device))


def test_the_module_with_an_offset_starts_as_a_plain_one(device: torch.device) -> None:
    norm, x = RMSNorm(33, eps=1e-6, offset=1.0).to(device), torch.randn(4, 33, device=device)
    assert not norm.weight.any() and "offset=1.0" in repr(norm)
    torch.testing.assert_close(norm(x), torchs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight": torch.ones(8)}, r"rms_norm: weight has shape \(8,\), must be \(9,\), because x has \(2, 9\)"),
        ({"residual": torch.ones(9)}, r"residual has shape \(9,\), must be \(2, 9\)"),
        ({"dropout_p": -0.1}, r"dropout_p is -0.1, must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_errors_name_what_does_not_fit(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rms_norm(torch.zeros(2, 9), **arguments)
