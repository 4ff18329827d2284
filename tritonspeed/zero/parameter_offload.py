"""``optimizer.parameter_offload`` at stage 3, as DeepSpeed has it: programs take hooks off by it, and put them back.

TRL does it while a model that is gathered whole generates: nothing is to be fetched then, and a hook per module and
token costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tritonspeed.zero.hooks import Hooks


class _Handle:
    """One handle for all hooks: they go together."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class ParameterOffload:
    """The hooks of one sharded model under DeepSpeed's names.

    Without hooks, parameters must be whole: inside ``GatheredParameters(model.parameters())``. Collective there, as the
    gathering is; the hooks themselves are each rank's own.

    Args:
        hooks: of the model.

    Attributes:
        module: the model.
        forward_hooks, backward_hooks: call ``remove()`` of each to take all hooks off; empty while they are off.
        param_coordinator: this object.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self.module = hooks.model
        self.forward_hooks: list[Any] = [_Handle(hooks.remove)]
        self.backward_hooks: list[Any] = []
        self.param_coordinator = self

    def _register_deepspeed_module(self, module: nn.Module, count: list[int] | None = None) -> None:
        """Put the hooks back; a no-op where they are."""
        self._hooks.install()
        self.forward_hooks = [_Handle(self._hooks.remove)]

    def is_invalid_trace(self) -> bool:
        """True: there is no trace that a generation could have spoiled; those of training and of the rest are two."""
        return True

    def _invalidate_trace(self) -> None:
        """Nothing is to be forgotten: see ``is_invalid_trace``."""
