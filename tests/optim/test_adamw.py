"""AdamW as an optimizer: torch's numbers, its contract (groups, schedulers, state dicts), and the flat step."""

import copy
from typing import Any

import pytest
import torch
from odd_parameters import give_gradients, parameters, saved_state
from tolerances import tolerance
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels.rounding import round_stochastic_reference
from tritonspeed.optim import AdamW


@pytest.mark.parametrize("decoupled", [True, False])
def test_follows_torch_through_groups_and_a_schedule(decoupled: bool) -> None:
    ours, exact = parameters(), parameters(torch.float64)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "betas": (0.8, 0.99)}]

    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = AdamW(groups(ours), decoupled=decoupled, **options)
    torchs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(exact), **options)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20) for o in (optimizer, torchs)]
    for step in range(20):
        give_gradients(ours, step)
        for a, b in zip(ours, exact, strict=True):
            b.grad = a.grad.double()
        for o, schedule in zip((optimizer, torchs), schedules, strict=True):
            o.step()
            schedule.step() if step < 19 else None
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), **tolerance(torch.float32, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_keep_an_fp32_master(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    masters = [nn.Parameter(param.detach().float()) for param in ours]
    optimizer = AdamW(ours, lr=1e-4)
    plain = AdamW(masters, lr=1e-4)
    for step in range(10):  # steps far below a bf16 parameter's resolution
        give_gradients(ours, step)
        for master, param in zip(masters, ours, strict=True):
            master.grad = param.grad.float()
        optimizer.step()
        plain.step()
    for master, param in zip(masters, ours, strict=True):
        assert torch.equal(optimizer.state[param]["master"], master)
        assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_run_goes_on_to_the_last_bit(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    optimizer = AdamW(ours, lr=1e-3, stochastic_rounding=True, rounding_seed=5)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    copies = copy.deepcopy(ours)
    resumed = AdamW(copies, lr=99.0)
    resumed.load_state_dict(saved_state(optimizer))
    for state in resumed.state.values():
        assert {t.dtype for t in state.values()} == {torch.float32}
    for step in range(3, 6):
        for params, o in ((ours, optimizer), (copies, resumed)):
            give_gradients(params, step)
            o.step()
    for a, b in zip(ours, copies, strict=True):
        assert torch.equal(a, b)


def test_the_flat_step_is_the_ordinary_one_with_scale_and_copy() -> None:
    flat, plain = (nn.Parameter(torch.linspace(-1, 1, 1030)) for _ in range(2))
    by_chunk, ordinary = AdamW([flat], lr=1e-2), AdamW([plain], lr=1e-2)
    scale, copy_out = torch.tensor(0.5), torch.empty(1030, dtype=torch.bfloat16)
    for step in range(3):
        grad = torch.randn(1030, generator=torch.Generator().manual_seed(step)).bfloat16()
        by_chunk.param_groups[0]["lr"] = ordinary.param_groups[0]["lr"] = 1e-2 / (step + 1)
        by_chunk.step_flat_(flat, grad, grad_scale=scale, param_out=copy_out)
        plain.grad = grad.float() * 0.5
        ordinary.step()
    assert torch.equal(flat, plain) and torch.equal(copy_out, plain.bfloat16())
    state = by_chunk.state[flat]
    assert state["step"].dtype == torch.float32 and state["step"].item() == 3
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_shards_round_at_random_as_the_whole_does() -> None:
    n, cut = 4096, 1024
    whole = nn.Parameter(torch.randn(n))
    shards = [nn.Parameter(whole.detach()[:cut].clone()), nn.Parameter(whole.detach()[cut:].clone())]
    grad, out, pieces = torch.randn(n), *(torch.empty(n, dtype=torch.bfloat16) for _ in range(2))
    AdamW([whole], stochastic_rounding=True).step_flat_(whole, grad, param_out=out)
    for shard, (a, b) in zip(shards, ((0, cut), (cut, n)), strict=True):
        optimizer = AdamW([shard], stochastic_rounding=True)  # one rank's: its shard is its first parameter
        optimizer.step_flat_(shard, grad[a:b], param_out=pieces[a:b], first_element=a)
    assert torch.equal(out, pieces)
    assert not torch.equal(out, whole.bfloat16())


def test_every_step_and_parameter_rounds_with_other_bits() -> None:
    n = 4096
    optimizer = AdamW([nn.Parameter(torch.zeros(n)) for _ in range(2)], lr=0.0, stochastic_rounding=True)
    seen = []
    for _ in range(2):
        for param in optimizer.param_groups[0]["params"]:
            with torch.no_grad():
                param.fill_(1 + 2**-8)  # between two bf16 values: a coin per element
            out = torch.empty(n, dtype=torch.bfloat16)
            optimizer.step_flat_(param, torch.zeros(n), param_out=out)
            seen.append(out > 1)
    for i, a in enumerate(seen):
        for b in seen[:i]:
            # independent coins agree on half of n: five standard deviations
            assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / n**0.5
    assert not torch.equal(seen[0], round_stochastic_reference(torch.full((n,), 1 + 2**-8), seed=0) > 1)


def test_a_closure_and_absent_gradients() -> None:
    param, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([param, idle])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (param < 1).all() and torch.equal(idle, torch.ones(3)) and idle not in optimizer.state
    param.grad = torch.ones(()).expand(3)  # stride 0
    optimizer.step()


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        param = nn.Parameter(torch.empty(10**11))
        optimizer = AdamW([param])
        for _ in range(2):
            grad, out = (torch.empty(10**11, dtype=torch.bfloat16) for _ in range(2))
            optimizer.step_flat_(param, grad, grad_scale=torch.ones(()), param_out=out)
        assert optimizer.state[param]["exp_avg"].numel() == 10**11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, must not be negative"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), each must be in \[0, 1\)"),
    ],
)
def test_errors_name_what_was_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(2))], **options)


def test_tensors_that_do_not_belong_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) is torch.float64, must be float32, bfloat16 or float16"):
        AdamW([nn.Parameter(torch.zeros(2).double())])
    optimizer = AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) is in none of the 1 param_groups"):
        optimizer.step_flat_(torch.zeros(3), torch.zeros(3))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(4, 2\) is sparse: set sparse=False"):
        AdamW(embedding.parameters()).step()
