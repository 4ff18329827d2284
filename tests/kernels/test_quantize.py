"""Quantise, dequantise, and sums of quantised copies: codes bit for bit, in all lanes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from tolerances import tolerance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels import dequantize, dequantize_sum, quantize, requantize_sum
from tritonspeed.kernels._triton import tl, triton
from tritonspeed.kernels.codes import FORMATS, Quantized, e4m3_bits, from_e4m3_bits
from tritonspeed.kernels.dequantize import dequantize_sum_reference
from tritonspeed.kernels.quantize import quantize_reference

KINDS = [("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8", True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (shape, group_size): groups in a tile, whole rows, odd rows, rows longer than a block, several axes
SHAPES = [((3, 64), 16), ((5, 1024), 256), ((2, 4096), 4096), ((3, 48), None), ((4, 33), None), ((2, 5000), 2500)]
SHAPES += [((1, 1), None), ((2, 3, 96), 32), ((1, 9), 3)]


def parts(q: Quantized) -> tuple[Tensor, ...]:
    return tuple(t for t in (q.codes.view(torch.uint8), q.scales, q.offsets) if t is not None)


@pytest.mark.parametrize(("format", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_references_bit_for_bit(
    format: str, symmetric: bool, dtype: torch.dtype, device: torch.device
) -> None:
    for shape, group_size in SHAPES:
        x = (torch.randn(shape) * torch.rand(shape[-1])).to(device, dtype)
        size = group_size or shape[-1]
        q = quantize(x, format, group_size, symmetric)
        want = quantize_reference(x.reshape(-1, shape[-1]).cpu(), format, size, symmetric)
        for got, right in zip(parts(q), want, strict=False):
            assert torch.equal(got.reshape(right.shape).cpu(), right), (shape, group_size)
        assert q.num_bytes == sum(part.nbytes for part in parts(q))
        assert dequantize(q, dtype).shape == x.shape


@pytest.mark.parametrize(("format", "symmetric"), KINDS)
def test_the_error_is_at_most_half_a_step(format: str, symmetric: bool, device: torch.device) -> None:
    for shape, group_size in SHAPES:
        x = torch.randn(shape, device=device)
        q = quantize(x, format, group_size, symmetric)
        scales = q.scales.repeat_interleave(q.group_size, -1)
        if format == "fp8":  # three bits after the point: half a step is 2⁻⁴ of the value, or of the smallest normal
            step = torch.maximum(x.abs() / 8, scales * 2.0**-9)
        else:
            step = scales
        off = (dequantize(q) - x).abs()
        slack = tolerance(torch.float32)["rtol"] * x.abs().max()
        assert (off <= step / 2 + slack).all(), (shape, group_size)


@interpreted
def test_fp8_is_torchs_for_every_value() -> None:
    @triton.jit
    def both_ways_kernel(x_ptr, code_ptr, y_ptr, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        code = e4m3_bits(tl.load(x_ptr + at, mask=at < n, other=0.0))
        tl.store(code_ptr + at, code.to(tl.uint8), mask=at < n)
        tl.store(y_ptr + at, from_e4m3_bits(code), mask=at < n)

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    around = torch.cat([ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))])
    x = torch.cat([every, around, torch.randn(2000) * 100, torch.randn(500) / 500]).clamp(-448, 448)
    codes, y = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    both_ways_kernel[(triton.cdiv(x.numel(), 1024),)](x, codes, y, x.numel(), BLOCK=1024)
    want = x.to(torch.float8_e4m3fn)
    nan = x.isnan()
    assert torch.equal(codes[~nan], want.view(torch.uint8)[~nan])
    assert torch.equal(y[~nan], want.float()[~nan]) and y[nan].isnan().all()


@pytest.mark.parametrize(("format", "symmetric"), KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group_size", [32, 48])
def test_an_overflow_stays_visible_in_its_group_alone(
    format: str, symmetric: bool, bad: float, group_size: int, device: torch.device
) -> None:
    x = torch.randn(2, 96, device=device)
    x[1, 5] = bad
    back = dequantize(quantize(x, format, group_size, symmetric))
    assert back[1, :group_size].isnan().all()
    assert back[0].isfinite().all() and back[1, group_size:].isfinite().all()


def test_zeros_and_constants_come_back(device: torch.device) -> None:
    for value in (0.0, 3.0, -2.5):
        x = torch.full((2, 64), value, device=device)
        for format, symmetric in KINDS:
            q = quantize(x, format, 16, symmetric)
            torch.testing.assert_close(dequantize(q), x, **tolerance(torch.float32))
            if value == 0:
                assert (q.scales == 1).all()


@pytest.mark.parametrize(("format", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_go_rank_by_rank(format: str, symmetric: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 2, 192, device=device) * 10
    q = quantize(x, format, 64, symmetric)
    low = torch.empty(0) if q.offsets is None else q.offsets.cpu()
    arguments = q.codes.view(torch.uint8).cpu(), q.scales.cpu(), low, format, 64
    want = dequantize_sum_reference(*arguments, dtype)
    got = dequantize_sum(q, dtype)
    torch.testing.assert_close(got.cpu(), want, **tolerance(dtype, 3, magnitude=want.abs().max().item()))
    again = requantize_sum(q)
    assert again.shape == (2, 192) and again.codes.dtype == q.codes.dtype
    step = again.scales.repeat_interleave(64, -1) * (16 if format == "fp8" else 0.5)  # e4m3: half of 448's last bit
    full = dequantize_sum(q)
    assert ((dequantize(again) - full).abs() <= step + tolerance(torch.float32)["rtol"] * full.abs().max()).all()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 4),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_any_shape(
    kind: tuple[str, bool], rows: int, groups: int, group_size: int, dtype: torch.dtype, transposed: bool
) -> None:
    format, symmetric = kind
    shape = (groups * group_size, rows) if transposed else (rows, groups * group_size)
    x = torch.randn(shape).to(dtype)
    x = x.T if transposed else x
    q = quantize(x, format, group_size, symmetric)
    assert q.codes.shape == (rows, groups * FORMATS[format].num_codes(group_size))
    if rows:
        want = quantize_reference(x.contiguous(), format, group_size, symmetric)
        assert torch.equal(q.codes.view(torch.uint8), want[0])
    assert dequantize(q, dtype).shape == x.shape


def test_an_expanded_tensor_and_a_view_off_the_boundary(device: torch.device) -> None:
    row = torch.randn(97, device=device)
    expanded, shifted = row[1:].expand(3, 96), row[1:]
    for x in (expanded, shifted):
        want = quantize_reference(x.reshape(-1, 96).contiguous().cpu(), "int8", 32, True)
        got = quantize(x, "int8", 32)
        assert torch.equal(got.codes.reshape(-1, 96).view(torch.uint8).cpu(), want[0])


@interpreted
def test_the_operators_are_registered_right() -> None:
    x = torch.randn(2, 64)
    for format, symmetric in KINDS:
        torch.library.opcheck(torch.ops.tritonspeed.quantize, (x, format, 32, symmetric))
        parts = torch.ops.tritonspeed.quantize(x.view(1, 2, 64)[0], format, 32, symmetric)
        codes, scales, offsets = (part.unsqueeze(0) for part in parts)
        torch.library.opcheck(
            torch.ops.tritonspeed.dequantize_sum, (codes, scales, offsets, format, 32, torch.bfloat16)
        )
        torch.library.opcheck(torch.ops.tritonspeed.requantize_sum, (codes, scales, offsets, format, 32))


def there_and_back(x: Tensor) -> Tensor:
    return dequantize(quantize(x, "int4", 16), x.dtype)


def test_torch_compile_and_export_take_it_whole(device: torch.device) -> None:
    x = torch.randn(4, 64, device=device)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return there_and_back(x)

    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), there_and_back(x))


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        q = quantize(torch.empty(10**6, 4096, dtype=torch.bfloat16), "int4", 128)
        assert q.codes.shape == (10**6, 2048) and q.scales.shape == (10**6, 32)
        assert dequantize(q, torch.bfloat16).shape == (10**6, 4096)


def test_errors_name_what_was_given() -> None:
    x = torch.randn(2, 10)
    with pytest.raises(ValueError, match="group_size is 3, must divide the last axis"):
        quantize(x, "int8", 3)
    with pytest.raises(ValueError, match="format is 'int3', must be one of int8, int4, fp8"):
        quantize(x, "int3")
    with pytest.raises(ValueError, match="fp8 has a sign and no offset"):
        quantize(x, "fp8", symmetric=False)
    with pytest.raises(ValueError, match="x is torch.float64"):
        quantize(x.double())
    with pytest.raises(ValueError, match="x is a scalar"):
        quantize(torch.tensor(1.0))
    with pytest.raises(ValueError, match="dtype is torch.int64"):
        dequantize(quantize(x), torch.int64)
    with pytest.raises(ValueError, match="group_size is 10, must be a power of two"):
        dequantize_sum(quantize(x))
    with pytest.raises(ValueError, match="must be \\(ranks, ..., N\\)"):
        requantize_sum(quantize(torch.randn(64), "int8", 16))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs a GPU with 16 GiB free")
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda").view(-1, 4096)
    x[-1] = 2
    q = quantize(x, "int8", 256)
    assert (q.codes[-1] == 127).all()
    assert (dequantize(q, torch.bfloat16)[-1] == 2).all()
