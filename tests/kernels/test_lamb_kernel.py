"""LAMB on a flat chunk: exactness against fp64, cuts that change nothing, norms per tensor, and its arguments."""

import math

import pytest
import torch
from accuracy import assert_close_enough
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from torch import Tensor

from tritonspeed.kernels.intervals import ALIGNMENT, SEGMENT, Intervals
from tritonspeed.kernels.lamb import (
    LambStep,
    lamb_direction_reference,
    lamb_moments_,
    lamb_moments_reference,
    lamb_step_,
    trust_ratio_reference,
)

STEP = LambStep(3, 1e-2, 0.9, 0.99, 1e-6, 0.1)
SIZES = [1, 2, 15, 16, 17, 1023, 1024, 1025, 4097, SEGMENT, SEGMENT + 1]


def place(sizes: list[int]) -> list[tuple[int, int]]:
    """Tensors one after another, each on a boundary, with a gap of one."""
    intervals, at = [], 0
    for size in sizes:
        intervals.append((at, at + size))
        at = (at + size) // ALIGNMENT * ALIGNMENT + 2 * ALIGNMENT
    return intervals


def chunk(n: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(n, generator=g) for name in ("master", "exp_avg", "exp_avg_sq", "grad")}
    made["exp_avg_sq"].square_()
    return {name: x.to(device, dtype if name == "grad" else torch.float32) for name, x in made.items()}


def step_(at: LambStep, intervals: Intervals, x: dict[str, Tensor], scale: Tensor | None, out: Tensor | None) -> Tensor:
    norms = lamb_moments_(x["master"], x["exp_avg"], x["exp_avg_sq"], x["grad"], intervals, at, scale)
    lamb_step_(x["master"], x["exp_avg"], x["exp_avg_sq"], norms, intervals, at, out)
    return norms


def reference_step_(at: LambStep, intervals: list[tuple[int, int]], x: dict[str, Tensor], scale: Tensor) -> None:
    """In x's own dtype, tensor by tensor."""
    for start, end in intervals:
        p, m, v, g = (x[name][start:end] for name in ("master", "exp_avg", "exp_avg_sq", "grad"))
        norms = lamb_moments_reference(p, m, v, g, at, scale)
        u = lamb_direction_reference(p, m, v, at)
        p.sub_(at.step_size * trust_ratio_reference(norms, at).to(p.dtype) * u)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "at",
    [STEP, LambStep(1, 1e-1, 0.8, 0.999, 1e-3, 0.0, bias_correction=False, eps_inside_sqrt=True, max_coeff=0.3)],
    ids=["corrected", "eps inside"],
)
def test_equals_fp64(at: LambStep, grad_dtype: torch.dtype, device: torch.device) -> None:
    intervals = place(SIZES)
    n = intervals[-1][1] + 5
    ours, scale = chunk(n, device, grad_dtype), torch.tensor(0.5, device=device)
    before = {name: x.clone() for name, x in ours.items()}
    plain = {name: x.clone() for name, x in ours.items()}
    exact = {name: x.double() for name, x in ours.items()}
    reference_step_(at, intervals, plain, scale)
    reference_step_(at, intervals, exact, scale.double())
    out = torch.zeros(n, dtype=torch.bfloat16, device=device)
    step_(at, Intervals.of(intervals, device), ours, scale, out)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        for start, end in intervals:
            tile = slice(start, end)
            assert_close_enough(name, ours[name][tile], plain[name][tile], exact[name][tile], SIZES[-1])
            assert torch.equal(out[tile], ours["master"][tile].bfloat16())
    gap = torch.ones(n, dtype=torch.bool)
    for start, end in intervals:
        gap[start:end] = False
    assert all(torch.equal(ours[name][gap], before[name][gap]) for name in before)
    assert not out[gap].any()


def test_norms_are_those_of_each_tensor(device: torch.device) -> None:
    intervals = place([5, 2 * SEGMENT + 3, 1000])
    x = chunk(intervals[-1][1], device)
    norms = lamb_moments_(x["master"], x["exp_avg"], x["exp_avg_sq"], x["grad"], Intervals.of(intervals, device), STEP)
    assert norms.shape == (3, 2) and norms.dtype == torch.float64
    for (start, end), (p, u) in zip(intervals, norms.tolist(), strict=True):
        part = {name: t[start:end] for name, t in x.items()}
        want = lamb_direction_reference(part["master"], part["exp_avg"], part["exp_avg_sq"], STEP)
        assert p == pytest.approx(part["master"].double().square().sum().item(), rel=1e-14)  # squares are exact
        assert u == pytest.approx(want.double().square().sum().item(), rel=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(size=st.integers(1, 3000), cut=st.integers(0, 200), grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_tensor_cut_in_two_steps_as_the_whole(size: int, cut: int, grad_dtype: torch.dtype) -> None:
    cut, device = min(cut * ALIGNMENT, size), torch.device("cpu")
    whole, cutted = chunk(size, device, grad_dtype, seed=size), chunk(size, device, grad_dtype, seed=size)
    norms = step_(STEP, Intervals.of([(0, size)], device), whole, None, None)
    parts = [{name: x[a:b] for name, x in cutted.items()} for a, b in ((0, cut), (cut, size))]
    maps = [Intervals.of([(0, cut)], device), Intervals.of([(0, size - cut)], device)]
    added = sum(
        lamb_moments_(x["master"], x["exp_avg"], x["exp_avg_sq"], x["grad"], where, STEP)
        for x, where in zip(parts, maps, strict=True)
    )
    torch.testing.assert_close(added, norms, rtol=1e-13, atol=0)  # fp64 sums in another order
    for x, where in zip(parts, maps, strict=True):
        lamb_step_(x["master"], x["exp_avg"], x["exp_avg_sq"], norms, where, STEP)
    assert all(torch.equal(whole[name], cutted[name]) for name in whole)


def test_a_zero_tensor_takes_the_ratio_one(device: torch.device) -> None:
    intervals = Intervals.of([(0, 40), (48, 90)], device)
    x = chunk(90, device)
    x["master"][:40] = 0
    norms = lamb_moments_(x["master"], x["exp_avg"], x["exp_avg_sq"], x["grad"], intervals, STEP)
    u = lamb_direction_reference(x["master"][:40], x["exp_avg"][:40], x["exp_avg_sq"][:40], STEP)
    lamb_step_(x["master"], x["exp_avg"], x["exp_avg_sq"], norms, intervals, STEP)
    torch.testing.assert_close(x["master"][:40], -STEP.step_size * u)
    # and nothing at all, with ε of 0: u is 0 / 0 nowhere that counts
    x = {name: torch.zeros(33, device=device) for name in x}
    x["grad"] += 1
    one = Intervals.of([(0, 33)], device)
    step_(LambStep(1, 0.1, 0.9, 0.9, 0.0, 0.0), one, x, None, None)
    assert x["master"].isfinite().all() and (x["master"] < 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_tensor(bad: float, device: torch.device) -> None:
    intervals, x = Intervals.of([(0, 40), (48, 90)], device), chunk(90, device)
    x["grad"][7] = bad
    step_(STEP, intervals, x, None, None)
    assert not x["master"][7].isfinite() and x["master"][48:].isfinite().all()


def test_two_runs_agree_to_the_bit(device: torch.device) -> None:
    intervals = Intervals.of(place([3 * SEGMENT + 5, 77]), device)
    runs = [chunk(4 * SEGMENT, device) for _ in range(2)]
    norms = [step_(STEP, intervals, x, None, None) for x in runs]
    assert torch.equal(*norms) and torch.equal(runs[0]["master"], runs[1]["master"])


@interpreted
def test_the_ops_are_sound() -> None:
    intervals, x = Intervals.of([(0, 40), (48, 90)], torch.device("cpu")), chunk(90, torch.device("cpu"))
    numbers = (STEP.beta1, STEP.beta2, STEP.eps, STEP.weight_decay, False)
    maps = (intervals.table, intervals.first, intervals.bounds)
    torch.library.opcheck(
        torch.ops.tritonspeed.lamb_moments_,
        (x["exp_avg"], x["exp_avg_sq"], x["master"], x["grad"], None, *maps, *numbers),
    )
    torch.library.opcheck(
        torch.ops.tritonspeed.lamb_step_,
        (x["master"], x["exp_avg"], x["exp_avg_sq"], torch.zeros(90).bfloat16(), torch.ones(2, 2).double(),
         intervals.table, intervals.bounds, 1e-6, 0.1, 1e-2, 0.01, 10.0, False),
    )  # fmt: skip


def test_compiles_whole(device: torch.device) -> None:
    intervals = Intervals.of([(0, 40), (48, 90)], device)
    plain, compiled = chunk(90, device), chunk(90, device)
    step_(STEP, intervals, plain, None, None)
    torch.compile(step_, fullgraph=True, backend="aot_eager")(STEP, intervals, compiled, None, None)
    assert torch.equal(plain["master"], compiled["master"])


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("wants a GPU with 40 GiB free")
    n = 2**31 + 100
    x = {name: torch.zeros(n, device=device) for name in ("master", "exp_avg", "exp_avg_sq")}
    x["grad"] = torch.zeros(n, dtype=torch.bfloat16, device=device)
    for t in (x["master"], x["grad"]):
        t[-64:] = 1
    norms = step_(STEP, Intervals.of([(0, n)], device), x, None, None)
    assert norms[0, 0].item() == 64 and (x["master"][-64:] < 1).all() and not x["master"][:-64].any()


def test_says_what_does_not_fit() -> None:
    cpu = torch.device("cpu")
    x, intervals = chunk(90, cpu), Intervals.of([(0, 90)], cpu)

    def moments(at: LambStep = STEP, **changed: Tensor) -> None:
        y = {**x, **changed}
        lamb_moments_(y["master"], y["exp_avg"], y["exp_avg_sq"], y["grad"], intervals, at)

    with pytest.raises(ValueError, match=r"exp_avg is torch.float64, must be float32"):
        moments(exp_avg=x["exp_avg"].double())
    with pytest.raises(ValueError, match=r"grad has shape \(45,\)"):
        moments(grad=x["grad"][::2])
    with pytest.raises(ValueError, match="betas are 1.0, 0.9"):
        moments(LambStep(1, 0.1, 1.0, 0.9, 0.0, 0.0))
    with pytest.raises(ValueError, match="step is 0"):
        moments(LambStep(0, 0.1, 0.9, 0.9, 0.0, 0.0))
    with pytest.raises(ValueError, match="multiple of 16"):
        Intervals.of([(8, 90)], cpu)
    with pytest.raises(ValueError, match="intervals end at 91, the chunk has 90"):
        too_long = Intervals.of([(0, 91)], cpu)
        lamb_moments_(x["master"], x["exp_avg"], x["exp_avg_sq"], x["grad"], too_long, STEP)
    with pytest.raises(ValueError, match=r"norms are \(2, 2\) torch.float64, must be \(1, 2\)"):
        lamb_step_(x["master"], x["exp_avg"], x["exp_avg_sq"], torch.ones(2, 2).double(), intervals, STEP)
    with pytest.raises(ValueError, match="param_out is torch.float32"):
        norms = torch.ones(1, 2, dtype=torch.float64)
        lamb_step_(x["master"], x["exp_avg"], x["exp_avg_sq"], norms, intervals, STEP, x["grad"])
