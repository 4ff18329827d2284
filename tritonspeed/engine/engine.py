"""The order of events of a training step. Owns no tensor: buckets do; decides no number: the config does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tritonspeed import comm
from tritonspeed.config import Config
from tritonspeed.engine.explain import explain_plan
from tritonspeed.engine.getters import Getters
from tritonspeed.engine.observing import Observing
from tritonspeed.engine.report import StepReport
from tritonspeed.engine.saving import Saving
from tritonspeed.engine.weights import Weights
from tritonspeed.precision import Policy
from tritonspeed.zero import Away, ShardedModel, ZeroOptimizer
from tritonspeed.zero.tree import map_tensors

log = logging.getLogger("tritonspeed")

_driving: list[Engine] = []  # engines inside ``backward``, which has scaled the loss: the innermost last


class Engine(Getters, Saving, Weights, Observing, nn.Module):
    """A sharded model, its optimizer and schedule, stepped together. Made by ``initialize``.

    Calls and names are DeepSpeed's; attributes that are not the engine's are the module's.

    Args:
        sharded: the model in its buckets.
        optimizer: steps the shards; None for inference.
        lr_scheduler: stepped after every step that was not skipped; None keeps the rate.
        config: resolved.
        policy: dtypes.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        optimizer: ZeroOptimizer | None,
        lr_scheduler: Any,
        config: Config,
        policy: Policy,
    ) -> None:
        super().__init__()
        self.module = sharded.model
        self.sharded, self.lr_scheduler = sharded, lr_scheduler
        self.config, self.policy, self.mesh = config, policy, sharded.mesh
        self.away = Away(sharded)
        self.training_dataloader: Any = None
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.last_step: StepReport | None = None
        assert config.gradient_accumulation_steps is not None, "a resolved config has its batch sizes"
        self._accumulation = config.gradient_accumulation_steps
        self._micro_batch = config.train_micro_batch_size_per_gpu
        self._boundary: bool | None = None  # set by the caller; None counts micro-steps
        self._syncing = True
        self._loss_was_scaled = False
        self._applied = self._stepping = False
        self._num_backwards = 0  # since the last update
        self._losses: list[Tensor] = []
        self._times_ms = dict.fromkeys(("forward", "backward", "step"), 0.0)
        if optimizer is not None:
            optimizer.instead = self._step_instead
        hooks = sharded.hooks
        hooks.begin_backward, hooks.after_backward = self._begin_backward, self._after_backward
        hooks.on_discard = self._on_discard
        self._plan_sending()
        self._watch_signals()
        self._begin_observing()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise AttributeError(self._not_here(name)) from None

    def __reduce__(self) -> Any:
        raise ValueError(
            "an engine cannot be copied or pickled: it is one of several ranks' that train together. Copy the model"
            " before initialize(), or save engine.module_state_dict()"
        )

    # forward, backward, step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; under autocast, and with inputs cast to fp16, where the config says so."""
        with self._timed("forward"):
            if self.config.fp16.enabled and self.config.fp16.auto_cast:
                args, kwargs = map_tensors((args, kwargs), lambda t: t.half() if t.is_floating_point() else t)
            kind = self.mesh.device.type
            with torch.autocast(kind, self.policy.autocast) if self.policy.autocast else nullcontext():
                return self.module(*args, **kwargs)

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, for those who call ``.backward()`` themselves; fp16 needs it."""
        self._loss_was_scaled = True
        return loss * self.loss_scale()

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **ignored: Any) -> Tensor:
        """Gradients of ``loss``, averaged over the accumulation and (at the end of it) over the ranks.

        Args:
            loss: a scalar.
            retain_graph: as in ``Tensor.backward``.
            scale_wrt_gas: divide by the number of accumulation steps; False if the caller has.

        Returns:
            The loss as it was differentiated, without the loss scale.
        """
        self._require_optimizer("backward")
        if loss.numel() != 1:
            raise ValueError(
                f"engine.backward() takes a scalar loss, and this one has shape {tuple(loss.shape)}: reduce it first,"
                " or call loss.backward(gradient) on it"
            )
        with self._timed("backward"):
            # the caller who divides the loss himself gave us a part of it
            self._losses.append(loss.detach() if scale_wrt_gas else loss.detach() * self._accumulation)
            if scale_wrt_gas and self._accumulation > 1:
                loss = loss / self._accumulation
            _driving.append(self)
            try:
                (loss * self.loss_scale() if self.loss_scale() != 1.0 else loss).backward(retain_graph=retain_graph)
            finally:
                _driving.pop()
        return loss.detach()

    def _begin_backward(self) -> float:
        """What the gradients of the backward that starts now are to be multiplied with.

        1 inside ``backward``, which has scaled the loss. Plain ``loss.backward()`` has not: this does what is left.
        Where another engine's ``backward`` runs through this one, the loss carries that engine's scale.
        """
        self._num_backwards += 1
        if _driving:
            return self.loss_scale() / _driving[-1].loss_scale()
        self._watch.begin_backward()
        if self.loss_scale() != 1.0 and not self._loss_was_scaled:
            raise ValueError(
                f"fp16 has a loss scale ({self.loss_scale():g}), and this loss was not multiplied with it: call"
                " engine.backward(loss), or engine.scale(loss).backward()"
            )
        return 1.0 / self._accumulation

    def _after_backward(self) -> None:
        self._loss_was_scaled = False
        self._watch.end_backward()

    def _on_discard(self) -> None:
        self._losses.clear()
        self._num_backwards = 0
        self.micro_steps -= self.micro_steps % self._accumulation
        self._plan_sending()
        log.warning("the last backward did not finish: the gradients of its step are dropped, and the step starts anew")

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At an accumulation boundary: update the parameters, advance the schedule; elsewhere: count the micro-step.

        A step whose gradients are not finite is skipped on all ranks, said in ``last_step``, and logged.
        """
        self._require_optimizer("step")
        self._check_save()
        self._applied = False
        if self.is_gradient_accumulation_boundary():
            with self._timed("step"):
                self._step(lr_kwargs or {})
            self._report()
        self.micro_steps += 1
        self._plan_sending()
        self._save_if_asked()

    def _step_instead(self) -> bool:
        """``optimizer.step()`` of the caller is ``engine.step()``: micro-steps, counters and schedule go with it."""
        if self._stepping:
            return False
        self.step()
        return True

    def _step(self, lr_kwargs: dict[str, Any]) -> None:
        optimizer = self._require_optimizer("step")
        self._lr_of_step = [group["lr"] for group in optimizer.param_groups]
        self._scale_of_step = optimizer.loss_scale
        self._stepping = True
        try:
            optimizer.step()
        finally:
            self._stepping = False
        self._applied = not optimizer.overflow
        if optimizer.overflow:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        managed = self.config.managed_gradient_accumulation
        num_micro = self._accumulation if managed else self._num_backwards
        self.global_samples += num_micro * self._micro_batch * self.mesh.world
        self._num_backwards = 0

    def _report(self) -> None:
        facts = self._require_optimizer("step").last
        assert facts is not None, "a report follows a step"
        ledger, on_gpu = self.sharded.ledger, self.mesh.device.type == "cuda"
        self.last_step = StepReport(
            step=self.global_steps,
            loss=self._mean_loss(),
            grad_norm=facts.grad_norm,
            lr=self._lr_of_step,
            loss_scale=self._scale_of_step,
            skipped=facts.skipped,
            skipped_reason=facts.reason,
            bytes_of=dict(ledger.bytes_of),
            peak_of=dict(ledger.peak_of),
            peak_bytes=torch.cuda.max_memory_allocated(self.mesh.device) if on_gpu else ledger.peak_bytes,
            host_bytes=ledger.host.total_bytes,
            host_peak_bytes=ledger.host.peak_bytes,
            disk_bytes=ledger.disk.total_bytes,
            links=self.sharded.homes.traffic(),
            **{f"{name}_ms": value for name, value in self._times_ms.items()},
        )
        self._losses.clear()
        self._times_ms = dict.fromkeys(self._times_ms, 0.0)
        ledger.reset_peaks()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.mesh.device)
        every = self.config.steps_per_print
        prints = bool(every) and every != float("inf")
        due = prints and self.global_steps % max(1, int(every or 1)) == 0
        if self.mesh.rank == 0:
            self._log(self.last_step, due, prints)
        self._observe_step(self.last_step, due or not prints)

    def _log(self, report: StepReport, due: bool, prints: bool) -> None:
        """A step that was not finite always; the facts every ``steps_per_print``; the times as often, if they are
        asked for."""
        if report.skipped_reason:
            log.warning("step %d: %s", report.step, report.skipped_reason)
        elif due:
            log.info("%s", report)
        if self.config.wall_clock_breakdown and (due or not prints):
            log.info("%s", report.times())

    def _mean_loss(self) -> float | None:
        if not self._losses:
            return None
        return comm.read_scalars(self.mesh, torch.stack(self._losses).float().mean().view(1))[0]

    # accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-step ends an accumulation, so that ``step`` will update."""
        if self._boundary is not None:
            return self._boundary
        return not self.config.managed_gradient_accumulation or (self.micro_steps + 1) % self._accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """The caller decides from now on, per micro-step and before its backward, where an accumulation ends."""
        self._boundary = is_boundary
        self._plan_sending()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate without exchanging gradients (stages 0 and 1; the others keep no whole gradient to add to)."""
        if self.sharded.stage.shards_gradients:
            raise ValueError(
                f"no_sync() at ZeRO stage {self.sharded.stage.number}: gradients are sharded after every backward,"
                " there is no whole one to keep. Use stage 0 or 1, or leave no_sync out: accumulation works without it"
            )
        self._syncing = False
        self._plan_sending()
        try:
            yield
        finally:
            self._syncing = True
            self._plan_sending()

    def _plan_sending(self) -> None:
        reducer = self.sharded.reducer
        reducer.num_accumulated = self._accumulation
        at_end = self.is_gradient_accumulation_boundary() and self._syncing
        reducer.sending = self.sharded.stage.shards_gradients or at_end

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the accumulation; the micro batch stays."""
        per_pass = self._micro_batch * self.mesh.world
        if train_batch_size < per_pass or train_batch_size % per_pass:
            raise ValueError(
                f"train_batch_size {train_batch_size} is not a multiple of micro batch {self._micro_batch} × world"
                f" {self.mesh.world} = {per_pass}"
            )
        self._accumulation = train_batch_size // per_pass
        self._plan_sending()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last step."""
        self.away.require_here("zero_grad()")
        if self.sharded.stepper is not None:
            self.sharded.stepper.zero_grad()

    # the model as a whole

    def explain(self) -> str:
        """The plan as a table: unit, layout, dtypes, bytes, who gathers when."""
        return explain_plan(self.sharded, self.sharded.stepper)

    def compile(self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """torch.compile inside every unit, between its hooks: communication stays outside the graphs."""
        for group in self.sharded.groups[1:]:
            for module in group.modules:
                module.forward = torch.compile(module.forward, backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Give the module back as it was: whole on every rank, without hooks. Collective at stage 3."""
        self._end_observing()
        self.wait_for_checkpoint()
        self._saver = None
        if self._signals is not None:
            self._signals.close()
        self.away.close()
        self.sharded.destroy()

    def _require_optimizer(self, call: str) -> ZeroOptimizer:
        if self.sharded.stepper is None:
            raise ValueError(
                f"engine.{call}() needs an optimizer, and this engine has none: pass initialize(optimizer=...), or give"
                ' the config an "optimizer" block'
            )
        self.away.require_here(f"engine.{call}()")
        return self.sharded.stepper

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        wait: Callable[[], None] | None = None
        if self.config.wall_clock_breakdown and self.mesh.device.type == "cuda":
            wait = torch.cuda.synchronize
            wait()
        start = time.perf_counter()
        with self.mesh.spans.phase(name, self._watch.owner), self._flops.phase(name, self.global_steps):
            yield
            if wait is not None:
                wait()
        self._times_ms[name] += 1e3 * (time.perf_counter() - start)
