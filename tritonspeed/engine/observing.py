"""What is watched of a run while it goes on. Nothing here changes a number of the training, or an order of events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from tritonspeed.monitor import MonitorMaster

if TYPE_CHECKING:
    from tritonspeed.comm import Mesh
    from tritonspeed.config import Config
    from tritonspeed.engine.report import StepReport
    from tritonspeed.zero import ShardedModel

log = logging.getLogger("tritonspeed")


class Observing:
    """The half of the engine that watches. The other halves give the attributes below."""

    config: Config
    mesh: Mesh
    sharded: ShardedModel
    global_samples: int
    get_lr: Callable[[], list[float]]
    loss_scale: Callable[[], float]

    def _begin_observing(self) -> None:
        """The engine has been made: start what its config asks for."""
        self.monitor = MonitorMaster(self.config, self.mesh.rank)

    def _observe_step(self, report: StepReport, due: bool) -> None:
        """A step has been made; on every rank.

        Args:
            report: its facts.
            due: it is one of those that ``steps_per_print`` prints.
        """
        if self.monitor.enabled:
            self._monitor_step(report)
            if due:
                self.monitor.flush()

    def _monitor_step(self, report: StepReport) -> None:
        with_times = self.config.wall_clock_breakdown or self.config.flops_profiler.enabled
        self.monitor.write_step(
            report,
            self.global_samples,
            lr=next(iter(self.get_lr()), None),
            loss_scale=self.loss_scale() if self.config.fp16.enabled else None,
            reduce_ms=0.0 if with_times else None,
        )

    def _end_observing(self) -> None:
        """The engine is destroyed: let go of everything."""
        self.monitor.close()
