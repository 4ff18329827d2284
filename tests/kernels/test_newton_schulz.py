"""Newton-Schulz: exactness against fp64, singular values near 1, and a matrix that comes out the same in any batch."""

import math

import pytest
import torch
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from torch.optim import Muon

from tritonspeed.kernels.newton_schulz import COEFFICIENTS, newton_schulz, newton_schulz_reference

SHAPES = [(1, 1), (1, 17), (33, 1), (16, 16), (63, 65), (64, 64), (129, 40), (2, 31, 77)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(shape) * 3).to(device, dtype)
    # five steps multiply an error by up to 3.4445⁵ = 485 where a singular value is small: 485² terms' worth
    terms = max(shape[-2:]) * 485**2 if dtype == torch.float32 else 1
    assert_as_exact_as_torch(newton_schulz, newton_schulz_reference, {"x": x}, num_summed=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(70, 90).to(device, dtype)

    def one(f):
        return lambda x: f(x, 1, (1.5, -0.5, 0.25))

    assert_as_exact_as_torch(one(newton_schulz), one(newton_schulz_reference), {"x": x}, num_summed=90)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 700, 1030), (1024, 4096), (3000, 1111)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to("cuda", dtype)
    terms = max(shape[-2:]) * 485**2 if dtype == torch.float32 else 1
    assert_as_exact_as_torch(newton_schulz, newton_schulz_reference, {"x": x}, num_summed=terms)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    u, s, vt = torch.linalg.svd(newton_schulz(x).double())
    assert s.min() > 0.6 and s.max() < 1.3
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    core = u.mT @ newton_schulz(x).double() @ vt.mT
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=1e-3, rtol=0)


def test_is_what_torch_muon_does(device: torch.device) -> None:
    """One step of torch.optim.Muon from zero, without momentum: its matrix is bf16 as well."""
    grad = torch.randn(48, 36, device=device)
    param = torch.nn.Parameter(torch.zeros(48, 36, device=device))
    param.grad = grad.clone()
    Muon([param], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    want = -param.detach() / (0.2 * math.sqrt(48))
    exact = newton_schulz_reference(grad.bfloat16().double())
    error, torchs_error = ((x.double() - exact).norm() for x in (newton_schulz(grad.bfloat16()), want))
    assert error <= 2 * torchs_error and torchs_error < 0.05 * exact.norm()


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3), m=st.integers(1, 70), n=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES), steps=st.integers(0, 2), transposed=st.booleans(),
)  # fmt: skip
def test_a_batch_is_its_matrices(batch: int, m: int, n: int, dtype: torch.dtype, steps: int, transposed: bool) -> None:
    x = torch.randn(batch, n, m).mT if transposed else torch.randn(batch, m, n)
    x = x.to(dtype)
    together = newton_schulz(x, steps)
    assert together.shape == x.shape and together.dtype == dtype and together.is_contiguous()
    assert all(torch.equal(together[i], newton_schulz(x[i], steps)) for i in range(batch))
    assert torch.equal(together, newton_schulz(x.contiguous(), steps))


def test_strides_and_offsets_change_nothing(device: torch.device) -> None:
    base = torch.randn(3, 21, 35, device=device)
    plain = newton_schulz(base[1, 1:, 3:].clone(), 2)
    assert torch.equal(newton_schulz(base[1, 1:, 3:], 2), plain)
    expanded = torch.ones(5, 1, device=device).expand(5, 9)
    assert torch.equal(newton_schulz(expanded, 2), newton_schulz(expanded.clone(), 2))


def test_empty_zero_and_not_finite(device: torch.device) -> None:
    for shape in ((0, 5), (5, 0), (0, 3, 4), (2, 0, 4)):
        assert newton_schulz(torch.empty(shape, device=device)).shape == shape
    assert not newton_schulz(torch.zeros(3, 9, device=device)).any()
    x = torch.randn(2, 9, 9, device=device)
    x[0, 3, 3] = math.nan
    found = newton_schulz(x)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_two_runs_agree_to_the_bit(device: torch.device) -> None:
    x = torch.randn(2, 65, 130, device=device).bfloat16()
    assert torch.equal(newton_schulz(x), newton_schulz(x))


@interpreted
def test_the_op_is_sound() -> None:
    torch.library.opcheck(torch.ops.tritonspeed.newton_schulz, (torch.randn(2, 5, 7), 1, *COEFFICIENTS, 1e-7))


def test_compiles_and_exports_whole(device: torch.device) -> None:
    x = torch.randn(9, 11, device=device)

    class Once(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return newton_schulz(x, 1)

    want = newton_schulz(x, 1)
    assert torch.equal(torch.compile(Once(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Once(), (x,)).module()(x), want)


def test_says_what_does_not_fit() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"x has shape \(3,\), must be \(M, N\)"):
        newton_schulz(x[:, 0])
    with pytest.raises(ValueError, match="x is torch.float64, must be float32"):
        newton_schulz(x.double())
    with pytest.raises(ValueError, match="2 coefficients"):
        newton_schulz(x, 5, (1.0, 2.0))
    with pytest.raises(ValueError, match="steps is 100"):
        newton_schulz(x, 100)
    with pytest.raises(ValueError, match="requires a gradient"):
        newton_schulz(x.requires_grad_())
