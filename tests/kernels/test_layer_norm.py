"""LayerNorm: exactness against fp64, every gradient, its dropout mask, odd memory, torch's transforms."""

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

from tritonspeed.kernels import layer_norm
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.layer_norm import layer_norm_reference
from tritonspeed.kernels.nn import LayerNorm
from tritonspeed.kernels.norm_gradients import NORM_BACKWARD, NormBackwardLaunch
from tritonspeed.kernels.norm_rows import NORM_FORWARD, NormForwardLaunch, dropout_reference
from tritonspeed.kernels.rms_norm import rms_norm_reference


def torchs(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def torchs_prenorm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    z = residual + x
    return F.layer_norm(z, z.shape[-1:], weight, bias), z


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(shape, dtype, device, "weight", "bias")
    assert_as_exact_as_torch(layer_norm, torchs, inputs, random_grads(shape, device, 1), terms(shape))


def test_one_column(device: torch.device) -> None:
    inputs, grads = random_inputs((5, 1), torch.float32, device, "weight", "bias"), random_grads((5, 1), device, 1)
    y, dx, dweight, dbias = results(layer_norm, inputs, grads)  # every value is its own mean
    torch.testing.assert_close(y, inputs["bias"].expand(5, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(dbias, grads[0].sum(0))
    for zero in (dx, dweight):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 8), torch.float32), ((5, 17), torch.float16), ((2, 1001), torch.bfloat16), ((1, 8193), torch.bfloat16)],
    ids=str,
)
def test_with_a_residual(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    inputs = random_inputs(shape, dtype, device, "residual", "weight", "bias")
    assert_as_exact_as_torch(layer_norm, torchs_prenorm, inputs, random_grads(shape, device, 2), terms(shape))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=str)
def test_parameters_are_optional(names: tuple[str, ...], device: torch.device) -> None:
    inputs = random_inputs((4, 33), torch.float32, device, *names)
    assert_as_exact_as_torch(layer_norm, torchs, inputs, random_grads((4, 33), device, 1), terms((4, 33)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6, 64), torch.float32), ((5, 63), torch.float32), ((5, 63), torch.bfloat16), ((2, 20001), torch.float32)],
    ids=str,
)
def test_a_mean_far_from_zero(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(shape) * 16 + 1e4).to(dtype).to(device)
    weight, bias = torch.rand(2, shape[1], device=device).to(dtype)
    assert_as_exact_as_torch(layer_norm, torchs, {"x": x, "weight": weight, "bias": bias}, None, terms(shape))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_may_differ(x_dtype: torch.dtype, device: torch.device) -> None:
    shape = (5, 129)
    inputs = random_inputs(shape, torch.float32, device, "residual", "weight", "bias")
    inputs["x"] = inputs["x"].to(x_dtype)
    got = layer_norm(**inputs)
    assert [out.dtype for out in got] == [x_dtype, torch.float32]
    assert_as_exact_as_torch(layer_norm, layer_norm_reference, inputs, random_grads(shape, device, 2), terms(shape))


@interpreted
@pytest.mark.parametrize("n", [61, 64], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64], ids="block {}".format)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual, dropout"])
def test_every_path_gives_the_same(n: int, block: int, extras: bool) -> None:
    shape, options = (11, n), {"dropout_p": 0.3, "seed": 11} if extras else {}
    names = ("residual", "weight", "bias") if extras else ("weight", "bias")
    inputs, grads = random_inputs(shape, torch.float32, torch.device("cpu"), *names), random_grads(shape, CPU, 2)
    grads = grads[: 2 if extras else 1]
    want = results(layer_norm_reference, inputs, grads, **options)
    with (
        NORM_FORWARD.pinned(NormForwardLaunch(4 if block >= n else 1, block, 4)),
        NORM_BACKWARD.pinned(NormBackwardLaunch(2 if block >= n else 1, block, 4, 2, 1)),
    ):
        got = results(layer_norm, inputs, grads, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_rows", "n"), [(5, 64), (5, 63), (1, 4101), (1, 8205), (2, 9000)])
@pytest.mark.parametrize("names", [(), ("residual",)], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_has_the_references_mask(
    num_rows: int, n: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if n > 64 and (dtype == torch.float32) == bool(names):
        pytest.skip("one type for each path: the interpreter is slow")
    shape, options = (num_rows, n), {"dropout_p": 0.25, "seed": 2**40 + 3}
    inputs = random_inputs(shape, dtype, device, *names, "weight", "bias")
    ours, theirs = (partial(f, **options) for f in (layer_norm, layer_norm_reference))
    grads = random_grads(shape, device, 1 + len(names))
    assert_as_exact_as_torch(ours, theirs, inputs, grads, terms(shape))
    if names and dtype == torch.float32:
        assert torch.equal(ours(**inputs)[1], theirs(**inputs)[1])


def test_dropout_drops_its_share(device: torch.device) -> None:
    x = torch.ones(100, 1000, device=device)
    kept = dropout_reference(x, 0.3, 7)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((kept == 0).float().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / x.numel())
    assert not torch.equal(kept, dropout_reference(x, 0.3, 8))
    assert (kept[0] != kept[1]).any()


def test_seeds_come_from_torchs_generator(device: torch.device) -> None:
    x = torch.randn(4, 64, device=device)
    torch.manual_seed(3)
    first, second = layer_norm(x, dropout_p=0.5), layer_norm(x, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, layer_norm(x, dropout_p=0.5)) and not torch.equal(first, second)
    seed = torch.tensor(5, device=device)
    assert torch.equal(layer_norm(x, dropout_p=0.5, seed=5), layer_norm(x, dropout_p=0.5, seed=seed))


def test_any_strides(device: torch.device) -> None:
    base = torch.randn(33, 5, 4, device=device)
    x = base.permute(2, 1, 0)
    odd = torch.randn(4 * 33 + 1, device=device)[1:].view(4, 33)  # begins 4 bytes off a 16-byte boundary
    wide = torch.randn(33 * 2, device=device)[::2]
    for y in (x, odd, x[::2, 1:]):
        assert_as_exact_as_torch(layer_norm, torchs, {"x": y, "weight": wide}, [torch.randn_like(y)], 33)


def test_an_expanded_gradient(device: torch.device) -> None:
    x = torch.randn(4, 33, device=device, requires_grad=True)
    weight = torch.rand(33, device=device, requires_grad=True)
    got = torch.autograd.grad(layer_norm(x, weight).sum(), (x, weight))
    want = torch.autograd.grad(torchs(x, weight).sum(), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7), (3, 0)], ids=str)
def test_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    inputs = random_inputs(shape, torch.float32, device, "weight", "bias")
    y, dx, dweight, dbias = results(layer_norm, inputs, [torch.zeros(shape, device=device)])
    assert y.shape == dx.shape == shape and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float, device: torch.device) -> None:
    x = torch.randn(7, 37, device=device)
    clean = layer_norm(x)
    x[3, 5] = bad
    got = layer_norm(x)
    others = torch.arange(7, device=device) != 3
    assert got[~others].isnan().any() and torch.equal(got[others], clean[others])


def test_two_runs_are_equal(device: torch.device) -> None:
    inputs, grads = (
        random_inputs((300, 65), torch.bfloat16, device, "weight", "bias"),
        random_grads((300, 65), device, 1),
    )
    for a, b in zip(results(layer_norm, inputs, grads), results(layer_norm, inputs, grads), strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone(device: torch.device) -> None:
    inputs, grads = (
        random_inputs((3, 17), torch.float32, device, "residual", "weight"),
        random_grads((3, 17), device, 2),
    )
    before = {name: x.clone() for name, x in inputs.items()}
    results(layer_norm, inputs, grads, dropout_p=0.5)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_one_gradient_alone(wanted: str, device: torch.device) -> None:
    inputs, grads = (
        random_inputs((5, 35), torch.float32, device, "residual", "weight", "bias"),
        random_grads((5, 35), device, 2),
    )
    for options in ({}, {"dropout_p": 0.4, "seed": 1}):
        found = []
        for function in (layer_norm, layer_norm_reference):
            leaves = {name: x.detach().requires_grad_(name == wanted) for name, x in inputs.items()}
            y, z = function(**leaves, **options)
            parts = (y, z) if wanted in ("x", "residual") else (y,)
            found.append(torch.autograd.grad(parts, leaves[wanted], grads[: len(parts)])[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used: int, device: torch.device) -> None:
    inputs, (g,) = random_inputs((5, 35), torch.float32, device, "residual", "weight"), random_grads((5, 35), device, 1)
    found = []
    for function in (layer_norm, layer_norm_reference):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        grads = torch.autograd.grad(function(**leaves)[used], tuple(leaves.values()), g, allow_unused=True)
        found.append(
            [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves.values(), strict=True)]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(1, 40),
    names=st.sets(st.sampled_from(["residual", "weight", "bias"])),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.5]),
    transposed=st.booleans(),
)
def test_any_combination(
    shape: list[int], n: int, names: set[str], dtype: torch.dtype, dropout_p: float, transposed: bool
) -> None:
    inputs: dict[str, Any] = random_inputs((*shape[:-1], n), dtype, CPU, *sorted(names))
    if transposed:
        inputs["x"] = inputs["x"].transpose(0, -1).contiguous().transpose(0, -1)
    options = {"dropout_p": dropout_p, "seed": 3}
    ours, theirs = (partial(f, **options) for f in (layer_norm, layer_norm_reference))
    grads = random_grads(inputs["x"].shape, CPU, 1 + ("residual" in names))
    assert_as_exact_as_torch(ours, theirs, inputs, grads, 200)


@interpreted
@pytest.mark.parametrize(("n", "extras"), [(6, False), (7, False), (7, True)])
def test_gradcheck(n: int, extras: bool) -> None:
    names = ("residual", "weight", "bias") if extras else ("weight", "bias")
    inputs = random_inputs((3, n), torch.float64, CPU, *names)
    options = {"dropout_p": 0.3, "seed": 1} if extras else {}

    def function(*tensors: Tensor) -> Any:
        return layer_norm(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs.values()), fast_mode=True)


def test_twice_differentiated_is_refused(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("CPU tensors take PyTorch, which can")
    x = torch.randn(3, 8, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@interpreted
@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual, dropout"])
def test_the_operators_are_registered_right(centred: bool, extras: bool) -> None:
    x, weight, rows = torch.randn(2, 3, 9), torch.randn(9), torch.rand(6)
    z, seed, p = (x.clone(), torch.tensor(3), 0.3) if extras else (None, None, 0.0)
    bias, mean = (weight.clone(), rows.clone()) if centred else (None, torch.empty(0))
    torch.library.opcheck(torch.ops.tritonspeed.norm_forward, (x, z, weight, bias, seed, centred, 1e-5, 0.0, p))
    dresidual = torch.float32 if extras else None
    backward = (x, z, x, weight, bias, seed, mean, rows, centred, 1e-5, 0.0, p, torch.float32, dresidual, True, extras)
    torch.library.opcheck(torch.ops.tritonspeed.norm_backward, backward)


def test_under_torch_compile(device: torch.device) -> None:
    compiled = torch.compile(lambda **kw: layer_norm(**kw, dropout_p=0.3, seed=4), fullgraph=True, backend="aot_eager")
    inputs, grads = (
        random_inputs((4, 33), torch.float32, device, "residual", "weight", "bias"),
        random_grads((4, 33), device, 2),
    )
    for a, b in zip(
        results(compiled, inputs, grads), results(layer_norm, inputs, grads, dropout_p=0.3, seed=4), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    anew = torch.compile(lambda x: layer_norm(x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(anew(inputs["x"]), anew(inputs["x"]))


def test_export(device: torch.device) -> None:
    module, x = LayerNorm(17).to(device), torch.randn(3, 17, device=device)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[1] < 30 * 2**30:
        pytest.skip("wants 30 GiB")
    n = 4096
    x = torch.randn(2**31 // n + 3, n, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, n, device="cuda", dtype=torch.bfloat16)
    assert_as_exact_as_torch(
        lambda x: layer_norm(x, weight, bias), lambda x: torchs(x, weight.to(x), bias.to(x)), {"x": x[-4:]}
    )
    torch.testing.assert_close(layer_norm(x, weight, bias)[-4:], layer_norm(x[-4:], weight, bias), rtol=0, atol=0)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias), x, x.detach())
    (last,) = torch.autograd.grad(
        layer_norm(tail := x.detach()[-4:].requires_grad_(), weight, bias), tail, tail.detach()
    )
    torch.testing.assert_close(dx[-4:], last, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-3}], ids=str)
@pytest.mark.parametrize("shape", [(33,), (3, 11), 33], ids=str)
def test_the_module_is_torchs(shape: Any, options: dict[str, Any], device: torch.device) -> None:
    theirs, ours = torch.nn.LayerNorm(shape, **options).to(device), LayerNorm(shape, **options).to(device)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert_modules_agree(ours, theirs, torch.randn(4, *ours.normalized_shape, device=device))


def test_the_module_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 9\), its last axes must be \(8,\)"):
        LayerNorm(8)(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\), must be \(4,\), because x has \(2, 4\)"),
        ({"residual": torch.ones(4)}, r"residual has shape \(4,\), must be \(2, 4\)"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, r"bias is torch.int32, must be float32"),
        ({"weight": torch.ones(4, device="meta")}, r"weight is on meta, x on cpu: move one"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0, must be in \[0, 1\)"),
        ({"dropout_p": 0.5, "seed": -1}, r"seed is -1, must be in \[0, 2\*\*63\)"),
        ({"seed": torch.zeros(1)}, r"seed is torch.float32 of shape \(1,\) on cpu, must be one int64"),
    ],
    ids=str,
)
def test_errors_name_what_does_not_fit(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layer_norm(torch.zeros(2, 4), **arguments)


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ValueError, match="x has no axis"):
        layer_norm(torch.tensor(1.0))


@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_the_backward_operator_alone(centred: bool, residual: bool, device: torch.device) -> None:
    """Called by itself, as the tuner does: on a CPU in PyTorch, which must be what the kernel is."""
    shape = (3, 4, 21)
    inputs = random_inputs(shape, torch.float32, device, *(("residual",) if residual else ()), "weight", "bias")
    reference, offset = (layer_norm_reference, 0.0) if centred else (partial(rms_norm_reference, offset=1.0), 1.0)
    if not centred:
        del inputs["bias"]
    options, grads = {"dropout_p": 0.3, "seed": 6, "eps": 1e-5}, random_grads(shape, device, 1 + residual)
    found = results(reference, inputs, grads, **options)
    z = found.pop(1) if residual else inputs["x"]
    normal = z if residual else dropout_reference(z, 0.3, 6)
    mean = normal.mean(-1).flatten() if centred else normal.new_empty(0)
    rstd = (normal.var(-1, correction=0) if centred else normal.square().mean(-1)).add(1e-5).rsqrt().flatten()
    dx, dresidual, dweight, dbias = torch.ops.tritonspeed.norm_backward(
        grads[0], grads[1] if residual else None, z, inputs["weight"], inputs.get("bias"),
        torch.tensor(6, device=device), mean, rstd, centred, 1e-5, offset, 0.3, torch.float32,
        torch.float32 if residual else None, True, residual,
    )  # fmt: skip
    got = [dx, *([dresidual] if residual else []), dweight, *([dbias] if centred else [])]
    for a, b in zip(got, found[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
