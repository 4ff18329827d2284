"""Muon as an optimizer: torch's numbers over fifty steps, which parameters are whose, and its contract."""

import copy
import math
from typing import Any

import pytest
import torch
from models import Net
from odd_parameters import give_gradients, saved_state
from tolerances import tolerance
from torch import Tensor, nn

from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.newton_schulz import newton_schulz_reference
from tritonspeed.optim import muon as muon_module
from tritonspeed.optim.muon import Muon, mark_hidden_matrices, shape_factor

NUM_STEPS = 3 if INTERPRETED else 50  # a step of these is 75 launches, the interpreter's third of a second
SHAPES = ((17, 33), (33, 17), (17, 33), (1, 9), (20, 20))


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


class Exact:
    """torch.optim.Muon's maths written down once more, all of it in fp64."""

    def __init__(self, params: list[Tensor], nesterov: bool, adjust: str | None, lr: float, decay: float) -> None:
        self.params, self.nesterov, self.adjust, self.lr, self.decay = params, nesterov, adjust, lr, decay
        self.params = [p.detach().double() for p in params]
        self.momenta = [torch.zeros_like(p) for p in self.params]

    def step(self, grads: list[Tensor], beta: float = 0.95) -> None:
        for p, m, g in zip(self.params, self.momenta, (g.double() for g in grads), strict=True):
            m.mul_(beta).add_(g, alpha=1 - beta)
            d = (1 - beta) * g + beta * m if self.nesterov else m
            rows, cols = p.shape
            factor = 0.2 * math.sqrt(max(rows, cols)) if self.adjust else math.sqrt(max(1.0, rows / cols))
            p.mul_(1 - self.lr * self.decay).sub_(self.lr * factor * newton_schulz_reference(d))


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_fp64_for_fifty_steps(nesterov: bool, adjust: str | None) -> None:
    """In fp32 all along; five iterations multiply an error by up to 3.4445⁵ where a singular value is small."""
    ours = matrices()
    optimizer = Muon(ours, lr=0.02, nesterov=nesterov, adjust_lr_fn=adjust, ns_dtype="fp32")
    exact = Exact(ours, nesterov, adjust, 0.02, 0.1)
    for step in range(NUM_STEPS):
        give_gradients(ours, step)
        optimizer.step()
        exact.step([p.grad for p in ours])
    for p, want in zip(ours, exact.params, strict=True):
        torch.testing.assert_close(p.detach().double(), want, **tolerance(torch.float32, NUM_STEPS, magnitude=10))


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_is_as_near_to_fp64_as_torch_for_fifty_steps(adjust: str | None) -> None:
    """The default, bf16, which is all that torch.optim.Muon has."""
    ours, theirs = matrices(), [nn.Parameter(p.detach().double()) for p in matrices()]
    optimizer = Muon(ours, lr=0.02, adjust_lr_fn=adjust)
    torchs = torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust)
    exact = Exact(ours, True, adjust, 0.02, 0.1)
    for step in range(NUM_STEPS):
        give_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.double()
        optimizer.step()
        torchs.step()
        exact.step([p.grad for p in ours])
    for a, b, want in zip(ours, theirs, exact.params, strict=True):
        error, torchs_error = (a.detach() - want).norm(), (b.detach() - want).norm()
        assert error <= 2 * torchs_error and torchs_error < 0.05 * want.norm()


def test_what_is_no_matrix_goes_to_adamw() -> None:
    others = [nn.Parameter(torch.randn(shape)) for shape in ((7,), (2, 3, 4))]
    twins = [nn.Parameter(p.detach().double()) for p in others]
    optimizer = Muon([*matrices(), *others], lr=0.5, muon_lr=0.02, adam_lr=1e-2, weight_decay=0.1)
    torchs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        (True, 0.02, 5),
        (False, 1e-2, 2),
    ]
    for step in range(20):
        give_gradients(others, step)
        for a, b in zip(others, twins, strict=True):
            b.grad = a.grad.double()
        optimizer.step()
        torchs.step()
    for a, b in zip(others, twins, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), **tolerance(torch.float32, 20))
    assert set(optimizer.state[others[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_states_of_matrices_and_the_batches_they_go_in(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for limit in (1, 2**20):  # alone, and with those of one shape
        monkeypatch.setattr(muon_module, "BATCH_ELEMS", limit)
        ours = matrices()
        optimizer = Muon(ours, lr=0.02)
        for step in range(3):
            give_gradients(ours, step)
            optimizer.step()
        runs.append(ours)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    state = optimizer.state[ours[0]]
    assert set(state) == {"step", "momentum_buffer"} and state["momentum_buffer"].shape == SHAPES[0]
    monkeypatch.setattr(muon_module, "BATCH_ELEMS", 2 * 17 * 33)
    assert muon_module.batches_of([(17, 33), (33, 17), (17, 33), (17, 33)]) == [[0, 2], [3], [1]]


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_are_found_by_name_and_by_type(tied: bool) -> None:
    model = Net(tied=tied)
    model.lm_head, model.table = model.head, model.embed
    del model.head
    model.blocks[0].mix.weight.use_muon = False
    mark_hidden_matrices(model)
    hidden = {name for name, p in model.named_parameters() if p.use_muon}
    assert hidden == {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("mix", "up", "down")} - {
        "blocks.0.mix.weight"
    }
    optimizer = Muon(model.parameters())
    assert [len(g["params"]) for g in optimizer.param_groups] == [8, len(list(model.parameters())) - 8]


def test_groups_say_it_themselves() -> None:
    a, b = matrices()[:2]
    groups = [{"params": [a], "use_muon": False, "betas": (0.5, 0.6)}, {"params": b, "use_muon": True, "lr": 3.0}]
    optimizer = Muon(groups, lr=0.1, muon_lr=0.2)
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(False, 0.1), (True, 3.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_keep_an_fp32_master(dtype: torch.dtype) -> None:
    ours = [*matrices(dtype), nn.Parameter(torch.randn(5).to(dtype))]
    with torch.no_grad():
        ours[0].set_(ours[0].mT.contiguous().mT)  # not contiguous
    masters = [nn.Parameter(param.detach().float()) for param in ours]
    optimizer, plain = Muon(ours, lr=1e-4), Muon(masters, lr=1e-4)
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
    ours = [*matrices(torch.bfloat16), nn.Parameter(torch.randn(5).bfloat16())]
    optimizer = Muon(ours, lr=1e-3)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    copies = copy.deepcopy(ours)
    resumed = Muon(copies, lr=99.0)
    resumed.load_state_dict(saved_state(optimizer))
    for step in range(3, 6):
        for params, o in ((ours, optimizer), (copies, resumed)):
            give_gradients(params, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))


def test_schedules_scale_both_kinds() -> None:
    optimizer = Muon([*matrices(), nn.Parameter(torch.randn(5))], muon_lr=0.02, adam_lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [0.01, 0.0005]
    assert shape_factor((8, 2), None) == 2 and shape_factor((2, 8), "original") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"adjust_lr_fn": "x"}, "adjust_lr_fn is 'x', must be one of original, match_rms_adamw"),
        ({"ns_dtype": "fp8"}, "ns_dtype is 'fp8', must be one of bf16, fp16, fp32"),
        ({"adam_eps": -1.0}, "adam_eps is -1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_says_what_does_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Muon(matrices(), **settings)
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix"):
        Muon([{"params": [nn.Parameter(torch.randn(3))], "use_muon": True}])
    with pytest.raises(ValueError, match="ns_dtype is 'fp32' in a group and 'bf16' in the constructor"):
        Muon([{"params": matrices(), "ns_dtype": "fp32"}])


def test_a_copy_goes_on_to_the_last_bit() -> None:
    ours = matrices()
    optimizer = Muon(ours)
    give_gradients(ours, 0)
    optimizer.step()
    copies, other = copy.deepcopy((ours, optimizer))
    for params, o in ((ours, optimizer), (copies, other)):
        give_gradients(params, 1)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))
