"""Bias + GELU + dropout + residual: numbers, the mask, the bias gradient of rows of any length."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch
from builds.bias_gelu import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import compiled, interpreted
from tolerances import tolerance

from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.bias_gelu import (
    BACKWARD,
    FORWARD,
    BiasGELULaunch,
    bias_gelu,
    bias_gelu_reference,
    dropout_threshold,
    keep_reference,
)
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.machine_code import machine_code
from tritonspeed.kernels.nn.activation import BiasGELU

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((1, 1), (2, 3), (3, 8), (5, 17), (199, 7), (2, 1024), (3, 1001), (1, 4097), (70, 760))
OPS = torch.ops.tritonspeed
P = 0.25


def inputs(m: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(m + n)
    sizes = {"x": (m, n), "bias": (n,), "residual": (m, n)}
    return {name: (1.5 * torch.randn(size)).to(device, dtype) for name, size in sizes.items()}


def reference(x, bias, residual=None, *, seed=None, approximate="none", p=0.0):
    at = None if seed is None else torch.tensor(seed, device=x.device)
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    return bias_gelu_reference(x, bias, residual, at, activation, dropout_threshold(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_against_fp64(m, n, dtype, device):
    x = inputs(m, n, dtype, device)
    grads = [torch.randn(m, n, device=device)]
    sums = {"dbias": m}
    pair = {name: x[name] for name in ("x", "bias")}
    assert_as_exact_as_torch(bias_gelu, lambda x, bias: F.gelu(x + bias), pair, grads, sums)
    assert_as_exact_as_torch(bias_gelu, reference, pair, grads, sums)
    assert_as_exact_as_torch(lambda x: bias_gelu(x), F.gelu, {"x": x["x"]}, grads)


def test_an_fp32_bias_beside_16_bits(device):
    x = inputs(9, 40, torch.bfloat16, device)
    x["bias"] = x["bias"].float()
    pair = {name: x[name] for name in ("x", "bias")}
    sums = {"dbias": 9}
    assert_as_exact_as_torch(bias_gelu, reference, pair, [torch.randn(9, 40, device=device)], sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("m", "n"), [(5, 17), (3, 1024), (9, 250)])
def test_dropout_and_residual_against_fp64(m, n, approximate, dtype, device):
    how = {"seed": 2**40 + 7, "approximate": approximate}
    assert_as_exact_as_torch(
        lambda x, bias, residual: bias_gelu(x, bias, residual=residual, dropout_p=P, **how),
        lambda x, bias, residual: reference(x, bias, residual, p=P, **how),
        inputs(m, n, dtype, device),
        [torch.randn(m, n, device=device)],
        {"dbias": m},
    )


def test_the_mask_is_the_references_element_by_element(device):
    """Forward and backward draw the same mask, whose zeros are exact."""
    m, n, seed = 37, 101, 12345678901234
    x = torch.full((m, n), 3.0, device=device, requires_grad=True)
    y = bias_gelu(x, dropout_p=P, seed=seed)
    y.sum().backward()
    keep = keep_reference(x.shape, torch.tensor(seed, device=device), dropout_threshold(P))
    assert torch.equal(y != 0, keep) and torch.equal(x.grad != 0, keep)
    value = F.gelu(torch.tensor(3.0)).item() / (1 - P)
    torch.testing.assert_close(y[keep], torch.full_like(y[keep], value))


def test_a_quarter_is_dropped():
    for seed in (0, 1, 2**62):
        keep = keep_reference(torch.Size((400, 500)), torch.tensor(seed), dropout_threshold(P))
        deviations = (keep.float().mean().item() - (1 - P)) / (P * (1 - P) / keep.numel()) ** 0.5
        assert abs(deviations) < 4
        neighbours = (keep[:, 1:] & keep[:, :-1]).float().mean().item() - (1 - P) ** 2
        assert abs(neighbours) < 4 * (1 / keep.numel()) ** 0.5
    masks = [keep_reference(torch.Size((4000,)), torch.tensor(seed), dropout_threshold(0.5)) for seed in (5, 6)]
    assert 0.4 < (masks[0] == masks[1]).float().mean() < 0.6


def test_nothing_and_everything_dropped(device):
    x = torch.randn(3, 9, device=device, requires_grad=True)
    assert torch.equal(bias_gelu(x, dropout_p=0.0, seed=3), bias_gelu(x))
    y = bias_gelu(x, dropout_p=1.0, seed=3, residual=x.detach())
    y.sum().backward()
    assert torch.equal(y.detach(), x.detach()) and not x.grad.any()


def test_seeds(device):
    x = torch.randn(64, 65, device=device)
    number = bias_gelu(x, dropout_p=P, seed=9)
    assert torch.equal(number, bias_gelu(x, dropout_p=P, seed=torch.tensor([9], device=device)))
    assert not torch.equal(number, bias_gelu(x, dropout_p=P, seed=10))
    torch.manual_seed(1)
    first, second = bias_gelu(x, dropout_p=P), bias_gelu(x, dropout_p=P)
    torch.manual_seed(1)
    assert torch.equal(first, bias_gelu(x, dropout_p=P)) and not torch.equal(first, second)


def test_checkpointing_draws_the_same_mask_again(device):
    x = torch.randn(16, 24, device=device, requires_grad=True)
    torch.manual_seed(2)
    (plain,) = torch.autograd.grad(bias_gelu(x, dropout_p=P).square().sum(), x)
    torch.manual_seed(2)
    y = torch.utils.checkpoint.checkpoint(lambda x: bias_gelu(x, dropout_p=P), x, use_reentrant=False)
    (again,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(again, plain)


def test_views_and_expanded_gradients(device):
    wide = torch.randn(4, 5, 20, device=device)
    x, bias = wide[..., 1:18], torch.randn(2 * 17, device=device)[::2]
    for view in (x, x.transpose(0, 1), x[:1].expand(4, 5, 17), wide.transpose(1, 2)[:, :17, :1].expand(4, 17, 17)):
        leaves = view.detach().requires_grad_(), bias.detach().requires_grad_()
        y = bias_gelu(*leaves)
        want = F.gelu(leaves[0] + leaves[1])
        torch.testing.assert_close(y, want)
        got = torch.autograd.grad(y.sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(want.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape, device):
    x, bias = (torch.zeros(s, device=device, requires_grad=True) for s in (shape, shape[-1:]))
    y = bias_gelu(x, bias, dropout_p=P)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape and torch.equal(bias.grad, torch.zeros_like(bias))


def test_nan_stays_in_its_row_and_column(device):
    x, bias = torch.randn(3, 12, device=device), torch.zeros(12, device=device, requires_grad=True)
    x[1, 5] = float("nan")
    x.requires_grad_()
    y = bias_gelu(x, bias)
    y.sum().backward()
    assert y.isnan().nonzero().tolist() == [[1, 5]] and x.grad.isnan().nonzero().tolist() == [[1, 5]]
    assert bias.grad.isnan().nonzero().tolist() == [[5]]


@interpreted
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(approximate):
    torch.manual_seed(3)
    x, bias, residual = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (3,), (2, 3)))
    how = {"approximate": approximate, "dropout_p": P, "seed": 4}
    assert torch.autograd.gradcheck(lambda x, b, r: bias_gelu(x, b, residual=r, **how), (x, bias, residual))


@interpreted
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 70), n=st.integers(1, 40), dtype=st.sampled_from(DTYPES), drops=st.booleans(),
    block=st.sampled_from((256, 1024, 2048)), block_n=st.sampled_from((128, 256, 1024)), stages=st.integers(1, 2),
)  # fmt: skip
def test_any_rows_in_any_tiles(m, n, dtype, drops, block, block_n, stages):
    how, seed = BiasGELULaunch(block, min(block, block_n), 4, stages, 1), m * n if drops else None
    p = P if drops else 0.0
    with FORWARD.pinned(how), BACKWARD.pinned(how):
        assert_as_exact_as_torch(
            lambda x, bias: bias_gelu(x, bias, dropout_p=p, seed=seed),
            lambda x, bias: reference(x, bias, seed=seed, p=p),
            {name: x for name, x in inputs(m, n, dtype, torch.device("cpu")).items() if name != "residual"},
            [torch.randn(m, n)],
            {"dbias": m},
        )


def test_the_backward_op_alone_is_what_autograd_gives(device):
    x = {name: t.requires_grad_() for name, t in inputs(5, 11, torch.float32, device).items() if name != "residual"}
    grad, seed = torch.randn(5, 11, device=device), torch.tensor(7, device=device)
    want = torch.autograd.grad(reference(**x, seed=7, approximate="tanh", p=P), list(x.values()), grad)
    got = OPS.bias_gelu_backward(grad, x["x"].detach(), x["bias"].detach(), seed, "gelu_tanh", dropout_threshold(P))
    torch.testing.assert_close(got, want)


def test_the_operators_are_registered_right():
    x, bias, grad, seed = torch.randn(3, 10), torch.randn(10), torch.randn(3, 10), torch.tensor(3)
    for has_bias in (bias, None):
        torch.library.opcheck(OPS.bias_gelu_forward.default, (x, has_bias, x, seed, "gelu", 6554))
        torch.library.opcheck(OPS.bias_gelu_backward.default, (grad, x, has_bias, None, "gelu_tanh", 0))


@interpreted
def test_torch_compile_and_export():
    block = BiasGELU(12, "tanh", dropout_p=P).eval()
    x = torch.randn(3, 12, requires_grad=True)
    want = block(x)
    compiled_block = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_block(x), want)
    leaves = (x, block.bias)
    for a, b in zip(
        torch.autograd.grad(compiled_block(x).sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert compiled_block.train()(x).isfinite().all(), "a seed drawn inside the graph"
    exported = torch.export.export(block.eval(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), want)


@interpreted
def test_a_second_derivative_is_refused():
    x, bias = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    (first,) = torch.autograd.grad(bias_gelu(x, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="BiasGELU of tritonspeed.kernels has no second derivative"):
        first.sum().backward()


def test_two_runs_are_equal(device):
    x = {name: t.requires_grad_() for name, t in inputs(150, 129, torch.bfloat16, device).items()}
    results = []
    for _ in range(2):
        y = bias_gelu(**x, dropout_p=P, seed=1)
        results.append((y, *torch.autograd.grad(y.sum(), list(x.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled
@pytest.mark.parametrize("n", [3072, 3073])
@pytest.mark.parametrize("card_name", ["sm_80", "sm_90", "gfx942"])
def test_x_is_moved_16_bytes_at_a_time_whatever_the_row(card_name, n):
    with recording(CARDS[card_name]) as launches:
        call(4096, n, torch.bfloat16, "gelu", drops=True)
    for launched in launches[:2]:
        code = machine_code(launched, CARDS[card_name])
        assert code.loads[16] == 2 and code.stores[16] == 1, (code.loads, code.stores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_two_to_the_31_elements():
    m, n = 2**17 + 1, 2**14 + 3
    if torch.cuda.mem_get_info()[0] < 9 * m * n:
        pytest.skip(f"takes {9 * m * n / 2**30:.0f} GiB of GPU memory")
    x = torch.ones(m, n, dtype=torch.bfloat16, device="cuda").requires_grad_()
    bias = torch.zeros(n, dtype=torch.bfloat16, device="cuda").requires_grad_()
    y = bias_gelu(x, bias)
    assert (y[-1] == F.gelu(x[-1])).all()
    y.backward(torch.ones_like(y))
    want = torch.func.grad(lambda v: F.gelu(v))(torch.tensor(1.0)).item() * m
    torch.testing.assert_close(bias.grad.float(), torch.full((n,), want, device="cuda"), **tolerance(torch.bfloat16, m))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bias": torch.zeros(4)}, r"bias is \(4,\) .* must be \(3,\)"),
        ({"bias": torch.zeros(3).long()}, "bias is .*int64 .* must be .*float32 or"),
        ({"residual": torch.zeros(2, 3).half()}, "residual is .*float16 .* must be .*float32 on"),
        ({"residual": torch.zeros(3)}, r"residual is \(3,\) .* must be \(2, 3\)"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5, must be in \[0, 1\]"),
        ({"dropout_p": P, "seed": -1}, "seed is -1"),
        ({"dropout_p": P, "seed": torch.zeros(1)}, "must be one int64"),
        ({"approximate": "fast"}, "approximate is 'fast'"),
    ],
)
def test_the_error_names_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(torch.zeros(2, 3), **given)


def test_numbers_and_integers_are_refused():
    with pytest.raises(ValueError, match="x is a number"):
        bias_gelu(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x is torch.int64"):
        bias_gelu(torch.zeros(2, dtype=torch.int64))


def test_the_module(device):
    module = BiasGELU(12, dropout_p=P, device=device)
    x = torch.randn(3, 12, device=device)
    torch.nn.init.normal_(module.bias)
    torch.testing.assert_close(module.eval()(x), F.gelu(x + module.bias))
    assert 0 < (module.train()(x.expand(100, 3, 12)) == 0).float().mean() < 2 * P
    assert list(module.state_dict()) == ["bias"] and "12, approximate='none', dropout_p=0.25" in repr(module)
