"""LAMB as an optimizer: fifty steps against fp64, 16-bit parameters, groups, state dicts, and its flat halves."""

import copy
from typing import Any

import pytest
import torch
from odd_parameters import give_gradients, parameters, saved_state
from tolerances import tolerance
from torch import Tensor, nn

from tritonspeed.kernels.intervals import Intervals
from tritonspeed.optim.lamb import Lamb


class Exact:
    """LAMB written down once more, as DeepSpeed has it, in fp64."""

    def __init__(self, params: list[Tensor], **settings: Any) -> None:
        self.params, self.settings, self.t = [p.detach().double() for p in params], settings, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params]

    def step(self, grads: list[Tensor]) -> None:
        s: dict[str, Any] = {
            "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_coeff": 10.0, "min_coeff": 0.01,
            "bias_correction": True, "eps_inside_sqrt": False, **self.settings,
        }  # fmt: skip
        self.t += 1
        (b1, b2), eps = s["betas"], s["eps"]
        length = s["lr"]
        if s["bias_correction"]:
            length *= (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        for p, (m, v), g in zip(self.params, self.moments, grads, strict=True):
            m.mul_(b1).add_(g.double(), alpha=1 - b1)
            v.mul_(b2).add_(g.double() ** 2, alpha=1 - b2)
            u = m / ((v + eps) ** 0.5 if s["eps_inside_sqrt"] else v**0.5 + eps) + s["weight_decay"] * p
            norm_p, norm_u = p.norm().item(), u.norm().item()
            ratio = min(max(norm_p / norm_u, s["min_coeff"]), s["max_coeff"]) if norm_p and norm_u else 1.0
            p.sub_(length * ratio * u)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 2e-3, "weight_decay": 0.1},
        {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-4, "eps_inside_sqrt": True, "bias_correction": False},
        {"lr": 1e-2, "max_coeff": 0.3, "min_coeff": 0.2},
    ],
    ids=["decay", "inside", "clamped"],
)
def test_follows_fp64_for_fifty_steps(settings: dict[str, Any]) -> None:
    ours = parameters()
    optimizer, exact = Lamb(ours, **settings), Exact(ours, **settings)
    start = [p.detach().clone() for p in ours]
    for step in range(50):
        give_gradients(ours, step)
        optimizer.step()
        exact.step([p.grad for p in ours])
    for p, want, was in zip(ours, exact.params, start, strict=True):
        torch.testing.assert_close(p.detach().double(), want, **tolerance(torch.float32, 50))
        assert not p.numel() or not torch.equal(p, was)


def test_groups_and_schedules() -> None:
    ours = parameters()
    optimizer = Lamb([{"params": ours[:2], "lr": 1e-2}, {"params": ours[2:], "weight_decay": 0.1}], lr=1e-3)
    exact = [Exact(ours[:2], lr=1e-2), Exact(ours[2:], weight_decay=0.1)]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for step in range(5):
        give_gradients(ours, step)
        optimizer.step()
        for which, group in zip(exact, optimizer.param_groups, strict=True):
            which.settings["lr"] = group["lr"]
            which.step([p.grad for p in group["params"]])
        schedule.step()
    for p, want in zip(ours, exact[0].params + exact[1].params, strict=True):
        torch.testing.assert_close(p.detach().double(), want, **tolerance(torch.float32, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_keep_an_fp32_master(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    masters = [nn.Parameter(param.detach().float()) for param in ours]
    optimizer, plain = Lamb(ours, lr=1e-4), Lamb(masters, lr=1e-4)
    for step in range(10):
        give_gradients(ours, step)
        for master, param in zip(masters, ours, strict=True):
            master.grad = param.grad.float()
        optimizer.step()
        plain.step()
    for master, param in zip(masters, ours, strict=True):
        assert torch.equal(optimizer.state[param]["master"], master)
        assert torch.equal(param, master.to(dtype))


def test_a_saved_run_goes_on_to_the_last_bit() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = Lamb(ours, lr=1e-3)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    copies = copy.deepcopy(ours)
    resumed = Lamb(copies, lr=99.0)
    resumed.load_state_dict(saved_state(optimizer))
    for step in range(3, 6):
        for params, o in ((ours, optimizer), (copies, resumed)):
            give_gradients(params, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))


def test_the_halves_over_a_flat_chunk_are_the_whole_step() -> None:
    sizes, starts = (50, 333), (0, 64)
    plain = [nn.Parameter(torch.randn(size)) for size in sizes]
    flat = nn.Parameter(torch.zeros(400))
    with torch.no_grad():
        for p, start in zip(plain, starts, strict=True):
            flat[start : start + p.numel()] = p
    ordinary, by_chunk, scale = Lamb(plain, lr=1e-2), Lamb([flat], lr=1e-2), torch.tensor(0.5)
    intervals = Intervals.of([(s, s + n) for s, n in zip(starts, sizes, strict=True)], flat.device)
    copy_out = torch.zeros(400, dtype=torch.bfloat16)
    for step in range(3):
        give_gradients(plain, step)
        grad = torch.zeros(400)
        for p, start in zip(plain, starts, strict=True):
            grad[start : start + p.numel()] = 2 * p.grad
        ordinary.step()
        norms = by_chunk.measure_flat_(flat, grad, scale, intervals)
        by_chunk.step_scaled_(flat, norms, intervals, copy_out)
    for p, start in zip(plain, starts, strict=True):
        assert torch.equal(flat[start : start + p.numel()], p)
        assert torch.equal(copy_out[start : start + p.numel()], p.bfloat16())
    assert by_chunk.state[flat]["step"].item() == 3


def test_says_what_does_not_fit() -> None:
    x = [nn.Parameter(torch.randn(3))]
    with pytest.raises(ValueError, match="Lamb: max_coeff is 0.1, less than min_coeff 0.2"):
        Lamb(x, max_coeff=0.1, min_coeff=0.2)
    with pytest.raises(ValueError, match="Lamb: lr is -1"):
        Lamb(x, lr=-1)
    with pytest.raises(ValueError, match="float64, must be float32"):
        Lamb([nn.Parameter(torch.randn(3).double())])
