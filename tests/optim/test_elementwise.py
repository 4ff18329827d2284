"""Lion and Adagrad as optimizers, and what all elementwise ones share: trajectories, state dicts, flat steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_parameters import give_gradients, parameters, saved_state
from tolerances import tolerance
from torch import Tensor, nn

from tritonspeed.optim import Adagrad, AdamW, Lion

LION = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
ADAGRAD = {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.05, "initial_accumulator_value": 0.1, "eps": 1e-8}


class ExactLion(torch.optim.Optimizer):
    """The paper's algorithm 2, in the parameters' own type."""

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(m * beta1 + p.grad * (1 - beta1))
                p -= group["lr"] * (update + group["weight_decay"] * p)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "lion": (Lion, ExactLion, LION),
    "adagrad": (Adagrad, torch.optim.Adagrad, ADAGRAD),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_a_hundred_steps_follow_fp64_through_groups_and_a_schedule(name: str, seed: int) -> None:
    make, make_exact, options = MAKERS[name]
    ours = parameters(seed=seed)
    exact = [nn.Parameter(p.detach().double()) for p in ours]

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": options["lr"] * 0.5}]

    optimizers = [make(groups(ours), **options), make_exact(groups(exact), **options)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=100) for o in optimizers]
    for step in range(100):
        give_gradients(ours, 1000 * seed + step)
        for a, b in zip(ours, exact, strict=True):
            b.grad = a.grad.double()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), **tolerance(torch.float32, 100))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_run_goes_on_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    make, _, options = MAKERS[name]
    ours = parameters(dtype=dtype)
    optimizer = make(ours, stochastic_rounding=True, rounding_seed=5, **options)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    copies = copy.deepcopy(ours)
    resumed = make(copies, lr=99.0)
    resumed.load_state_dict(saved_state(optimizer))
    assert all({t.dtype for t in state.values()} == {torch.float32} for state in resumed.state.values())
    twin = copy.deepcopy(optimizer)
    for step in range(3, 6):
        for params, o in ((ours, optimizer), (copies, resumed), (twin.param_groups[0]["params"], twin)):
            give_gradients(params, step)
            o.step()
    for a, b, c in zip(ours, copies, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", MAKERS)
def test_the_flat_step_is_the_ordinary_one_with_scale_and_copy(name: str) -> None:
    make, _, options = MAKERS[name]
    flat, plain = (nn.Parameter(torch.linspace(-1, 1, 1030)) for _ in range(2))
    by_chunk, ordinary = make([flat], **options), make([plain], **options)
    scale, out = torch.tensor(0.5), torch.empty(1030, dtype=torch.bfloat16)
    for step in range(3):
        grad = torch.randn(1030, generator=torch.Generator().manual_seed(step)).bfloat16()
        by_chunk.step_flat_(flat, grad, grad_scale=scale, param_out=out)
        plain.grad = grad.float() * 0.5
        ordinary.step()
    assert torch.equal(flat, plain) and torch.equal(out, plain.bfloat16())
    state = by_chunk.state[flat]
    assert set(state) == {"step", *make.STATES} and state["step"].item() == 3


@pytest.mark.parametrize("name", MAKERS)
def test_shards_round_at_random_as_the_whole_does(name: str) -> None:
    make, _, options = MAKERS[name]
    n, cut = 4096, 1024
    whole = nn.Parameter(torch.randn(n))
    shards = [nn.Parameter(whole.detach()[:cut].clone()), nn.Parameter(whole.detach()[cut:].clone())]
    grad, out, pieces = torch.randn(n), *(torch.empty(n, dtype=torch.bfloat16) for _ in range(2))
    make([whole], stochastic_rounding=True, **options).step_flat_(whole, grad, param_out=out)
    for shard, (a, b) in zip(shards, ((0, cut), (cut, n)), strict=True):
        optimizer = make([shard], stochastic_rounding=True, **options)
        optimizer.step_flat_(shard, grad[a:b], param_out=pieces[a:b], first_element=a)
    assert torch.equal(out, pieces) and not torch.equal(out, whole.bfloat16())


LOW_BIT = {"bf16": 0.01, "8bit": 0.05}
"""How far weights may end from those of fp32 moments, relative to the way they went."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("state", LOW_BIT)
def test_moments_in_fewer_bits_stay_near_fp32(state: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, start = torch.randn(64, 80, generator=generator), torch.randn(64, 80, generator=generator)
    ends = []
    for kind in ("fp32", state):
        param = nn.Parameter(start.clone())
        optimizer, noise = AdamW([param], lr=1e-2, state=kind), torch.Generator().manual_seed(seed + 10)
        for _ in range(200):
            param.grad = param.detach() - target + 0.5 * torch.randn(64, 80, generator=noise)
            optimizer.step()
        ends.append(param.detach())
    way = (ends[0] - start).norm()
    assert 0 < (ends[1] - ends[0]).norm() < LOW_BIT[state] * way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", LOW_BIT)
def test_moments_in_fewer_bits_are_saved_as_they_are(state: str, dtype: torch.dtype) -> None:
    sizes = {"bf16": torch.bfloat16, "8bit": torch.uint8}
    params = [nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)) for n in (4100, 100)]
    optimizer = AdamW(params, state=state)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    copies = copy.deepcopy(params)
    resumed = AdamW(copies)
    resumed.load_state_dict(saved_state(optimizer))
    kept = resumed.state[copies[0]]
    assert kept["exp_avg_sq" if state == "bf16" else "exp_avg_sq_code"].dtype == sizes[state]
    assert resumed.state[copies[1]]["exp_avg"].dtype == (torch.bfloat16 if state == "bf16" else torch.float32)
    assert "master" not in kept or kept["master"].dtype == torch.float32
    for step in range(2, 5):
        for some, o in ((params, optimizer), (copies, resumed)):
            give_gradients(some, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_a_state_dict_of_torch_is_taken() -> None:
    params, copies = parameters(), parameters()
    theirs, ours = torch.optim.AdamW(params, lr=1e-2), AdamW(copies, lr=1.0)
    give_gradients(params, 0)
    theirs.step()
    for a, b in zip(copies, params, strict=True):
        a.data.copy_(b.data)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # as from a file: torch shares what is not copied
    for some, o in ((params, theirs), (copies, ours)):
        give_gradients(some, 1)
        o.step()
    for a, b in zip(copies, params, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32, 2))


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(ValueError, match="AdamW: state is '4bit', must be one of fp32, bf16, 8bit"):
        AdamW([nn.Parameter(torch.zeros(2))], state="4bit")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Lion, {"lr": -1.0}, "Lion: lr is -1.0, must not be negative"),
        (Lion, {"betas": (0.9, 1.0)}, r"Lion: betas are \(0.9, 1.0\), each must be in \[0, 1\)"),
        (Lion, {"weight_decay": -1.0}, "Lion: weight_decay is -1.0"),
        (Adagrad, {"lr_decay": -1.0}, "Adagrad: lr_decay is -1.0"),
        (Adagrad, {"eps": -1.0}, "Adagrad: eps is -1.0"),
        (Adagrad, {"initial_accumulator_value": -1.0}, "Adagrad: initial_accumulator_value is -1.0"),
    ],
)
def test_errors_name_what_was_given(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("make", [Lion, Adagrad])
def test_tensors_that_do_not_belong_are_refused(make: Callable[..., Any]) -> None:
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name}: a parameter of shape \(2,\) is torch.float64"):
        make([nn.Parameter(torch.zeros(2).double())])
    optimizer = make([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=rf"{name}: a tensor of shape \(3,\) is in none of the 1 param_groups"):
        optimizer.step_flat_(torch.zeros(3), torch.zeros(3))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=rf"{name}: the gradient of a parameter of shape \(4, 2\) is sparse"):
        make(embedding.parameters()).step()


def test_a_nan_gradient_is_seen_in_the_weights() -> None:
    for make in (Lion, Adagrad):
        param = nn.Parameter(torch.ones(3))
        param.grad = Tensor([1.0, float("nan"), 1.0])
        make([param]).step()
        assert param.isnan().tolist() == [False, True, False]
