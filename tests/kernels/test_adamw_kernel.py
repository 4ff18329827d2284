"""AdamW: the CPU form, the kernel under the interpreter, and the kernel on a GPU, against plain fp64 mathematics."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import relative_error, tolerance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels import adamw_
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.adamw import adamw_reference
from tritonspeed.kernels.flat_update import CPU_CHUNK_ELEMS
from tritonspeed.kernels.rounding import round_stochastic_reference

HYPER: dict[str, Any] = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "plain": {},
    "adam": {"decoupled": False},
    "uncorrected": {"bias_correction": False},
    "no_decay": {"weight_decay": 0.0},
    "no_momentum": {"betas": (0.0, 0.99)},
}
SIZES = [1, 7, 64, 1000, 1023, 1024, 1025, 4099]
CPU = torch.device("cpu")


def state(n: int, device: torch.device = CPU, grad_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A chunk in the middle of training, the same numbers on every device."""
    generator = torch.Generator().manual_seed(n)
    master, exp_avg, grad = (torch.randn(n, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(n, generator=generator) * 0.01
    tensors = {"master": master, "exp_avg": exp_avg * 0.1, "exp_avg_sq": exp_avg_sq, "grad": grad.to(grad_dtype)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def clones(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.clone() if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_equals_fp64(variant: str, grad_dtype: torch.dtype, device: torch.device) -> None:
    options = {**HYPER, **VARIANTS[variant]}
    for n in SIZES:
        ours = state(n, device, grad_dtype)
        plain, exact = clones(ours), clones(ours, torch.float64)
        scale = torch.tensor(0.37, device=device)
        out = torch.empty(n, dtype=torch.bfloat16, device=device)
        adamw_(**ours, grad_scale=scale, param_out=out, **options)
        adamw_reference(**plain, grad_scale=scale, **options)
        adamw_reference(**exact, grad_scale=scale.double(), **options)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            ours_error, plain_error = (relative_error(t[name], exact[name]) for t in (ours, plain))
            assert ours_error <= 2 * plain_error + tolerance(torch.float32)["rtol"], (name, n)
            torch.testing.assert_close(ours[name], plain[name], **tolerance(torch.float32))
        assert torch.equal(out, ours["master"].bfloat16()), n  # the copy is the master, rounded once
        assert torch.equal(ours["grad"], plain["grad"])


@pytest.mark.skipif(not INTERPRETED, reason="under the interpreter every operation is rounded by itself, as on a GPU")
def test_the_kernels_moments_equal_the_reference_to_the_last_bit(device: torch.device) -> None:
    ours = state(4099, device, torch.float16)
    plain = clones(ours)
    scale = torch.tensor(0.37, device=device)
    adamw_(**ours, grad_scale=scale, **HYPER)
    adamw_reference(**plain, grad_scale=scale, **HYPER)
    assert torch.equal(ours["exp_avg"], plain["exp_avg"])
    assert torch.equal(ours["exp_avg_sq"], plain["exp_avg_sq"])
    # torch's root on a CPU is not correctly rounded, so that masters may be an ulp apart here and there
    assert (ours["master"] != plain["master"]).double().mean() < 0.01


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 3000),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    out_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
    decoupled=st.booleans(),
    bias_correction=st.booleans(),
    step=st.sampled_from([1, 2, 1000, 10**6]),
    offset=st.integers(0, 5),
)
def test_any_combination_equals_the_reference(
    n: int,
    grad_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    scaled: bool,
    decoupled: bool,
    bias_correction: bool,
    step: int,
    offset: int,
) -> None:
    whole = state(n + offset, grad_dtype=grad_dtype)
    ours = {name: tensor[offset:] for name, tensor in whole.items()}  # storage offsets: pointers on no 16-byte boundary
    plain = clones(ours)
    out = None if out_dtype is None else torch.empty(n, dtype=out_dtype)
    options = {**HYPER, "step": step, "decoupled": decoupled, "bias_correction": bias_correction}
    scale = torch.tensor(1e-2) if scaled else None
    adamw_(**ours, grad_scale=scale, param_out=out, **options)
    adamw_reference(**plain, grad_scale=scale, **options)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], **tolerance(torch.float32))
    if out is not None:
        assert torch.equal(out, ours["master"].to(out.dtype))


@pytest.mark.parametrize("decoupled", [True, False])
def test_fifty_steps_follow_torch_in_fp64(decoupled: bool, device: torch.device) -> None:
    n, lr, weight_decay = 257, 1e-2, 0.1
    master = state(n, device)["master"]
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    exact = master.double().cpu().requires_grad_()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([exact], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 51):
        grad = torch.randn(n, generator=generator)
        exact.grad = grad.double()
        optimizer.step()
        options = {"step": step, "lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
        adamw_(master, exp_avg, exp_avg_sq, grad.to(device), decoupled=decoupled, **options)
    torch.testing.assert_close(master.cpu().double(), exact.detach(), **tolerance(torch.float32, num_summed=50))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("cuts", [(1024, 5 * 1024), (1, 64, 777, 5009)], ids=["at_1024", "odd"])
def test_cuts_change_no_bit(cuts: tuple[int, ...], num_threads: int, device: torch.device) -> None:
    n = 10_007 if INTERPRETED else CPU_CHUNK_ELEMS + 10_007
    whole = state(n, device, torch.bfloat16)
    pieces = clones(whole)
    out, out_of_pieces = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    scale = torch.tensor(0.3, device=device)
    torch.set_num_threads(2)
    adamw_(**whole, grad_scale=scale, param_out=out, **HYPER)
    torch.set_num_threads(num_threads)
    for a, b in zip((0, *cuts), (*cuts, n), strict=True):
        piece = {name: tensor[a:b] for name, tensor in pieces.items()}
        adamw_(**piece, grad_scale=scale, param_out=out_of_pieces[a:b], **HYPER)
    for name in whole:
        assert torch.equal(whole[name], pieces[name]), name
    assert torch.equal(out, out_of_pieces)


def test_stochastic_rounding_is_the_references_and_follows_the_element(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonspeed.kernels.flat_update.CPU_CHUNK_ELEMS", 1024)  # several chunks of 3,001 elements
    n, first, seed = 3001, 2**33 + 4, 2**45 + 11
    ours = state(n, device)
    pieces = clones(ours)
    out, out_of_pieces = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    options = {**HYPER, "stochastic_rounding_seed": seed}
    adamw_(**ours, param_out=out, first_element=first, **options)
    for a, b in ((0, 1200), (1200, 1204), (1204, n)):
        piece = {name: tensor[a:b] for name, tensor in pieces.items()}
        adamw_(**piece, param_out=out_of_pieces[a:b], first_element=first + a, **options)
    assert torch.equal(out, out_of_pieces)
    assert torch.equal(out.cpu(), round_stochastic_reference(ours["master"].cpu(), seed, first))
    assert not torch.equal(out, ours["master"].bfloat16())


def test_stochastic_rounding_keeps_what_nearest_loses(device: torch.device) -> None:
    """500 updates of a hundredth of a bf16 step: to nearest none is seen, at random their mean is."""
    n, lr = 1024, 2.0**-7 / 100
    nearest, random = (torch.ones(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    options = {"lr": lr, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    for step in range(1, 501 if not INTERPRETED else 26):
        for copy, seed in ((nearest, None), (random, step)):
            master, (exp_avg, exp_avg_sq) = copy.float(), torch.zeros(2, n, device=device)
            grad = torch.full((n,), -1.0, device=device)
            adamw_(
                master, exp_avg, exp_avg_sq, grad, step=step, param_out=copy, stochastic_rounding_seed=seed, **options
            )
    assert (nearest == 1).all()
    drift = (random.double().mean().item() - 1) / (lr * step)
    assert abs(drift - 1) < 5 * (100 / step) ** 0.5 / n**0.5  # n walks of `step` coins that fall up once in a hundred


def test_bf16_moments_are_the_references_and_follow_the_element(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonspeed.kernels.flat_update.CPU_CHUNK_ELEMS", 1024)
    n, first, seed = 3001, 2**33 + 4, 2**45 + 11

    def start() -> dict[str, Tensor]:
        tensors = state(n, device)
        return {k: t.bfloat16() if k.startswith("exp") else t for k, t in tensors.items()}

    ours, plain, pieces = start(), start(), start()
    options = {**HYPER, "state_rounding_seed": seed}
    adamw_(**ours, first_element=first, **options)
    adamw_reference(**plain, first_element=first, **options)
    for a, b in ((0, 1200), (1200, 1204), (1204, n)):
        adamw_(**{name: t[a:b] for name, t in pieces.items()}, first_element=first + a, **options)
    for name in ours:
        assert torch.equal(ours[name], pieces[name]), name
    torch.testing.assert_close(ours["master"], plain["master"], **tolerance(torch.float32))
    # the CPU form rounds the fp32 moments elsewhere in the last bit: a bf16 may fall to the other side
    for name in ("exp_avg", "exp_avg_sq"):
        assert (ours[name] != plain[name]).double().mean() < (1e-9 if INTERPRETED else 1e-2)
    exact = 0.999 * start()["exp_avg_sq"].double() + 0.001 * start()["grad"].double() ** 2
    drift = (ours["exp_avg_sq"].double() - exact) / exact
    assert abs(drift.mean().item()) < 5 * 2**-8 / n**0.5  # unbiased: a uniform error below one bf16 step each


@pytest.mark.parametrize("flag", [0.0, 1.0, 3.0, float("nan")])
def test_found_inf_leaves_everything_untouched(flag: float, device: torch.device) -> None:
    ours = state(1500, device, torch.bfloat16)
    if flag != 0:
        ours["grad"][7] = float("inf")
    before = clones(ours)
    out = torch.full((1500,), 5.0, dtype=torch.float16, device=device)
    adamw_(**ours, param_out=out, found_inf=torch.tensor(flag, device=device), **HYPER)
    untouched = [torch.equal(ours[name], before[name]) for name in ("master", "exp_avg", "exp_avg_sq")]
    assert [*untouched, bool((out == 5).all())] == [flag != 0] * 4


def test_a_nan_gradient_reaches_the_weights(device: torch.device) -> None:
    ours = state(100, device)
    ours["grad"][3] = float("nan")
    adamw_(**ours, **HYPER)
    assert ours["master"].isnan().nonzero().flatten().tolist() == [3]


def test_empty(device: torch.device) -> None:
    adamw_(**state(0, device), param_out=torch.empty(0, dtype=torch.bfloat16, device=device), **HYPER)


@pytest.mark.parametrize("seed", [None, 9])
def test_the_operator_is_registered_right(seed: int | None, device: torch.device) -> None:
    tensors = list(state(70, device, torch.bfloat16).values())
    scale, out = torch.tensor(0.5, device=device), torch.zeros(70, dtype=torch.bfloat16, device=device)
    numbers = (3, 1e-3, 0.9, 0.999, 1e-8, 0.1, True, True, seed, 0)
    torch.library.opcheck(torch.ops.tritonspeed.adamw_, (*tensors, scale, out, None, *numbers))
    torch.library.opcheck(
        torch.ops.tritonspeed.adamw_, (*tensors, None, None, torch.zeros_like(scale), *numbers[:8], None, 0)
    )


def test_torch_compile_takes_it_whole(device: torch.device) -> None:
    compiled, eager = state(200, device), state(200, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> Tensor:
        adamw_(master, exp_avg, exp_avg_sq, grad * 2, **HYPER)
        return master + 1

    result = step(**compiled)
    eager["grad"] = eager["grad"] * 2
    adamw_(**eager, **HYPER)
    assert torch.equal(compiled["master"], eager["master"]) and torch.equal(result, eager["master"] + 1)


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        tensors = {name: torch.empty(10**12, dtype=torch.float32) for name in ("master", "exp_avg", "exp_avg_sq")}
        grad, out = (torch.empty(10**12, dtype=torch.bfloat16) for _ in range(2))
        flag = torch.zeros(())
        adamw_(**tensors, grad=grad, grad_scale=flag, found_inf=flag, param_out=out, **HYPER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(9)}, r"grad has shape \(9,\).*must be contiguous with 8 elements"),
        ({"exp_avg": torch.zeros(16)[::2]}, r"exp_avg has shape \(8,\) and strides \(2,\)"),
        ({"master": torch.zeros(8).double()}, "master is torch.float64, must be float32"),
        ({"exp_avg_sq": torch.zeros(8).half()}, "exp_avg_sq is torch.float16, must be float32"),
        ({"grad": torch.zeros(8).int()}, "grad is torch.int32, must be float32 or bfloat16 or float16"),
        ({"param_out": torch.zeros(8)}, "param_out is torch.float32, must be bfloat16 or float16"),
        ({"grad_scale": torch.zeros(2)}, r"grad_scale has shape \(2,\).*with 1 elements"),
        ({"grad": torch.zeros(8, device="meta")}, "grad is on meta, master on cpu"),
        ({"master": torch.zeros(8, device="meta")}, "the tensors are on meta, kernels exist for cpu, cuda, xpu"),
        ({"state_rounding_seed": 1}, "exp_avg is torch.float32, must be bfloat16"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), each must be in \[0, 1\)"),
        ({"step": 0}, "step is 0, must be at least 1"),
        ({"stochastic_rounding_seed": 1}, "stochastic rounding writes a bfloat16 param_out, which is missing"),
        ({"stochastic_rounding_seed": -1, "param_out": torch.zeros(8).bfloat16()}, "seed is -1"),
        (
            {"stochastic_rounding_seed": 1, "param_out": torch.zeros(8).bfloat16(), "first_element": 6},
            "first_element is 6, must be a multiple of 4",
        ),
    ],
)
def test_errors_name_what_was_given(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_(**{**state(8), **HYPER, **change})


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    n = 2**31 + 3 * 1024 + 5
    device = torch.device("cuda")
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < n * 18:
        pytest.skip("needs a GPU with 39 GB free")
    tail = state(5000)
    tensors = {
        name: torch.zeros(n, dtype=torch.bfloat16 if name == "grad" else torch.float32, device=device) for name in tail
    }
    for name, tensor in tensors.items():
        tensor[-5000:] = tail[name].to(device)
    want = {name: tensor[-5000:].float().clone() for name, tensor in tensors.items()}
    out = torch.empty(n, dtype=torch.bfloat16, device=device)
    adamw_(**tensors, param_out=out, **HYPER)
    adamw_reference(**want, **HYPER)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(tensors[name][-5000:], want[name], **tolerance(torch.float32))
        assert not tensors[name][:-5000].any()
    assert torch.equal(out[-5000:], tensors["master"][-5000:].bfloat16())
