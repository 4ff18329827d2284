"""What is watched of a run while it goes on. Nothing here changes a number of the training, or an order of events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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

    def _begin_observing(self) -> None:
        """The engine has been made: start what its config asks for."""

    def _observe_step(self, report: StepReport, due: bool) -> None:
        """A step has been made; on every rank.

        Args:
            report: its facts.
            due: it is one of those that ``steps_per_print`` prints.
        """

    def _end_observing(self) -> None:
        """The engine is destroyed: let go of everything."""
