"""Quantised matmuls: W4A16, W8A16, W8A8 and FP8 against their dequantised weights in fp64, in every route and shape."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch, assert_close_enough
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from torch import Tensor

from tritonspeed.kernels import dequantize_weight, matmul_w4a16, matmul_w8a8, matmul_w8a16
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.matmul_tiles import GemvLaunch, MatmulLaunch
from tritonspeed.kernels.matmul_w8a8 import W8A8, W8A8_ROW, matmul_w8a8_reference
from tritonspeed.kernels.packing import PackedWeight, pack_fp8, pack_w4, pack_w8, values_reference
from tritonspeed.kernels.quantize import quantize
from tritonspeed.kernels.tuned import TUNABLES, Tunable

HALVES = [torch.float16, torch.bfloat16]
FORMATS = ["w4", "w4 zeros", "w8"]


def pack(format: str, weight: Tensor, group: int | None) -> PackedWeight:
    return pack_w8(weight, group) if format == "w8" else pack_w4(weight, group, format == "w4")


@dataclass
class Layer:
    """A weight-only layer: our product, and PyTorch's over the weight as floats of x's type."""

    format: str
    packed: PackedWeight

    def ours(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        p = self.packed
        if self.format == "w8":
            return matmul_w8a16(x, p.codes, p.scales, bias)
        return matmul_w4a16(x, p.codes, p.scales, p.zeros, bias)

    def torchs(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        p = self.packed
        w = values_reference(p.codes, p.scales, p.zeros, x.dtype)[:, : p.in_features]
        return F.linear(x, w, bias)

    def tunables(self) -> tuple[Tunable, Tunable]:
        name = "matmul_w8a16" if self.format == "w8" else "matmul_w4a16"
        return TUNABLES[name], TUNABLES[f"{name}_row"]


def a_layer(format: str, n: int, k: int, group: int | None, device: torch.device, seed: int = 0) -> Layer:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) + 0.2
    return Layer(format, pack(format, weight.to(device), group))


def normal(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


# (M, N, K, group): one row, few, a bucket's edge, several tiles; K not a whole block, not a whole group, odd
SHAPES = [
    (1, 1, 1, None), (1, 7, 33, 32), (1, 9, 256, 128), (1, 3, 4100, None), (1, 9, 1000, 64), (2, 3, 32, 32),
    (3, 65, 160, None), (7, 33, 129, 64), (16, 64, 256, 128), (17, 100, 96, 32), (33, 70, 100, None),
    (129, 131, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dequantised_product_in_fp64_with_gradients(shape, format, dtype, device):
    m, n, k, group = shape
    layer = a_layer(format, n, k, group, device)
    inputs = {"x": normal(m, k, dtype=dtype, device=device), "bias": normal(n, dtype=dtype, device=device, seed=2)}
    grads = [normal(m, n, dtype=dtype, device=device, seed=3)]
    assert_as_exact_as_torch(layer.ours, layer.torchs, inputs, grads, {"out0": k, "dx": n, "dbias": m})


TILES = [
    MatmulLaunch(16, 64, 32, split_k=1, group_m=1, num_warps=4, num_stages=2),
    MatmulLaunch(16, 32, 64, split_k=2, group_m=8, num_warps=4, num_stages=3),
    MatmulLaunch(32, 16, 64, split_k=8, group_m=2, num_warps=4, num_stages=2),  # more parts than steps: some are empty
    MatmulLaunch(16, 16, 16, split_k=1, group_m=8, num_warps=4, num_stages=2, dequantize=1),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("how", TILES, ids=lambda how: f"{how.block_m}x{how.block_n}x{how.block_k}/{how.split_k}")
def test_no_launch_changes_more_than_rounding(how, format, device):
    layer = a_layer(format, 70, 320, 64, device)
    inputs = {"x": normal(37, 320, dtype=torch.float16, device=device), "bias": normal(70, dtype=torch.float32)}
    inputs["bias"] = inputs["bias"].to(device)
    exact = layer.torchs(*(x.double() for x in inputs.values()))
    known = layer.torchs(inputs["x"], inputs["bias"].half())
    with layer.tunables()[0].pinned(how):
        got = layer.ours(**inputs)
    assert_close_enough("y", got, known, exact, 320)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("how", [GemvLaunch(1, 1, 1), GemvLaunch(8, 2, 3), GemvLaunch(2, 4, 8)], ids=str)
def test_no_launch_of_a_row_changes_more_than_rounding(how, format, device):
    layer = a_layer(format, 6, 3200, 64, device)
    x, bias = normal(1, 3200, dtype=torch.bfloat16, device=device), normal(6, dtype=torch.bfloat16, device=device)
    with layer.tunables()[1].pinned(how):
        got = layer.ours(x, bias)
    assert_close_enough("y", got, layer.torchs(x, bias), layer.torchs(x.double(), bias.double()), 3200)


@pytest.mark.parametrize("name", ["matmul_w4a16", "matmul_w8a16", "matmul_w8a8"])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_shape_has_a_launch_that_is_valid(card, name):
    codes = ["i8", "fp8e4nv"]
    for m in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096):
        for n, k, group in ((1, 32, 0), (4096, 4096, 128), (11008, 4096, 32), (151936, 8192, 64), (1001, 96, 96)):
            more = {"codes": codes[m % 2]} if name == "matmul_w8a8" else {"group": group, "dtype": "bf16"}
            tunable = TUNABLES[name]
            choices = tunable.candidates(card, m=m, n=n, k=k, **more)
            for how in (tunable.heuristic(card, m=m, n=n, k=k, **more), *choices):
                assert name == "matmul_w8a8" or group % how.block_k == 0, (how, group)  # a tile has one scale a row
                assert how.block_k >= 32 and how.split_k >= 1 and how.num_stages >= 2 and how.num_warps >= 1
                assert how.num_warps * card.warp_size <= 1024


@dataclass
class Codes:
    """8-bit activations and weight."""

    x: Tensor
    x_scales: Tensor
    packed: PackedWeight

    def product(self, dtype: torch.dtype, bias: Tensor | None = None, x_scales: Tensor | None = None) -> Tensor:
        p, scales = self.packed, self.x_scales if x_scales is None else x_scales
        return matmul_w8a8(self.x, scales, p.codes, p.scales, bias, dtype)

    def reference(self, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        return matmul_w8a8_reference(self.x, self.x_scales, self.packed.codes, self.packed.scales, bias, dtype)


def a_product(format: str, m: int, n: int, k: int, device: torch.device) -> Codes:
    weight, x = normal(n, k, dtype=torch.float32, seed=4).to(device), normal(m, k, dtype=torch.float32).to(device)
    q = quantize(x, format)
    return Codes(q.codes, q.scales, pack_fp8(weight) if format == "fp8" else pack_w8(weight))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_times_codes_equal_the_product_in_fp64(shape, format, dtype, device):
    m, n, k, _ = shape
    codes, bias = a_product(format, m, n, k, device), normal(n, dtype=dtype, device=device, seed=2)
    exact = codes.reference(torch.float64, bias.double())
    assert_close_enough("y", codes.product(dtype, bias), codes.reference(dtype, bias), exact, k)


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("split_k", [1, 4])
def test_integer_sums_are_equal_to_the_bit(m, split_k, device):
    k, n = 1024, 37
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8, device=device) for shape in ((m, k), (n, k)))
    x[0, :], w[0, :] = -128, -128  # the largest sum, 2²⁴
    ones = torch.ones(m, device=device), torch.ones(1, n, device=device)
    tiles, row = MatmulLaunch(16, 32, 64, split_k, 8, 4, 2), GemvLaunch(4, 1, split_k)
    with W8A8.pinned(tiles), W8A8_ROW.pinned(row):
        y = matmul_w8a8(x, ones[0], w, ones[1], None, torch.float32)
    assert torch.equal(y.double(), x.double() @ w.double().t())


@pytest.mark.parametrize("m", [1, 3])
def test_every_fp8_code_is_read_right(m, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 0x7F) != 0x7F]
    w = codes.where(codes != 0x80, 0)[:, None].expand(-1, 32).clone()
    w[:, 1:] = 0  # a row of the weight for each code, times 1
    x = torch.zeros(m, 32, device=device)
    x[:, 0] = 1
    scales = torch.ones(m, device=device), torch.ones(1, w.shape[0], device=device)
    y = matmul_w8a8(x.to(torch.float8_e4m3fn), scales[0], w.view(torch.float8_e4m3fn), scales[1], None, torch.float32)
    assert torch.equal(y, codes.view(torch.float8_e4m3fn).float().expand(m, -1))
    # and the other way round: each code as an activation
    x = w.view(torch.float8_e4m3fn)
    ones = torch.zeros(5, 32, device=device)
    ones[:, 0] = 1
    scales = torch.ones(x.shape[0], device=device), torch.ones(1, 5, device=device)
    y = matmul_w8a8(x, scales[0], ones.to(torch.float8_e4m3fn), scales[1], None, torch.float32)
    assert torch.equal(y, codes.view(torch.float8_e4m3fn).float()[:, None].expand(-1, 5))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_row_that_is_not_finite_stays_so(format, m, device):
    x = normal(m, 64, dtype=torch.float32).to(device)
    x[0, 5] = float("inf")
    q, packed = quantize(x, format), pack_fp8(torch.ones(4, 64, device=device))
    if format == "int8":
        packed = pack_w8(torch.ones(4, 64, device=device))
    y = matmul_w8a8(q.codes, q.scales, packed.codes, packed.scales)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("m", [1, 3])
def test_an_fp8_nan_is_a_nan(m, device):
    x = torch.ones(m, 64, device=device)
    x[0, 40] = float("nan")
    packed = pack_fp8(torch.ones(4, 64, device=device))
    scales = torch.ones(m, device=device)
    y = matmul_w8a8(x.to(torch.float8_e4m3fn), scales, packed.codes, packed.scales)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [1, 2])
def test_what_is_not_finite_shows(m, value, format, device):
    layer = a_layer(format, 5, 96, 32, device)
    x = normal(m, 96, dtype=torch.bfloat16, device=device)
    x[0, 50] = value
    y = layer.ours(x)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_strides_offsets_and_leading_axes(format, device):
    layer = a_layer(format, 10, 64, 32, device)
    x = normal(3, 4, 130, dtype=torch.float16, device=device)
    for view in (x[..., 1:129:2], x.transpose(0, 1)[..., 3:67], x[:1, :, :1].expand(2, 4, 64), x[1, 2, 5:69]):
        got = layer.ours(view)
        assert got.shape == (*view.shape[:-1], 10) and got.is_contiguous()
        assert torch.equal(got, layer.ours(view.contiguous()))


@pytest.mark.parametrize("format", FORMATS)
def test_an_expanded_gradient_is_read_right(format, device):
    layer = a_layer(format, 10, 64, 32, device)
    x = normal(3, 64, dtype=torch.float16, device=device).requires_grad_()
    layer.ours(x).sum().backward()
    want = values_reference(layer.packed.codes, layer.packed.scales, layer.packed.zeros, torch.float64).sum(0)
    known = values_reference(layer.packed.codes, layer.packed.scales, layer.packed.zeros, torch.float16).sum(0)
    assert x.grad is not None
    for row in x.grad:
        assert_close_enough("dx", row, known, want, 10)


@pytest.mark.parametrize("format", FORMATS)
def test_there_is_no_second_derivative(format, device):
    layer = a_layer(format, 4, 32, 32, device)
    x = normal(2, 32, dtype=torch.float16, device=device).requires_grad_()
    grad = torch.ones(2, 4, dtype=torch.float16, device=device, requires_grad=True)
    if x.device.type == "cpu" and type(layer.ours(x).grad_fn).__name__ != "_ProductBackward":
        pytest.skip("the reference is plain PyTorch, which has one")
    (dx,) = torch.autograd.grad(layer.ours(x), x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()


def test_no_rows(device):
    for format in FORMATS:
        layer = a_layer(format, 4, 32, 32, device)
        assert layer.ours(torch.empty(2, 0, 32, dtype=torch.float16, device=device)).shape == (2, 0, 4)
    empty = torch.empty(0, 32, dtype=torch.int8, device=device)
    packed = pack_w8(torch.ones(4, 32, device=device))
    assert matmul_w8a8(empty, torch.empty(0, device=device), packed.codes, packed.scales).shape == (0, 4)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("format", FORMATS)
def test_the_weight_as_floats_is_equal_to_the_bit(format, group, dtype, device):
    p = pack(format, normal(9, 1000, dtype=torch.float32).to(device), group)
    got = dequantize_weight(p.codes, p.scales, p.zeros, dtype)
    assert torch.equal(got, values_reference(p.codes, p.scales, p.zeros, dtype))


def test_two_runs_are_equal_to_the_bit(device):
    for m in (1, 20):
        layer = a_layer("w4", 9, 512, 128, device)
        x = normal(m, 512, dtype=torch.bfloat16, device=device)
        tiles, row = layer.tunables()
        with tiles.pinned(TILES[1]), row.pinned(GemvLaunch(2, 2, 2)):
            assert torch.equal(layer.ours(x), layer.ours(x))


@interpreted
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, None]),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(HALVES),
    has_bias=st.booleans(),
    split_k=st.sampled_from([None, 2, 3]),
)
def test_any_shape(m, n, k, group, format, dtype, has_bias, split_k):
    layer = a_layer(format, n, k, group, torch.device("cpu"))
    inputs = {"x": normal(m, k, dtype=dtype), "bias": normal(n, dtype=dtype, seed=2) if has_bias else None}
    tiles, row = layer.tunables()
    if split_k is None:
        assert_as_exact_as_torch(layer.ours, layer.torchs, inputs, None, k)
    else:
        with tiles.pinned(MatmulLaunch(16, 32, 32, split_k, 8, 4, 2)), row.pinned(GemvLaunch(2, 1, split_k)):
            assert_as_exact_as_torch(layer.ours, layer.torchs, inputs, None, k)


def calls_of_ops() -> list[tuple[Callable[..., Tensor], tuple]]:
    ops, calls = torch.ops.tritonspeed, []
    for m in (1, 3):
        x, bias = normal(m, 64, dtype=torch.float16), normal(5, dtype=torch.float16)
        w4 = a_layer("w4 zeros", 5, 64, 32, torch.device("cpu")).packed
        w8 = a_layer("w8", 5, 64, 32, torch.device("cpu")).packed
        codes = a_product("int8", m, 5, 64, torch.device("cpu"))
        calls += [
            (ops.matmul_w4a16, (x, w4.codes, w4.scales, w4.zeros, bias)),
            (ops.matmul_w8a16, (x, w8.codes, w8.scales, None)),
            (
                ops.matmul_w8a8,
                (codes.x, codes.x_scales, codes.packed.codes, codes.packed.scales, bias, torch.bfloat16),
            ),
            (ops.dequantize_weight, (w4.codes, w4.scales, w4.zeros, torch.float16)),
        ]
    return calls


@interpreted
@pytest.mark.parametrize("i", range(8))
def test_the_operators_are_registered_right(i):
    op, arguments = calls_of_ops()[i]
    torch.library.opcheck(op.default, arguments)


class Module(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.ours(x) * 2


@pytest.mark.parametrize("format", FORMATS)
def test_compiles_into_one_graph_with_gradients(format, device):
    layer = a_layer(format, 9, 64, 32, device)
    x = normal(3, 64, dtype=torch.float16, device=device)
    plain, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    module = Module(layer)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(compiled)
    y.sum().backward()
    want = module(plain)
    want.sum().backward()
    assert torch.equal(y, want) and torch.equal(compiled.grad, plain.grad)


@pytest.mark.parametrize("format", FORMATS)
def test_exports(format, device):
    layer = a_layer(format, 9, 64, 32, device)
    x = normal(3, 64, dtype=torch.float16, device=device)
    program = torch.export.export(Module(layer), (x,))
    assert torch.equal(program.module()(x), Module(layer)(x))


@pytest.mark.gpu
def test_more_than_2_to_the_31_weights(device):
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("12 GiB of GPU memory")
    n, k = 70_000, 32_768
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scales = torch.ones(1, n, device=device)
    for m in (1, 16):
        x = normal(m, k, dtype=torch.float16, device=device)
        y = matmul_w8a16(x, codes, scales)
        want = x.double() @ codes[-5:].double().t()
        assert_close_enough("y", y[:, -5:], want.half(), want, k)


def call_w4(x: Tensor, p: PackedWeight, **changes: Tensor | None) -> Tensor:
    return matmul_w4a16(**{"x": x, "codes": p.codes, "scales": p.scales, "zeros": p.zeros, "bias": None, **changes})


def test_the_errors_say_what_does_not_fit():
    p = pack_w4(torch.randn(6, 100), 32)
    x, w8 = torch.zeros(2, 100, dtype=torch.float16), pack_w8(torch.randn(6, 64), 32)
    q, s = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2)
    half = torch.float16
    cases = [
        (lambda: call_w4(x.double(), p), "x is torch.float64, must be float16 or bfloat16"),
        (lambda: call_w4(x, p, codes=p.codes.to(torch.int8)), "codes is torch.int8, must be uint8"),
        (lambda: call_w4(x[:, :96], p), r"x is \(2, 96\), the weight \(6, 128\) with less than 32 elements of padding"),
        (lambda: call_w4(x, p, scales=p.scales[:, :5]), r"scales \(4, 5\) must be \(G, 6\)"),
        (lambda: call_w4(x, p, zeros=torch.zeros(1, 6, dtype=torch.uint8)), r"zeros \(1, 6\) must have the shape"),
        (lambda: call_w4(x, p, bias=torch.zeros(5, dtype=half)), r"bias \(5,\) must be \(6,\)"),
        (lambda: matmul_w8a8(q, s, w8.codes, w8.scales), r"scales \(2, 6\) must be \(1, N\)"),
        (lambda: matmul_w8a8(q, s, w8.codes.view(torch.float8_e4m3fn), w8.scales), "must be int8"),
        (lambda: matmul_w8a8(q, s[:1], w8.codes, w8.scales[:1]), r"x_scales \(1,\)"),
        (lambda: matmul_w8a8(q, s, w8.codes, w8.scales[:1], None, torch.float64), "dtype is torch.float64"),
        (lambda: dequantize_weight(p.codes, p.scales, None, torch.float64), "the result torch.float64"),
        (lambda: dequantize_weight(p.codes, p.scales[:3], None, half), r"codes \(6, 64\) want scales"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
