"""DeepSpeed's small helpers that scripts import, where PyTorch has no name of the same contract."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import nn

from tritonspeed import comm
from tritonspeed.integrations.stand_ins import log_dist, logger
from tritonspeed.zero import GatheredParameters, ZeroOptimizer
from tritonspeed.zero.stages import Stage

LOG_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}
_GIB = 2**30


class OnDevice:
    """Modules built inside have their tensors on one device and in one floating-point type.

    Args:
        dtype: of floating-point tensors.
        device: "meta" builds shapes without values.
        enabled: False changes nothing.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._undo = ExitStack()

    def __enter__(self) -> None:
        if self.enabled:
            before = torch.get_default_dtype()
            self._undo.enter_context(torch.device(self.device))
            self._undo.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        self._undo.close()


class RepeatingLoader:
    """An iterator over a data loader that begins again when it has ended.

    Args:
        loader: anything that can be iterated more than once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class ZeroStageEnum(IntEnum):
    """ZeRO's stages by what they shard."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class _OfSomeStages(type):
    """The class of names for an optimizer of some stages: they are asked with isinstance, never built."""

    is_meant: Callable[[Stage], bool]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, ZeroOptimizer) and all(cls.is_meant(b.stage) for b in instance.buckets)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is built by initialize(), not by a script: use what it returns")


class DeepSpeedZeroOptimizer_Stage3(metaclass=_OfSomeStages):
    """``isinstance(optimizer, ...)``: does the optimizer's stage shard parameters?"""

    is_meant = staticmethod(lambda stage: stage.shards_parameters)


class DeepSpeedZeroOptimizer(metaclass=_OfSomeStages):
    """``isinstance(optimizer, ...)``: does its stage shard the optimizer's states, and no parameters?"""

    is_meant = staticmethod(lambda stage: stage.shards_optimizer and not stage.shards_parameters)


@contextmanager
def unwrap_model_for_generation(model: nn.Module) -> Iterator[nn.Module]:
    """An engine with all its parameters gathered once, for as long as a text is generated."""
    with GatheredParameters(list(model.parameters())):
        yield model


def move_to_device(item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """A nested value with its tensors on a device.

    Args:
        item: tensors in dicts, lists and tuples.
        device: where to.
        criterion_func: tensors of which it is true keep their identity: only their storage is exchanged.
    """
    if criterion_func is not None and criterion_func(item):
        item.data = item.to(device).data
        return item
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)([move_to_device(value, device, criterion_func) for value in item])
    return item.to(device) if hasattr(item, "to") else item


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log, on rank 0, what the device holds now and held at most since the last call.

    Args:
        message: stands before the figures.
        force: nothing is logged without it, as in DeepSpeed.
    """
    if not force or comm.mesh_of().rank != 0:
        return
    gc.collect()
    if not torch.cuda.is_available():
        logger.info("%s: no GPU; engine.explain() says what a rank holds", message)
        return
    held, peak = torch.cuda.memory_allocated() / _GIB, torch.cuda.max_memory_allocated() / _GIB
    logger.info("%s: %.2f GiB allocated, at most %.2f GiB since the last call", message, held, peak)
    torch.cuda.reset_peak_memory_stats()


def empty_cache() -> None:
    """Give unused memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_random_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def has_moe_layers(model: nn.Module) -> tuple[bool, int]:
    """(False, 0): no layer is spread over ranks as experts."""
    return False, 0


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that does nothing."""
    return function


@cache
def log_dist_once(message: str, ranks: tuple[int, ...] | None = None, level: int = logging.INFO) -> None:
    """``log_dist``, the first time that this is said."""
    log_dist(message, ranks, level)


@cache
def warning_once(message: str) -> None:
    """A warning, the first time that this is said."""
    logger.warning("%s", message)


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """The log's level by its name.

    Raises:
        ValueError: there is no such level.
    """
    level = LOG_LEVELS.get(log_level_str.lower())
    if level is None:
        raise ValueError(f"log level {log_level_str!r}: there is {', '.join(LOG_LEVELS)}")
    (custom_logger or logger).setLevel(level)
