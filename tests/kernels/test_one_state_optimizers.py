"""Lion and Adagrad on a flat chunk: CPU form, interpreter and GPU against plain fp64 mathematics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import relative_error, tolerance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels import adagrad_, lion_
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.adagrad import adagrad_reference
from tritonspeed.kernels.flat_update import CPU_CHUNK_ELEMS
from tritonspeed.kernels.lion import lion_reference
from tritonspeed.kernels.rounding import round_stochastic_reference

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 64, 1000, 1023, 1024, 1025, 4099]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rule:
    """One optimizer: its operation, its reference, the name of its state and its numbers.

    ``numbers`` are the operator's, from ``found_inf`` to the seed.
    """

    run: Callable[..., None]
    reference: Callable[..., None]
    state: str
    hyper: dict[str, Any]
    op: str
    numbers: tuple[Any, ...]


RULES = {
    "lion": Rule(
        lion_, lion_reference, "exp_avg", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, "lion_",
        (1e-3, 0.9, 0.99, 0.1),
    ),
    "adagrad": Rule(
        adagrad_, adagrad_reference, "sum_of_squares",
        {"step": 3, "lr": 1e-2, "lr_decay": 0.1, "eps": 1e-10, "weight_decay": 0.1}, "adagrad_",
        (3, 1e-2, 0.1, 1e-10, 0.1),
    ),
    "adagrad, no decay": Rule(
        adagrad_, adagrad_reference, "sum_of_squares",
        {"step": 1, "lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}, "adagrad_",
        (1, 1e-2, 0.0, 1e-10, 0.0),
    ),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def tensors(rule: Rule, n: int, device: torch.device = CPU, grad_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A chunk in the middle of training, the same numbers on every device."""
    generator = torch.Generator().manual_seed(n)
    master, state, grad = (torch.randn(n, generator=generator) for _ in range(3))
    made = {"master": master, rule.state: state.abs() * 0.1, "grad": grad.to(grad_dtype)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def clones(given: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.clone() if dtype is None else tensor.to(dtype) for name, tensor in given.items()}


@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_equals_fp64(rule: Rule, grad_dtype: torch.dtype, device: torch.device) -> None:
    for n in SIZES:
        ours = tensors(rule, n, device, grad_dtype)
        plain, exact = clones(ours), clones(ours, torch.float64)
        scale = torch.tensor(0.37, device=device)
        out = torch.empty(n, dtype=torch.bfloat16, device=device)
        rule.run(**ours, grad_scale=scale, param_out=out, **rule.hyper)
        rule.reference(**plain, grad_scale=scale, **rule.hyper)
        rule.reference(**exact, grad_scale=scale.double(), **rule.hyper)
        for name in ("master", rule.state):
            ours_error, plain_error = (relative_error(t[name], exact[name]) for t in (ours, plain))
            assert ours_error <= 2 * plain_error + tolerance(torch.float32)["rtol"], (name, n)
            torch.testing.assert_close(ours[name], plain[name], **tolerance(torch.float32))
        assert torch.equal(ours[rule.state], plain[rule.state])
        assert torch.equal(out, ours["master"].bfloat16()), n
        assert torch.equal(ours["grad"], plain["grad"])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 3000),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    out_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
    offset=st.integers(0, 5),
)
def test_any_combination_equals_the_reference(
    rule: Rule, n: int, grad_dtype: torch.dtype, out_dtype: torch.dtype | None, scaled: bool, offset: int
) -> None:
    whole = tensors(rule, n + offset, grad_dtype=grad_dtype)
    ours = {name: tensor[offset:] for name, tensor in whole.items()}  # pointers on no 16-byte boundary
    plain = clones(ours)
    out = None if out_dtype is None else torch.empty(n, dtype=out_dtype)
    scale = torch.tensor(1e-2) if scaled else None
    rule.run(**ours, grad_scale=scale, param_out=out, **rule.hyper)
    rule.reference(**plain, grad_scale=scale, **rule.hyper)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], **tolerance(torch.float32))
    if out is not None:
        assert torch.equal(out, ours["master"].to(out.dtype))


@pytest.mark.parametrize("cuts", [(1024, 5 * 1024), (1, 64, 777, 5009)], ids=["at_1024", "odd"])
def test_cuts_change_no_bit(rule: Rule, cuts: tuple[int, ...], device: torch.device) -> None:
    n = 10_007 if INTERPRETED else CPU_CHUNK_ELEMS + 10_007
    whole = tensors(rule, n, device, torch.bfloat16)
    pieces = clones(whole)
    out, out_of_pieces = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    scale = torch.tensor(0.3, device=device)
    torch.set_num_threads(2)
    rule.run(**whole, grad_scale=scale, param_out=out, **rule.hyper)
    torch.set_num_threads(1)
    for a, b in zip((0, *cuts), (*cuts, n), strict=True):
        piece = {name: tensor[a:b] for name, tensor in pieces.items()}
        rule.run(**piece, grad_scale=scale, param_out=out_of_pieces[a:b], **rule.hyper)
    for name in whole:
        assert torch.equal(whole[name], pieces[name]), name
    assert torch.equal(out, out_of_pieces)


def test_stochastic_rounding_is_the_references_and_follows_the_element(
    rule: Rule, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonspeed.kernels.flat_update.CPU_CHUNK_ELEMS", 1024)  # several chunks of 3,001 elements
    n, first, seed = 3001, 2**33 + 4, 2**45 + 11
    ours = tensors(rule, n, device)
    pieces = clones(ours)
    out, out_of_pieces = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    options = {**rule.hyper, "stochastic_rounding_seed": seed}
    rule.run(**ours, param_out=out, first_element=first, **options)
    for a, b in ((0, 1200), (1200, 1204), (1204, n)):
        piece = {name: tensor[a:b] for name, tensor in pieces.items()}
        rule.run(**piece, param_out=out_of_pieces[a:b], first_element=first + a, **options)
    assert torch.equal(out, out_of_pieces)
    assert torch.equal(out.cpu(), round_stochastic_reference(ours["master"].cpu(), seed, first))
    assert not torch.equal(out, ours["master"].bfloat16())


@pytest.mark.parametrize("flag", [0.0, 1.0, float("nan")])
def test_found_inf_leaves_everything_untouched(rule: Rule, flag: float, device: torch.device) -> None:
    ours = tensors(rule, 1500, device, torch.bfloat16)
    before = clones(ours)
    out = torch.full((1500,), 5.0, dtype=torch.float16, device=device)
    rule.run(**ours, param_out=out, found_inf=torch.tensor(flag, device=device), **rule.hyper)
    untouched = [torch.equal(ours[name], before[name]) for name in ("master", rule.state)]
    assert [*untouched, bool((out == 5).all())] == [flag != 0] * 3


def test_a_nan_gradient_reaches_the_weights_and_zero_moves_nothing(rule: Rule, device: torch.device) -> None:
    for run in (rule.run, rule.reference):
        ours = tensors(rule, 100, device)
        ours["grad"].zero_()
        ours[rule.state].zero_()
        ours["grad"][3] = float("nan")
        before = ours["master"].clone()
        run(**ours, **{**rule.hyper, "weight_decay": 0.0})
        assert ours["master"].isnan().nonzero().flatten().tolist() == [3]
        assert torch.equal(ours["master"][4:], before[4:])


def test_empty_and_fake_tensors(rule: Rule, device: torch.device) -> None:
    rule.run(**tensors(rule, 0, device), param_out=torch.empty(0, dtype=torch.bfloat16, device=device), **rule.hyper)
    with FakeTensorMode():
        made = {name: torch.empty(10**12) for name in ("master", rule.state)}
        grad, out = (torch.empty(10**12, dtype=torch.bfloat16) for _ in range(2))
        rule.run(**made, grad=grad, grad_scale=torch.ones(()), found_inf=torch.ones(()), param_out=out, **rule.hyper)


@pytest.mark.parametrize("seed", [None, 9])
def test_the_operator_is_registered_right(rule: Rule, seed: int | None, device: torch.device) -> None:
    made = list(tensors(rule, 70, device, torch.bfloat16).values())
    scale, out = torch.tensor(0.5, device=device), torch.zeros(70, dtype=torch.bfloat16, device=device)
    op = getattr(torch.ops.tritonspeed, rule.op)
    torch.library.opcheck(op, (*made, scale, out, None, *rule.numbers, seed, 0))
    torch.library.opcheck(op, (*made, None, None, torch.zeros_like(scale), *rule.numbers, None, 0))


def test_torch_compile_takes_it_whole(rule: Rule, device: torch.device) -> None:
    compiled, eager = tensors(rule, 200, device), tensors(rule, 200, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(master: Tensor, state: Tensor, grad: Tensor) -> Tensor:
        rule.run(master, state, grad * 2, **rule.hyper)
        return master + 1

    result = step(*compiled.values())
    eager["grad"] = eager["grad"] * 2
    rule.run(**eager, **rule.hyper)
    assert torch.equal(compiled["master"], eager["master"]) and torch.equal(result, eager["master"] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(9)}, r"grad has shape \(9,\).*must be contiguous with 8 elements"),
        ({"master": torch.zeros(8).double()}, "master is torch.float64, must be float32"),
        ({"grad": torch.zeros(8).int()}, "grad is torch.int32, must be float32 or bfloat16 or float16"),
        ({"param_out": torch.zeros(8)}, "param_out is torch.float32, must be bfloat16 or float16"),
        ({"grad_scale": torch.zeros(2)}, r"grad_scale has shape \(2,\).*with 1 elements"),
        ({"grad": torch.zeros(8, device="meta")}, "grad is on meta, master on cpu"),
        ({"stochastic_rounding_seed": 1}, "stochastic rounding writes a bfloat16 param_out, which is missing"),
    ],
)
def test_errors_name_what_was_given(rule: Rule, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{rule.op}: {message}"):
        rule.run(**{**tensors(rule, 8), **rule.hyper, **change})


def test_numbers_out_of_range_are_refused(rule: Rule) -> None:
    change = {"betas": (0.9, 1.0)} if rule.op == "lion_" else {"step": 0}
    message = r"betas are \(0.9, 1.0\)" if rule.op == "lion_" else "step is 0, must be at least 1"
    with pytest.raises(ValueError, match=message):
        rule.run(**tensors(rule, 8), **{**rule.hyper, **change})


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(rule: Rule) -> None:
    n = 2**31 + 5000
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 13 * n:
        pytest.skip("needs a GPU with 30 GB free")
    master, state = (torch.zeros(n, device="cuda") for _ in range(2))
    grad = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    grad[-5000:] = 1
    rule.run(master, state, grad, **rule.hyper)
    want = {"master": torch.zeros(5000), rule.state: torch.zeros(5000), "grad": torch.ones(5000)}
    rule.reference(**want, **rule.hyper)
    torch.testing.assert_close(master[-5000:].cpu(), want["master"], **tolerance(torch.float32))
    assert not master[:-5000].any()
