"""torch.utils.checkpoint saves a region's inputs through ``HostInputs``, whoever calls it: Hugging Face, a model, us.

Hooks on saved tensors are there while a region's inputs are saved, and at no other time: around a whole forward they
would take every activation along, and switch off torch's check for writes in place. torch has no public place for
that, so this stands around the private one: ``_CheckpointFrame.save_inputs`` of torch 2.13, ``_NoopSaveInputs.apply``
before. Where a region is inside another, the outer one's hooks are there already, and stay: its recomputation will
make the inner one's inputs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from tritonspeed.checkpointing.host_inputs import HostInputs

_REENTRANT = torch_checkpoint.CheckpointFunction
_in_use: HostInputs | None = None
_entered = threading.local()


def save_through(inputs: HostInputs | None) -> None:
    """From now on regions save their inputs through this; None: on the device, as torch does."""
    global _in_use
    _in_use = inputs
    if inputs is not None:
        _hook_torch()


def _hooks() -> Any:
    """The hooks to save a region's inputs with; None where nothing moves, or somebody else's hooks take them."""
    if _in_use is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    _in_use.begin_region()
    return torch.autograd.graph.saved_tensors_hooks(_in_use.pack, _in_use.unpack)


@contextmanager
def _saving() -> Iterator[None]:
    hooks = _hooks()
    if hooks is None:
        yield
        return
    with hooks:
        yield


class _Reentrant(_REENTRANT):
    """With ``use_reentrant=True`` autograd saves the inputs between the end of ``forward`` and that of ``apply``."""

    @staticmethod
    def forward(ctx: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        """As torch's, and then the hooks are there."""
        outputs = _REENTRANT.forward(ctx, run_function, preserve_rng_state, *args)
        hooks = _hooks()
        if hooks is not None:
            hooks.__enter__()
            _stack().append(hooks)
        return outputs

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """As torch's, and then the hooks are gone."""
        depth = len(_stack())
        try:
            return super().apply(*args, **kwargs)
        finally:
            while len(_stack()) > depth:
                _stack().pop().__exit__(None, None, None)


def _stack() -> list[Any]:
    if not hasattr(_entered, "hooks"):
        _entered.hooks = []
    return _entered.hooks


class _NoopSaveInputs:
    """Stands for the class of this name in torch before 2.13."""

    original: Any = None

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As the original's, with the hooks."""
        with _saving():
            return cls.original.apply(*args)


def _hook_torch() -> None:
    if torch_checkpoint.CheckpointFunction is _Reentrant:
        return
    torch_checkpoint.CheckpointFunction = _Reentrant
    frame = getattr(torch_checkpoint, "_CheckpointFrame", None)
    save_inputs = getattr(frame, "save_inputs", None)
    if save_inputs is not None:

        def save(self: Any, *args: Any) -> None:
            with _saving():
                save_inputs(self, *args)

        setattr(frame, "save_inputs", save)  # noqa: B010 - a type checker knows no private class
    elif hasattr(torch_checkpoint, "_NoopSaveInputs"):
        _NoopSaveInputs.original = torch_checkpoint._NoopSaveInputs
        setattr(torch_checkpoint, "_NoopSaveInputs", _NoopSaveInputs)  # noqa: B010 - as above
    else:
        warnings.warn(
            f"torch {torch.__version__} saves a checkpointed region's inputs at a place that is not known here:"
            " with cpu_checkpointing they stay on the device, but for regions with use_reentrant=True",
            stacklevel=3,
        )
