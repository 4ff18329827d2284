"""QuantizedLinear: against the layer that it was made of, through safetensors, and from GPTQ's and AWQ's tensors."""

import pytest
import torch
from accuracy import assert_close_enough
from lanes import interpreted
from safetensors.torch import load, save
from test_packing import a_layer, weight_of, words_along

from tritonspeed.kernels.nn import QuantizedLinear

# relative error of the product of normal numbers: a step is 1/7, 1/127 or 2⁻³ of the largest of a group's (a row's)
# elements, which is about 2.7 (3.3) deviations
ERROR = {"w4a16": 0.15, "w8a16": 0.01, "w8a8": 0.015, "fp8": 0.05}
FORMATS = list(ERROR)


def a_linear(device: torch.device, k: int = 200, n: int = 33, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(k, n, bias=bias)
    torch.nn.init.normal_(linear.weight)
    return linear.to(device, torch.float16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_is_close_to_the_layer_it_was_made_of(bias, m, format, device):
    linear = a_linear(device, bias=bias)
    x = torch.randn(2, m, 200, device=device).half()
    quantized = QuantizedLinear.from_linear(linear, format)
    want, got = linear(x).double(), quantized(x)
    assert got.shape == want.shape and got.dtype == torch.float16
    error = ((got - want).norm() / want.norm()).item()
    assert ERROR[format] / 10 < error < ERROR[format]
    if format in ("w4a16", "w8a16"):  # and equal to the product with its own weight
        w, b = quantized.dequantize(torch.float64), 0 if linear.bias is None else linear.bias.double()
        known = torch.nn.functional.linear(x, w.half(), linear.bias)
        assert_close_enough("y", got, known, x.double() @ w.t() + b, 200)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_comes_back_from_safetensors(format, symmetric, device):
    if format != "w4a16" and not symmetric:
        with pytest.raises(ValueError, match="has a sign and no zeros"):
            QuantizedLinear(200, 33, format=format, symmetric=False)
        return
    linear, x = a_linear(device), torch.randn(3, 200, device=device).half()
    quantized = QuantizedLinear.from_linear(linear, format, group_size=64, symmetric=symmetric)
    state = load(save({name: t.cpu() for name, t in quantized.state_dict().items()}))
    names = {"codes", "scales", "bias"} | (set() if symmetric else {"zeros"})
    assert state.keys() == names
    fresh = QuantizedLinear(
        200, 33, format=format, group_size=64, symmetric=symmetric, device=device, dtype=torch.float16
    )
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), quantized(x)) and repr(fresh) == repr(quantized)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_gptq_layer_gives_its_own_product(act_order, device):
    k, n, group = 128, 24, 32
    q, zeros, scales = a_layer(k, n, group)
    g_idx = torch.randperm(k) // group if act_order else torch.arange(k) // group
    tensors = [words_along(q, 0), words_along((zeros - 1) % 16, 1), scales, g_idx.int()]
    layer = QuantizedLinear.from_gptq(*(t.to(device) for t in tensors))
    assert (layer.input_index is not None) == act_order and layer.group_size == group
    w = weight_of(q, zeros, scales, g_idx).to(device)
    assert torch.equal(layer.dequantize(), w)
    x = torch.randn(5, k, device=device).half()
    assert_close_enough("y", layer(x), x @ w.half().t(), x.double() @ w.double().t(), k)
    fresh = QuantizedLinear(k, n, bias=False, group_size=group, symmetric=False, reorders_input=act_order).to(device)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_an_awq_layer_gives_its_own_product(device):
    k, n, group = 128, 24, 64
    q, zeros, scales = a_layer(k, n, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    bias = torch.randn(n).half()
    tensors = [words_along(q, 1, order), words_along(zeros, 1, order), scales, bias]
    layer = QuantizedLinear.from_awq(*(t.to(device) for t in tensors))
    w = weight_of(q, zeros, scales, torch.arange(k) // group).to(device)
    x = torch.randn(1, k, device=device).half()
    exact = x.double() @ w.double().t() + bias.to(device).double()
    assert_close_enough("y", layer(x), x @ w.half().t() + bias.to(device), exact, k)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_pass_or_are_refused(format, device):
    quantized = QuantizedLinear.from_linear(a_linear(device), format)
    x = torch.randn(3, 200, device=device).half().requires_grad_()
    if format in ("w8a8", "fp8"):
        with pytest.raises(ValueError, match="rounds its input, which has no gradient"):
            quantized(x)
        with torch.no_grad():
            quantized(x)
        return
    quantized(x).sum().backward()
    w = quantized.dequantize(torch.float64)
    assert x.grad is not None
    for row in x.grad:
        assert_close_enough("dx", row, w.half().sum(0), w.sum(0), 33)


@pytest.mark.parametrize("format", FORMATS)
def test_compiles_into_one_graph(format, device):
    quantized = QuantizedLinear.from_linear(a_linear(device), format)
    x = torch.randn(3, 200, device=device).half()
    with torch.no_grad():
        assert torch.equal(torch.compile(quantized, fullgraph=True, backend="aot_eager")(x), quantized(x))


def test_autocast_sets_the_type(device):
    quantized = QuantizedLinear.from_linear(a_linear(device), "w8a16")
    x = torch.randn(3, 200, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, quantized(x.bfloat16()))


def test_says_what_it_is():
    layer = QuantizedLinear(4096, 11008, group_size=64, device="meta")
    assert repr(layer) == (
        "QuantizedLinear(in_features=4096, out_features=11008, bias=True, format=w4a16, group=64, symmetric=True)"
    )
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="format is 'w3a16', must be one of w4a16, w8a16, w8a8, fp8"):
        QuantizedLinear.from_linear(torch.nn.Linear(32, 4), "w3a16")
    with pytest.raises(ValueError, match=r"x is \(2, 31\), its last axis must be in_features 32"):
        QuantizedLinear.from_linear(torch.nn.Linear(32, 4))(torch.zeros(2, 31))


@interpreted
def test_single_precision_is_refused_where_kernels_run():
    with pytest.raises(ValueError, match=r"x is torch.float32, must be float16 or bfloat16"):
        QuantizedLinear.from_linear(torch.nn.Linear(32, 4))(torch.zeros(2, 32))
