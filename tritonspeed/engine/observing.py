"""What is watched of a run while it goes on. Nothing here changes a number of the training, or an order of events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonspeed.monitor import MonitorMaster
from tritonspeed.profiling import StepTimes, Trace, Watch, log_summary
from tritonspeed.profiling.flops_step import FlopsOfStep
from tritonspeed.profiling.flops_table import FlopsProfile
from tritonspeed.profiling.reduce_time import ReduceTime
from tritonspeed.profiling.throughput import Throughput

if TYPE_CHECKING:
    from tritonspeed.comm import Mesh
    from tritonspeed.config import Config
    from tritonspeed.engine.report import StepReport
    from tritonspeed.precision import Policy
    from tritonspeed.zero import ShardedModel

log = logging.getLogger("tritonspeed")


class Observing:
    """The half of the engine that watches. The other halves give the attributes below."""

    config: Config
    policy: Policy
    mesh: Mesh
    sharded: ShardedModel
    global_samples: int
    get_lr: Callable[[], list[float]]
    loss_scale: Callable[[], float]
    _micro_batch: Any

    def _begin_observing(self) -> None:
        """The engine has been made: start what its config asks for."""
        self.monitor = MonitorMaster(self.config, self.mesh.rank)
        self._watch = Watch(self.sharded, self.config)
        self._flops = FlopsOfStep(self.sharded, self.config, self.policy)
        every = self.config.steps_per_print
        says_speed = self.config.timers.throughput.enabled and bool(every) and every != float("inf")
        is_first = self.mesh.rank == 0
        self._speed = Throughput(self.sharded.model, self.mesh.world) if says_speed and is_first else None
        self._reduce_time: ReduceTime | None = None
        if is_first and self.monitor.enabled and (self.config.wall_clock_breakdown or self._flops.is_asked):
            self._reduce_time = ReduceTime(self._watch.owner)
            self.mesh.spans.listen(self._reduce_time, self.mesh.device)

    def _observe_step(self, report: StepReport, due: bool) -> None:
        """A step has been made; on every rank.

        Args:
            report: its facts.
            due: it is one of those that ``steps_per_print`` prints.
        """
        self._watch.end_step(report)
        self._flops.end_step(report.step, self._micro_batch)
        if self._speed is not None:
            profile = self._flops.profile
            if profile is not None:
                self._speed.counted = profile.num_forward + profile.num_backward, profile.num_samples
            self._speed.end_step(report, self.global_samples, due)
        if self.monitor.enabled:
            self._monitor_step(report)
            if due:
                self.monitor.flush()

    def _monitor_step(self, report: StepReport) -> None:
        self.monitor.write_step(
            report,
            self.global_samples,
            lr=next(iter(self.get_lr()), None),
            loss_scale=self.loss_scale() if self.config.fp16.enabled else None,
            reduce_ms=self._reduce_time.take_ms() if self._reduce_time is not None else None,
        )

    def _end_observing(self) -> None:
        """The engine is destroyed: let go of everything."""
        self.monitor.close()
        self._watch.close()
        self._flops.close()
        if self._speed is not None:
            self._speed.close()
        if self._reduce_time is not None:
            self.mesh.spans.leave(self._reduce_time)

    @property
    def last_flops(self) -> FlopsProfile | None:
        """What ``flops_profiler`` found, as numbers, on rank 0; None before. ``print(engine.last_flops.table())``."""
        return self._flops.profile

    @property
    def last_times(self) -> StepTimes | None:
        """The last table of ``wall_clock_breakdown``, as numbers; None before the first."""
        return self._watch.last_times

    def comms_summary(self, show_straggler: bool = False, return_dict: bool = False) -> Any:
        """Log the table of collectives (``comms_logger``), on rank 0.

        Args:
            show_straggler: a column more: how much longer this rank took in all than the fastest. Collective.
            return_dict: return ``{"summary": {operation: {message bytes: row}}}``, on every rank.
        """
        return log_summary(show_straggler, return_dict, self.mesh)

    def trace(self, steps: int = 3, folder: str | Path | None = None) -> Trace:
        """Record the time and memory of the next ``steps`` optimizer steps, all ranks on one clock. Collective.

        Rank 0 writes a trace in Chrome's format (open it at ui.perfetto.dev: steps, compute, communication and offload
        of every rank, memory by owner), and a picture of it where matplotlib is installed. Recording ends after the
        last step, or with the block:

            with engine.trace(steps=3, folder="traces") as trace:
                for batch in batches:
                    ...
            trace.json_path, trace.png_path

        or, without a block, ``engine.trace(steps=3)`` before the steps. Under Hugging Face's Trainer the engine is
        ``trainer.model_wrapped``: call it in a callback's ``on_step_end``. Memory is what the ledger knows, model state
        and communication; a GPU's own count, activations included, has a curve beside it.

        Args:
            steps: how many, at least 1.
            folder: where rank 0 writes; None is "traces".
        """
        return self._watch.trace(steps, folder)
