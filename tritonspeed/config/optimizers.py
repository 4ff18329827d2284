"""The optimizers and schedules a config can name: their parameters with defaults, and why some are refused.

A table, so that `check` runs without importing torch; a test holds torch's rows to torch's own signatures.
An optimizer is usable when its update of one element needs nothing but that element (and scalars): it then
runs on any slice of a flat buffer. Lamb and Muon need more, and the slices meet for it. Names are matched without
regard to case, as DeepSpeed does for its own.
"""

import math
from typing import Any

from tritonspeed.config.coerce import nearest

ADAM_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "adam_w_mode": True,
    "stochastic_rounding": False,
    "state": "fp32",
    "torch_adam": False,
    "amsgrad": False,
    "fp32_optimizer_states": True,
    "set_grad_none": True,
    "fused": None,
    "foreach": None,
}
"""DeepSpeed's defaults of Adam and AdamW, which differ from torch's in weight_decay (torch's AdamW: 0.01)."""

INERT: dict[str, str] = {
    "foreach": "one pass updates a flat shard",
    "fused": "one pass updates a flat shard",
    "set_grad_none": "gradients are released after the step",
    "fp32_optimizer_states": "moments are fp32, or what optimizer.params.state says where there is one",
    "ns_method": "one iteration for all shapes, its symmetric products at half the work",
}
"""Parameters of our optimizers that are accepted and change nothing, with the reason."""

STATES = ("fp32", "bf16", "8bit")
"""How Adam's moments can be kept."""

LION_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.99),
    "weight_decay": 0.0,
    "stochastic_rounding": False,
    "fp32_optimizer_states": True,
    "set_grad_none": True,
}
"""DeepSpeed's defaults of Lion on a GPU; its CPU form has betas of (0.9, 0.999), the paper an lr of 1e-4."""

ADAGRAD_DEFAULTS: dict[str, Any] = {
    "lr": 0.01,
    "lr_decay": 0.0,
    "weight_decay": 0.0,
    "initial_accumulator_value": 0.0,
    "eps": 1e-10,
    "stochastic_rounding": False,
    "fp32_optimizer_states": True,
    "fused": None,
    "foreach": None,
}
"""torch's and DeepSpeed's defaults of Adagrad, which agree."""

LAMB_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "eps_inside_sqrt": False,
    "max_coeff": 10.0,
    "min_coeff": 0.01,
}
"""DeepSpeed's defaults of Lamb."""

MUON_DEFAULTS: dict[str, Any] = {
    "lr": 0.02,
    "muon_lr": 0.02,
    "adam_lr": 3e-4,
    "momentum": 0.95,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
    "eps": 1e-10,
    "nesterov": True,
    "ns_steps": 5,
    "ns_dtype": "bf16",
    "ns_method": "standard",
    "adjust_lr_fn": "original",
}
"""DeepSpeed's defaults of Muon: betas and eps are those of AdamW beside it; an lr that is given is both rates'."""

OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "Adagrad": ADAGRAD_DEFAULTS,
    "Adam": ADAM_DEFAULTS,
    "AdamW": ADAM_DEFAULTS,
    "Lamb": LAMB_DEFAULTS,
    "Lion": LION_DEFAULTS,
    "Muon": MUON_DEFAULTS,
}
"""The optimizers of ``tritonspeed.optim``, with what DeepSpeed knows of each."""

TORCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.01, "lambd": 0.0001, "alpha": 0.75, "t0": 1000000.0, "weight_decay": 0},
    "Adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0},
    "Adamax": {"lr": 0.002, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    "NAdam": {
        "lr": 0.002,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum_decay": 0.004,
        "decoupled_weight_decay": False,
    },
    "RAdam": {
        "lr": 0.001,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "decoupled_weight_decay": False,
    },
    "RMSprop": {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False},
    "Rprop": {"lr": 0.01, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)},
    "SGD": {"lr": 0.001, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
}
"""torch.optim classes that update elementwise, without the options that all of them share."""

TORCH_SHARED = ("maximize", "foreach", "capturable", "differentiable", "fused")

REFUSED: dict[str, str] = {
    "OneBitAdam": "1-bit compression is not built, and it excludes ZeRO. Use AdamW",
    "OneBitLamb": "1-bit compression is not built, and it excludes ZeRO. Use AdamW",
    "ZeroOneAdam": "0/1 compression is not built, and it excludes ZeRO. Use AdamW",
    "MuAdam": "muP is not built. Use AdamW with per-group learning rates",
    "MuAdamW": "muP is not built. Use AdamW with per-group learning rates",
    "MuSGD": "muP is not built. Use SGD with per-group learning rates",
    "Adafactor": "factors the second moment over rows and columns of whole matrices. Use AdamW",
    "LBFGS": "evaluates the loss again in a closure and keeps whole gradients. Use AdamW",
    "SparseAdam": "needs sparse gradients, and gradients are reduced densely. Use AdamW",
}
"""Names that are known and not usable here: why, and what to take."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": 1e-3,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
    "OneCycle": {
        "cycle_min_lr": None,
        "cycle_max_lr": None,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
    "WarmupLR": {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": None,
        "warmup_num_steps": 1000,
        "warmup_type": "log",
    },
    "WarmupDecayLR": {
        "total_num_steps": None,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.001,
        "warmup_num_steps": 1000,
        "warmup_type": "log",
    },
    "WarmupCosineLR": {
        "total_num_steps": None,
        "warmup_min_ratio": 0.0,
        "warmup_num_steps": 1000,
        "cos_min_ratio": 0.0001,
        "warmup_type": "log",
    },
}
"""DeepSpeed's five schedules. All of them also take `last_batch_iteration`."""


TORCH_SCHEDULES: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 1 / 3, "total_iters": 5},
    "CosineAnnealingLR": {"T_max": None, "eta_min": 0.0},
    "CosineAnnealingWarmRestarts": {"T_0": None, "T_mult": 1, "eta_min": 0.0},
    "CyclicLR": {
        "base_lr": None,
        "max_lr": None,
        "step_size_up": 2000,
        "step_size_down": None,
        "mode": "triangular",
        "gamma": 1.0,
        "scale_fn": None,
        "scale_mode": "cycle",
        "cycle_momentum": True,
        "base_momentum": 0.8,
        "max_momentum": 0.9,
    },
    "ExponentialLR": {"gamma": None},
    "LinearLR": {"start_factor": 1 / 3, "end_factor": 1.0, "total_iters": 5},
    "MultiStepLR": {"milestones": None, "gamma": 0.1},
    "OneCycleLR": {
        "max_lr": None,
        "total_steps": None,
        "epochs": None,
        "steps_per_epoch": None,
        "pct_start": 0.3,
        "anneal_strategy": "cos",
        "cycle_momentum": True,
        "base_momentum": 0.85,
        "max_momentum": 0.95,
        "div_factor": 25.0,
        "final_div_factor": 1e4,
        "three_phase": False,
    },
    "PolynomialLR": {"total_iters": 5, "power": 1.0},
    "StepLR": {"step_size": None, "gamma": 0.1},
}
"""Schedules of torch.optim.lr_scheduler that a config can describe: no functions and no other schedules in them."""

LAST = {"last_batch_iteration": None, "last_epoch": None, "verbose": None}
"""What schedules take besides, none of it from a config in practice."""


def _match(name: str, known: dict[str, Any]) -> str | None:
    return next((each for each in known if each.lower() == name.lower()), None)


def canonical_optimizer(name: str) -> str:
    """The name in its usual spelling. ValueError if nothing by that name exists."""
    known = {**OWN_DEFAULTS, **TORCH_DEFAULTS, **REFUSED}
    match = _match(name, known)
    if match is None:
        raise ValueError(
            f"optimizer.type {name!r} is unknown{nearest(name, known) or '.'} Known: {', '.join(sorted(known))}"
        )
    return match


def refused_optimizer(name: Any) -> str | None:
    """refused: the 1-bit and muP families, Adafactor, LBFGS, SparseAdam (see below)"""
    match = _match(name, REFUSED) if isinstance(name, str) else None
    return None if match is None else f"{match} {REFUSED[match]}"


def optimizer_defaults(name: str) -> dict[str, Any]:
    """Parameter names and defaults of an optimizer; {} for a refused one, whose parameters are not checked."""
    return OWN_DEFAULTS.get(name) or TORCH_DEFAULTS.get(name, {})


def canonical_schedule(name: str) -> str:
    """The schedule's name in its usual spelling. ValueError if there is none by that name."""
    known = SCHEDULES | TORCH_SCHEDULES
    match = _match(name, known)
    if match is None:
        raise ValueError(
            f"scheduler.type {name!r} is unknown{nearest(name, known) or '.'} Known: {', '.join(known)}; "
            "any other goes in as an object: initialize(lr_scheduler=...)"
        )
    return match


def schedule_defaults(name: str) -> dict[str, Any]:
    """Parameter names and defaults of a schedule; None where a value is required or follows from others."""
    return (SCHEDULES | TORCH_SCHEDULES)[name]


def check_optimizer_params(name: str, params: dict[str, Any]) -> list[str]:
    """Mistakes in `optimizer.params`, as sentences."""
    known = optimizer_defaults(name) | (dict.fromkeys(TORCH_SHARED) if _is_torchs(name, params) else {})
    mistakes = []
    for each, value in params.items():
        if each == "max_grad_norm":
            mistakes.append(
                f"optimizer.params.{each} = {value!r}: the norm of the whole model is clipped, not by the optimizer: "
                f"drop it and set gradient_clipping: {value}"
            )
        else:
            mistakes += _check_param("optimizer", name, each, value, known)
    if "state" in known and params.get("state", "fp32") not in STATES:
        mistakes.append(f"optimizer.params.state = {params['state']!r} must be one of {', '.join(STATES)}")
    if params.get("amsgrad") is True and "amsgrad" in known and not _is_torchs(name, params):
        mistakes.append("optimizer.params.amsgrad = true is only in torch's Adam: add torch_adam: true, or drop it")
    return mistakes


def check_schedule_params(name: str, params: dict[str, Any]) -> list[str]:
    """Mistakes in `scheduler.params`, as sentences."""
    known = schedule_defaults(name) | LAST
    return [
        mistake for each, value in params.items() for mistake in _check_param("scheduler", name, each, value, known)
    ]


def _is_torchs(name: str, params: dict[str, Any]) -> bool:
    return name in TORCH_DEFAULTS or params.get("torch_adam") is True


def _check_param(block: str, name: str, each: str, value: Any, known: dict[str, Any]) -> list[str]:
    path = f"{block}.params.{each}"
    if each not in known:
        return [f"{path} is not a parameter of {name}{nearest(each, known)}"]
    default = known[each]
    if value is None or value == "auto" or isinstance(default, bool | str) or default is None:
        return []
    if isinstance(default, tuple) and (not isinstance(value, list | tuple) or len(value) != len(default)):
        return [f"{path} = {value!r} must be {len(default)} numbers, like {list(default)}"]
    values = value if isinstance(value, list | tuple) else [value]  # one lr per parameter group is a list
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [] if good else [f"{path} = {value!r} must be {'numbers' if isinstance(default, tuple) else 'a number'}"]
