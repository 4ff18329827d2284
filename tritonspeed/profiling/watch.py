"""What one engine has listened to: what its config asks for all along, and a trace while one is recorded."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import finalize

from tritonspeed.comm.spans import PHASE
from tritonspeed.config import Config
from tritonspeed.log import asked_for
from tritonspeed.profiling.breakdown import Breakdown, StepTimes, table_of
from tritonspeed.profiling.comms import start_log, stop_log
from tritonspeed.profiling.trace import StepFacts, Trace
from tritonspeed.profiling.units import UnitTimes
from tritonspeed.zero import ShardedModel

if TYPE_CHECKING:
    from tritonspeed.comm import Span

log = asked_for()

STEPS_PER_TABLE = 10  # where the config has no steps_per_print (Accelerate makes it inf): DeepSpeed's default of it
FIRST_TABLE = 3  # and one early, for those who look at a few steps


class Watch:
    """The listeners of one engine.

    Args:
        sharded: its model.
        config: resolved.

    Attributes:
        owner: whose the phases of the engine's steps are.
        last_times: the last table of ``wall_clock_breakdown``, as numbers.
    """

    def __init__(self, sharded: ShardedModel, config: Config) -> None:
        self._sharded, self._mesh, self._spans = sharded, sharded.mesh, sharded.mesh.spans
        self.owner = object()
        self.last_times: StepTimes | None = None
        self._units: UnitTimes | None = None
        self._trace: Trace | None = None
        self._backward: Span | None = None
        self._breakdown: Breakdown | None = None
        every = config.steps_per_print
        is_given = bool(every) and math.isfinite(every or 0)
        self._every = max(1, int(every or 1)) if is_given else STEPS_PER_TABLE
        self._first = self._every if is_given else FIRST_TABLE
        # the recorder outlives the engine: whatever becomes of the engine, it is told to forget our listeners
        self._endings: list[finalize] = []
        if start_log(self._mesh, config):
            self._endings.append(finalize(self, stop_log, self._spans))
        if config.wall_clock_breakdown:
            self._breakdown = Breakdown(sharded, self.owner)
            self._spans.listen(self._breakdown, self._mesh.device)
            self._endings.append(finalize(self, self._spans.leave, self._breakdown))
            self._watch_units()

    def begin_backward(self) -> None:
        """A backward that nobody called ``engine.backward`` for."""
        if self._spans.on and self._backward is None:
            self._backward = self._spans.open(PHASE, "backward")
            self._backward.owner = self.owner

    def end_backward(self) -> None:
        """It has ended."""
        if self._units is not None:
            self._units.end_backward()
        if self._backward is not None:
            self._backward.close()
            self._backward = None

    def end_step(self, facts: StepFacts) -> None:
        """An optimizer step has ended."""
        if not self._spans.on:
            return
        now = time.perf_counter()
        self._spans.mark()
        self._spans.collect()
        if self._breakdown is not None:
            self._breakdown.end_step(now)
            if facts.step % self._every == 0 or facts.step == self._first:
                self.last_times = times = self._breakdown.take()
                times.exchange(self._mesh)
                if self._mesh.rank == 0:
                    log.info("%s", table_of(times, facts.step))
        if self._trace is not None and self._trace.end_step(now, facts):
            self._trace.close()
        if self._breakdown is not None:
            self._breakdown.start_again(time.perf_counter())

    def trace(self, steps: int, folder: str | Path | None) -> Trace:
        """See ``Engine.trace``."""
        if self._trace is not None:
            raise ValueError(
                "a trace is being recorded already: close() it, or let its steps pass, before the next one"
            )
        self._watch_units()
        assert self._units is not None, "units are watched from here on"
        self._trace = Trace(self._sharded, self._units, steps, folder, self._end_trace)
        return self._trace

    def _end_trace(self) -> None:
        self._trace = None
        if self._breakdown is None and self._units is not None:
            self._units.remove()
            self._units = None

    def _watch_units(self) -> None:
        if self._units is None:
            self._units = UnitTimes(self._sharded, self._spans)

    def close(self) -> None:
        """Let go of everything; a trace that is being recorded is dropped."""
        if self._trace is not None:
            self._trace.drop()
        if self._units is not None:
            self._units.remove()
            self._units = None
        for ending in self._endings:
            ending()
