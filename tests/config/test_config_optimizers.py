"""The tables of optimizers and schedules, held to torch's signatures and to what `optim` builds."""

import inspect

import pytest
import torch

from tritonspeed.config.optimizers import (
    LAST,
    OWN_DEFAULTS,
    REFUSED,
    SCHEDULES,
    TORCH_DEFAULTS,
    TORCH_SCHEDULES,
    TORCH_SHARED,
)
from tritonspeed.optim.build import build_optimizer, build_scheduler
from tritonspeed.optim.schedules import SCHEDULES as BUILT


def signature(cls):
    """Names and defaults after the first parameter; None where a value is required."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


@pytest.mark.parametrize("name", TORCH_DEFAULTS)
def test_torchs_optimizers_have_these_parameters(name):
    own = {k: v for k, v in signature(getattr(torch.optim, name)).items() if k not in TORCH_SHARED}
    assert TORCH_DEFAULTS[name] == own


def test_our_adagrad_has_torchs_defaults():
    own = {k: v for k, v in signature(torch.optim.Adagrad).items() if k not in TORCH_SHARED}
    assert own.items() <= OWN_DEFAULTS["Adagrad"].items()


def test_every_optimizer_of_torch_is_answered():
    classes = {
        name
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer) and member is not torch.optim.Optimizer
    }
    assert classes <= set(OWN_DEFAULTS) | set(TORCH_DEFAULTS) | set(REFUSED)


@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_torchs_schedules_have_these_parameters(name):
    own = {k: v for k, v in signature(getattr(torch.optim.lr_scheduler, name)).items() if k not in LAST}
    assert TORCH_SCHEDULES[name] == pytest.approx(own)


@pytest.mark.parametrize("name", SCHEDULES)
def test_deepspeeds_schedules_have_these_parameters(name):
    own = {k: v for k, v in signature(BUILT[name]).items() if k not in LAST}
    assert SCHEDULES[name] == own


@pytest.mark.parametrize("name", [*OWN_DEFAULTS, *TORCH_DEFAULTS])
def test_what_the_config_accepts_can_be_built(name):
    weight = torch.nn.Parameter(torch.zeros(3))
    assert build_optimizer(name, (OWN_DEFAULTS | TORCH_DEFAULTS)[name], [weight]).param_groups


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_config_refuses_cannot_be_built(name):
    with pytest.raises(ValueError, match=name):
        build_optimizer(name, {}, [torch.nn.Parameter(torch.zeros(3))])


def test_a_schedule_without_its_number_of_steps_is_refused_when_built():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1)
    with pytest.raises(ValueError, match="total_num_steps"):
        build_scheduler("WarmupDecayLR", {"warmup_num_steps": 1}, optimizer)
