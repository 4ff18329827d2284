"""Muon's elementwise halves: exactness against fp64, cuts that change nothing, and their arguments."""

import math

import pytest
import torch
from accuracy import assert_close_enough
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from torch import Tensor

from tritonspeed.kernels.muon import (
    muon_direction_,
    muon_direction_reference,
    muon_step_,
    muon_step_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 16, 17, 2047, 2048, 2049, 5000]


def draw(n: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_equals_fp64(n: int, dtype: torch.dtype, nesterov: bool, device: torch.device) -> None:
    grad, scale = draw(n, dtype, device, 1), torch.tensor(0.25, device=device)
    found = {}
    for name, wide in (("ours", None), ("plain", torch.float32), ("exact", torch.float64)):
        master, momentum = (draw(n, torch.float32, device, seed).to(wide or torch.float32) for seed in (2, 3))
        out, copy = torch.empty(n, dtype=dtype, device=device), torch.empty(n, dtype=torch.bfloat16, device=device)
        if wide is None:
            muon_direction_(momentum, grad, out, beta=0.9, nesterov=nesterov, grad_scale=scale)
            muon_step_(master, grad, decay=0.01, step_size=0.3, param_out=copy)
            assert torch.equal(copy, master.bfloat16())
        else:
            out = out.double() if wide == torch.float64 else out
            muon_direction_reference(momentum, grad, out, 0.9, nesterov, scale.to(wide))
            muon_step_reference(master, grad, 0.01, 0.3)
        found[name] = {"momentum": momentum, "out": out, "master": master}
    for name in found["ours"]:
        assert_close_enough(name, *(found[which][name] for which in ("ours", "plain", "exact")))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 3000), cut=st.integers(0, 3000), dtype=st.sampled_from(DTYPES))
def test_a_cut_changes_no_bit(n: int, cut: int, dtype: torch.dtype) -> None:
    cpu, cut = torch.device("cpu"), min(cut, n)
    grad, runs = draw(n, dtype, cpu, 1), []
    for cuts in ([slice(0, n)], [slice(0, cut), slice(cut, n)]):
        momentum, master, out = draw(n, torch.float32, cpu, 2), draw(n, torch.float32, cpu, 3), torch.empty(n)
        for part in cuts:
            muon_direction_(momentum[part], grad[part], out[part], beta=0.95)
            muon_step_(master[part], out[part], decay=0.1, step_size=0.2)
        runs.append((momentum, master, out))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(bad: float, device: torch.device) -> None:
    momentum, grad, out = (draw(3000, torch.float32, device, seed) for seed in range(3))
    grad[7] = bad
    muon_direction_(momentum, grad, out, beta=0.95)
    assert not out[7].isfinite() and out[8:].isfinite().all() and out[:7].isfinite().all()


@interpreted
def test_the_ops_are_sound() -> None:
    a, b, c = torch.randn(9), torch.randn(9).bfloat16(), torch.zeros(9).bfloat16()
    torch.library.opcheck(torch.ops.tritonspeed.muon_direction_, (a, b, c, torch.ones(()), 0.9, True))
    torch.library.opcheck(torch.ops.tritonspeed.muon_step_, (a, b, c, 0.1, 0.2))


def test_compiles_whole(device: torch.device) -> None:
    def both(momentum: Tensor, master: Tensor, out: Tensor) -> None:
        muon_direction_(momentum, master, out, beta=0.9)
        muon_step_(master, out, decay=0.1, step_size=0.2)

    plain, compiled = ([draw(50, torch.float32, device, seed) for seed in range(3)] for _ in range(2))
    both(*plain)
    torch.compile(both, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("wants a GPU with 30 GiB free")
    n = 2**31 + 100
    momentum, grad = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.bfloat16, device=device)
    grad[-9:] = 1
    out = torch.empty_like(grad)
    muon_direction_(momentum, grad, out, beta=0.5)
    muon_step_(momentum, out, decay=0.0, step_size=1.0)
    assert (out[-9:] == 0.75).all() and (momentum[-9:] == -0.25).all() and not momentum[:-9].any()


def test_says_what_does_not_fit() -> None:
    x, y = torch.randn(8), torch.randn(8)
    with pytest.raises(ValueError, match="momentum is torch.float64, must be float32"):
        muon_direction_(x.double(), y, y, beta=0.9)
    with pytest.raises(ValueError, match=r"grad has shape \(4,\) and strides \(2,\)"):
        muon_direction_(x, y[::2], y, beta=0.9)
    with pytest.raises(ValueError, match=r"out has shape \(2, 4\)"):
        muon_direction_(x, y, y.view(2, 4), beta=0.9)
    with pytest.raises(ValueError, match="beta is 1.0"):
        muon_direction_(x, y, y, beta=1.0)
    with pytest.raises(ValueError, match="update is torch.int32"):
        muon_step_(x, y.int(), decay=0.0, step_size=1.0)
    with pytest.raises(ValueError, match="param_out is torch.float32"):
        muon_step_(x, y, decay=0.0, step_size=1.0, param_out=y)
