"""Optimizers and schedules by the names of a ds_config.json, and which optimizers may run on shards.

A shard is a slice of a flat buffer: it knows neither the shape of a parameter nor its other elements. So an optimizer
may run on shards if element i of its update depends on element i of weight, gradient and state alone. Norms of a
layer (LARS), rows and columns (Adafactor), matrices (Shampoo), sums over the model (Prodigy) and line searches (LBFGS)
would go wrong without an error, and are refused. Our Lamb and Muon say what they need, and the ranks meet for it.

"Adam" means AdamW, as in DeepSpeed, unless `adam_w_mode` is false. Defaults are DeepSpeed's too: lr 1e-3, weight decay
0, where `torch.optim.AdamW` has 0.01; `torch_adam` takes torch's. Names, parameters and refusals by name are those of
`config.optimizers`; here they become objects.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tritonspeed.config.optimizers import (
    INERT,
    OWN_DEFAULTS,
    canonical_optimizer,
    canonical_schedule,
    check_optimizer_params,
    check_schedule_params,
    refused_optimizer,
)
from tritonspeed.optim.adagrad import Adagrad
from tritonspeed.optim.adamw import AdamW
from tritonspeed.optim.lamb import Lamb
from tritonspeed.optim.lion import Lion
from tritonspeed.optim.muon import Muon
from tritonspeed.optim.schedules import SCHEDULES, Schedule

_OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Adagrad": Adagrad, "Lamb": Lamb, "Lion": Lion}
_SWITCHES = ("adam_w_mode", "torch_adam", "amsgrad")  # of Adam, in DeepSpeed's words
# Class names in lower case, of objects that users bring from anywhere, and what they need beyond their own elements.
_NEEDS = {
    **dict.fromkeys(("lamb", "fusedlamb", "onebitlamb", "lars", "novograd"), "norms of a whole layer"),
    **dict.fromkeys(("adafactor", "came", "sm3", "adammini", "adam_mini"), "rows and columns of whole parameters"),
    **dict.fromkeys(("muon", "muonwithauxadam", "singledevicemuon", "shampoo", "distributedshampoo"), "whole matrices"),
    **dict.fromkeys(("soap", "kfac", "galoreadamw", "galoreadafactor", "apolloadamw"), "whole matrices"),
    **dict.fromkeys(("prodigy", "dadaptadam", "dadaptsgd", "dadaptadagrad", "dadaptlion"), "sums over the whole model"),
    **dict.fromkeys(("lbfgs", "sam"), "a closure that runs the model several times in a step"),
    **dict.fromkeys(("sparseadam",), "sparse gradients, which flat buffers do not have"),
    **dict.fromkeys(("onebitadam", "zerooneadam"), "its own compressed communication of whole gradients"),
}


def build_optimizer(
    type: str,
    params: Mapping[str, Any] | None,
    param_groups: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
) -> torch.optim.Optimizer:
    """The optimizer that `"optimizer": {"type": ..., "params": ...}` asks for.

    Args:
        type: "Adam", "AdamW", "Lion", "Adagrad", "Lamb" and "Muon" in any case are ours; else an elementwise class of
            `torch.optim`. For Muon, `mark_hidden_matrices(model)` first.
        params: its keyword arguments, and DeepSpeed's switches for Adam: `adam_w_mode`, `torch_adam`.
        param_groups: parameters, or groups of them with their own settings.

    Raises:
        ValueError: the type is unknown, or cannot run on shards; a parameter is unknown or belongs elsewhere.
    """
    name = canonical_optimizer(type)
    refusal = refused_optimizer(name)
    if refusal is not None:
        raise ValueError(f"optimizer.type {refusal}")
    params = dict(params or {})
    _raise_if_any(check_optimizer_params(name, params) + _unfilled("optimizer", params))
    if name in ("Adam", "AdamW"):
        return _build_adam(name, params, param_groups)
    if name == "Muon":
        return _build_muon(params, param_groups)
    if name in _OURS:
        return _construct("optimizer", _OURS[name], param_groups, _settings(name, params))
    return _construct("optimizer", getattr(torch.optim, name), param_groups, params)


def _build_adam(name: str, params: dict[str, Any], param_groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Adam and AdamW with DeepSpeed's switches."""
    decoupled = bool(params.pop("adam_w_mode", True)) or name == "AdamW"
    if params.pop("torch_adam", False):
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        return _construct("optimizer", cls, param_groups, _for_torch_adam(params))
    return _construct("optimizer", AdamW, param_groups, {**_settings(name, params), "decoupled": decoupled})


def _build_muon(params: dict[str, Any], param_groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Muon with DeepSpeed's names: one lr may stand for both kinds, eps is AdamW's."""
    settings = _settings("Muon", params)
    settings["adam_eps"] = settings.pop("eps")
    if "lr" in params:
        settings |= {key: params["lr"] for key in ("muon_lr", "adam_lr") if key not in params}
    return _construct("optimizer", Muon, param_groups, settings)


def _settings(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one of our classes: DeepSpeed's defaults, what was given, without what is inert."""
    settings = {key: params.get(key, default) for key, default in OWN_DEFAULTS[name].items()}
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return {key: value for key, value in settings.items() if key not in (*INERT, *_SWITCHES)}


def _for_torch_adam(params: dict[str, Any]) -> dict[str, Any]:
    """What is left for torch's Adam: the parameters that it has, after those it lacks were found to ask for nothing."""
    if not params.get("bias_correction", True):
        raise ValueError(
            "optimizer.params.bias_correction is false, but torch's Adam always corrects: drop torch_adam, or "
            "bias_correction"
        )
    if params.get("stochastic_rounding"):
        raise ValueError(
            "optimizer.params.stochastic_rounding is true, but torch's Adam rounds to nearest: drop one of the two"
        )
    if params.get("state", "fp32") != "fp32":
        raise ValueError(
            f"optimizer.params.state is {params['state']!r}, but torch's Adam keeps fp32 moments: drop one of the two"
        )
    ours_alone = {"bias_correction", "stochastic_rounding", "state", *INERT} - {"fused", "foreach"}
    return {key: value for key, value in params.items() if key not in ours_alone}


def build_scheduler(
    type: str, params: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer
) -> Schedule | torch.optim.lr_scheduler.LRScheduler:
    """The schedule that `"scheduler": {"type": ..., "params": ...}` asks for.

    Args:
        type: one of `VALID_LR_SCHEDULES`, or a class of `torch.optim.lr_scheduler` that plain values describe.
        params: its keyword arguments.
        optimizer: whose parameter groups it drives.

    Raises:
        ValueError: the type or a parameter is unknown, a required parameter is missing or out of range.
    """
    name = canonical_schedule(type)
    params = dict(params or {})
    _raise_if_any(check_schedule_params(name, params) + _unfilled("scheduler", params))
    if name == "WarmupDecayLR" and "warmup_max_lr" not in params:
        own = [float(group["lr"]) for group in optimizer.param_groups]
        if any(lr != 1e-3 for lr in own):
            warnings.warn(
                f"WarmupDecayLR without warmup_max_lr rises to 0.001 (DeepSpeed's default), not to the optimizer's own "
                f"learning rate {own}: set scheduler.params.warmup_max_lr, or null for the optimizer's own",
                stacklevel=2,
            )
    cls = SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, name)
    return _construct("scheduler", cls, optimizer, params)


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer object whose update needs more than the elements of a shard.

    The classes are known by name, through the bases and through wrappers that hold an `optimizer` or `base_optimizer`;
    of any other class it is the caller's word that it is elementwise.

    Raises:
        ValueError: naming the class and what it needs.
    """
    seen: set[int] = set()
    inner: object | None = optimizer
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        cls = inner.__class__
        for base in cls.__mro__:
            needs = _NEEDS.get(base.__name__.lower())
            if needs is not None:
                what = cls.__name__ if base is cls else f"{cls.__name__} (a {base.__name__})"
                raise ValueError(
                    f"{what} needs {needs}, but a shard is a slice of a flat buffer: use AdamW, any optimizer whose "
                    "update is elementwise, or Lamb or Muon of tritonspeed.optim"
                )
        inner = getattr(inner, "optimizer", None) or getattr(inner, "base_optimizer", None)


def _unfilled(block: str, params: Mapping[str, Any]) -> list[str]:
    return [
        f'{block}.params.{key} is "auto", which nothing has filled in: resolve the config, or write a value'
        for key, value in params.items()
        if isinstance(value, str) and value == "auto"
    ]


def _raise_if_any(mistakes: list[str]) -> None:
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _construct(block: str, cls: Any, first: Any, params: Mapping[str, Any]) -> Any:
    """cls(first, **params), with what is missing or of the wrong type said in terms of the config."""
    for name, parameter in list(inspect.signature(cls).parameters.items())[1:]:
        if parameter.default is parameter.empty and name not in params:
            raise ValueError(f"{block}.type {cls.__name__!r} needs {block}.params.{name}: add it")
    try:
        return cls(first, **params)
    except TypeError as error:
        raise ValueError(f"{block}.type {cls.__name__!r} refuses its params {dict(params)}: {error}") from error
