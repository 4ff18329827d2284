"""One step of an engine, counted and timed: the ``flops_profiler`` block.

Counting makes a step slow, so the step before ``profile_step`` is counted, and ``profile_step`` timed. What it meets
for the first time (a batch of other shapes, or any where it is the first step) it counts as well, and says so. Rank 0
does it; no number of the training changes, but for what is compiled: it runs uncompiled while it is counted, and may
round otherwise.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonspeed.config import Config
from tritonspeed.log import asked_for
from tritonspeed.precision import Policy
from tritonspeed.profiling.flops_count import Counts, ModuleWatch
from tritonspeed.profiling.flops_table import FlopsProfile, Shape
from tritonspeed.profiling.throughput import num_tokens
from tritonspeed.zero import ShardedModel
from tritonspeed.zero.guard import ModuleHook
from tritonspeed.zero.tree import tensors_in

log = asked_for()

_NOTHING: AbstractContextManager[None] = nullcontext()


class FlopsOfStep:
    """Profiles one step of an engine.

    Args:
        sharded: the model.
        config: whose ``flops_profiler`` says which step, and what to print.
        policy: dtypes.
    """

    def __init__(self, sharded: ShardedModel, config: Config, policy: Policy) -> None:
        self.settings = config.flops_profiler
        self.profile: FlopsProfile | None = None
        self._model, self._device, self._world = sharded.model, sharded.mesh.device, sharded.mesh.world
        self.is_asked = self.settings.enabled
        self._is_on = self.is_asked and sharded.mesh.rank == 0
        self._shape: Shape | None = shape_of(sharded, policy) if self._is_on else None
        self._watch: ModuleWatch | None = None
        self._root: Any = None
        self._known: dict[Hashable, Counts] = {}
        self._stack = ExitStack()  # of the phase under way: the counting
        self._key: Hashable = None
        self._since_backward: list[Hashable] = []
        self._is_timed = False
        self._begin()

    def _begin(self) -> None:
        self._total = Counts()
        self._phase_s: dict[str, float] = defaultdict(float)
        self._num_micro = self._num_tokens = self._num_backwards = 0
        self._was_live = False

    def phase(self, name: str, num_steps: int) -> AbstractContextManager[None]:
        """Around "forward", "backward" or "step" of the engine.

        Args:
            num_steps: that were made before.
        """
        if not self._is_on or not self.settings.profile_step - 1 <= num_steps <= self.settings.profile_step:
            return _NOTHING
        if name == "forward" and not torch.is_grad_enabled():
            return _NOTHING
        if self._watch is None:
            self._watch = ModuleWatch(self._model)
            hook = ModuleHook(torch._dynamo.disable(self._enter_model))
            self._root = self._model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        if not self._is_timed and num_steps == self.settings.profile_step:
            self._is_timed = True
            self._watch.forget_times()
            if self._known:
                self._watch.leave_compiled_alone()
            self._begin()
        return self._phase(name, self._watch)

    @contextmanager
    def _phase(self, name: str, watch: ModuleWatch) -> Iterator[None]:
        self._key, watch.counts = None, Counts()
        start = self._now()
        self._is_forward = name == "forward"
        try:
            with self._stack:
                if name == "backward":
                    self._look_up(("backward", *self._since_backward), watch)
                yield
        finally:
            self._is_forward = False
        self._phase_s[name] += self._now() - start
        if name == "forward":
            self._since_backward.append(self._key)
            self._num_micro += 1
        elif name == "backward":
            self._since_backward.clear()
        if self._key is not None:
            self._total.add(self._known.setdefault(self._key, watch.counts))

    _is_forward = False

    def _enter_model(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_forward and self._watch is not None:
            self._is_forward = False  # the model's own call of itself is a part of this one
            self._num_tokens += num_tokens(args, kwargs) or 0
            shapes = tuple((*t.shape, t.dtype) for t in tensors_in((args, kwargs)))
            self._look_up(("forward", *shapes), self._watch)

    def _look_up(self, key: Hashable, watch: ModuleWatch) -> None:
        self._key = key
        if key not in self._known:
            self._was_live = True
            self._stack.enter_context(watch.count())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def end_step(self, step: int, micro_batch: int) -> None:
        """A step has been made.

        Args:
            step: its number, from 1.
            micro_batch: samples of a forward.
        """
        if not self._is_timed:
            return
        assert self._watch is not None and self._shape is not None, "a step that was timed was watched"
        self.profile = FlopsProfile(
            shape=self._shape,
            counts=self._total,
            module_s=self._watch.seconds(),
            phase_s=dict(self._phase_s),
            step=step,
            num_micro=self._num_micro,
            num_samples=self._num_micro * micro_batch,
            num_tokens=self._num_tokens,
            backward_factor=2 + self.settings.recompute_fwd_factor,
            was_counted_live=self._was_live,
            was_uncompiled=self._watch.has_compiled,
        )
        self.close()
        settings = self.settings
        text = self.profile.table(settings.module_depth, settings.top_modules, settings.detailed)
        show(text, settings.output_file)

    def close(self) -> None:
        """Take the hooks off."""
        self._is_on = self._is_timed = False
        if self._watch is not None:
            self._watch.remove()
            self._root.remove()
            self._watch = None


def shape_of(sharded: ShardedModel, policy: Policy) -> Shape:
    """What a profile says of the model and of this rank's part of it."""
    held = 0
    for group in sharded.groups:
        for bucket in group.buckets:
            if bucket.frees:
                held += sum(piece.numel for piece in bucket.layout.pieces(*bucket.own))
            else:
                held += sum(span.numel for span in bucket.layout.spans)
    return model_shape(
        sharded.model, sharded.mesh.device, policy.autocast or policy.compute, num_held=held, world=sharded.mesh.world
    )


def model_shape(
    model: nn.Module, device: torch.device, dtype: torch.dtype, num_held: int | None = None, world: int = 1
) -> Shape:
    """Of any model: names, classes, and each parameter once, with the module that has it first."""
    params: Counter[str] = Counter()
    for name, p in model.named_parameters():
        params[name.rpartition(".")[0]] += p.numel()
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return Shape(kinds, params, params.total() if num_held is None else num_held, world, dtype, device)


def show(text: str, output_file: str | None = None) -> None:
    """To the log, or to a file; a file that cannot be written is said, and the table logged."""
    if output_file:
        path = Path(output_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
            return
        except OSError as error:
            log.warning("flops_profiler.output_file %s cannot be written: %s", output_file, error)
    log.info("%s", text)
