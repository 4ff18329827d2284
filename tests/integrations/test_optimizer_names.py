"""DeepSpeed's optimizer classes: its arguments in its order, with its defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import tritonspeed as ts
from tritonspeed.integrations import optimizers

ADAM = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8}
LION = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0}
SIGNATURES: dict[str, dict[str, Any]] = {  # read in DeepSpeed 0.19.8
    "FusedAdam": {**ADAM, "adam_w_mode": True, "weight_decay": 0, "amsgrad": False, "set_grad_none": True},
    "DeepSpeedCPUAdam": {
        **ADAM,
        "weight_decay": 0,
        "amsgrad": False,
        "adamw_mode": True,
        "fp32_optimizer_states": True,
    },
    "DeepSpeedCPUAdagrad": {
        "lr": 1e-2,
        "eps": 1e-10,
        "weight_decay": 0,
        "amsgrad": False,
        "fp32_optimizer_states": True,
    },
    "FusedLion": {**LION, "set_grad_none": True},
    "DeepSpeedCPULion": {**LION, "fp32_optimizer_states": True},
    "FusedLamb": {
        **ADAM,
        "eps_inside_sqrt": False,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "max_coeff": 10,
        "min_coeff": 0.01,
        "amsgrad": False,
    },
}
NATIVE = {"Adam": ts.optim.AdamW, "Adagrad": ts.optim.Adagrad, "Lion": ts.optim.Lion, "Lamb": ts.optim.Lamb}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults(name: str) -> None:
    made = getattr(optimizers, name)
    parameters = list(inspect.signature(made).parameters.values())
    assert parameters[0].name == ("model_params" if "CPU" in name else "params")
    found = {p.name: p.default for p in parameters[1:] if p.name != "adamw_mode" or "Adam" in name}
    assert list(found.items()) == list(SIGNATURES[name].items())
    assert issubclass(made, next(native for word, native in NATIVE.items() if name.endswith(word)))


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_given_is_kept_and_steps(name: str) -> None:
    given = {key: value for key, value in SIGNATURES[name].items() if key in ("betas", "eps", "max_coeff", "min_coeff")}
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(optimizers, name)([{"params": [p]}], lr=0.25, weight_decay=0.5)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert {key: group[key] for key in given} == given
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p < 1).all()


def test_adam_and_adamw() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    assert optimizers.FusedAdam([p]).param_groups[0]["decoupled"]
    assert not optimizers.FusedAdam([p], adam_w_mode=False).param_groups[0]["decoupled"]
    assert not optimizers.DeepSpeedCPUAdam([p], adamw_mode=False).param_groups[0]["decoupled"]


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("FusedAdam", {"amsgrad": True}, "does not do amsgrad"),
        ("FusedLamb", {"amsgrad": True}, "does not do amsgrad"),
        ("FusedLamb", {"max_grad_norm": 0.5}, '"gradient_clipping": 0.5 in the config'),
    ],
)
def test_what_is_refused(name: str, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(optimizers, name)([torch.nn.Parameter(torch.ones(1))], **asked)


def test_what_accelerate_gives_to_each() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    for name in ("DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion"):
        getattr(optimizers, name)([{"params": [p]}], lr=0.1, weight_decay=0.0, adamw_mode=False)
