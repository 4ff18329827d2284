"""A trace of a few steps (``engine.trace``): recorded on every rank, gathered, and written by rank 0."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from tritonspeed import comm
from tritonspeed.comm import Span
from tritonspeed.log import asked_for
from tritonspeed.profiling.chrome import chrome_trace
from tritonspeed.profiling.recorded import TIERS, Recorded, StepMark, Stretch, aligned
from tritonspeed.profiling.units import UnitTimes
from tritonspeed.zero import ShardedModel
from tritonspeed.zero.ledger import Account

log = asked_for()

FOLDER = "traces"
BARRIERS = 5  # whose ends tell how far clocks of several machines are apart
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StepFacts(Protocol):
    """What is asked of a ``StepReport``."""

    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float | None: ...

    @property
    def grad_norm(self) -> float: ...

    @property
    def peak_bytes(self) -> int: ...


class Trace:
    """A trace that is being recorded, from the moment it is made.

    Args:
        sharded: the model whose steps are recorded.
        units: the hooks on its units.
        steps: after so many it ends by itself.
        folder: where rank 0 writes; None is "traces".
        ended: called when it has.

    Attributes:
        json_path, png_path: what was written, on rank 0; None elsewhere, and where it could not be.
        ranks: every rank's record on one clock, on rank 0.
    """

    def __init__(
        self, sharded: ShardedModel, units: UnitTimes, steps: int, folder: str | Path | None, ended: Callable[[], None]
    ) -> None:
        if steps < 1:
            raise ValueError(f"trace(steps={steps}): it takes one step at least")
        self.folder = Path(folder if folder is not None else FOLDER)
        self.json_path: Path | None = None
        self.png_path: Path | None = None
        self.ranks: list[Recorded] = []
        self._mesh, self._spans, self._units = sharded.mesh, sharded.mesh.spans, units
        self._steps_left, self._ended = steps, ended
        self._accounts: dict[str, Account] = dict(
            zip(TIERS, (sharded.ledger, sharded.ledger.host, sharded.ledger.disk), strict=True)
        )
        device = self._mesh.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self._recorded = Recorded(self._mesh.rank, f"{device}, {name}")
        self._listener = self._hear  # one bound method: it is what ``leave`` takes back
        self.is_open = True
        self._begin()

    def _begin(self) -> None:
        for tier, account in self._accounts.items():
            self._recorded.before[tier], account.changes = dict(account.bytes_of), []
        if self._mesh.device.type == "cuda":
            self._units.at_boundary = self._sample
        self._spans.listen(self._listener, self._mesh.device)
        self._recorded.begin = self._recorded.end = time.perf_counter()

    def _hear(self, span: Span) -> None:
        self._recorded.spans.append(Stretch.of(span))

    def _sample(self) -> None:
        self._recorded.allocated.append((time.perf_counter(), torch.cuda.memory_allocated(self._mesh.device)))

    def end_step(self, now: float, facts: StepFacts) -> bool:
        """A step has ended at ``now``; whether it was the last one wanted."""
        shown = {"loss": facts.loss, "grad_norm": facts.grad_norm, "peak_bytes": facts.peak_bytes}
        finite = {key: value for key, value in shown.items() if value is not None and math.isfinite(value)}
        self._recorded.steps.append(StepMark(facts.step, self._recorded.end, now, finite))
        self._recorded.end = now
        self._steps_left -= 1
        return self._steps_left <= 0

    def drop(self) -> None:
        """Record no more, and write nothing."""
        if not self.is_open:
            return
        self.is_open = False
        self._spans.leave(self._listener)
        for tier, account in self._accounts.items():
            self._recorded.changes[tier], account.changes = account.changes or [], None
        self._units.at_boundary = None
        self._ended()

    def close(self) -> None:
        """End it now, and write what there is; twice is once. Collective."""
        if not self.is_open:
            return
        self._spans.collect(wait=True)
        self._recorded.end = max(self._recorded.end, time.perf_counter())
        self.drop()
        for _ in range(BARRIERS):
            self._mesh.barrier()
            self._recorded.moments.append(time.perf_counter())
        self._recorded.host = f"{platform.node()} {_BOOT_ID.read_text() if _BOOT_ID.exists() else ''}"
        texts = comm.gather_texts(self._mesh, self._recorded.to_text(), "trace")
        if self._mesh.rank == 0:
            self.ranks = aligned(Recorded.from_text(text) for text in texts)
            self._write()
        self._mesh.barrier()  # or the others' next step would be seen to wait for it

    def _write(self) -> None:
        """A folder that cannot be written to is no reason to end a training: it is said."""
        steps = [mark.step for mark in self.ranks[0].steps]
        stem = f"trace-steps-{steps[0]}-{steps[-1]}" if steps else "trace"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{stem}.json"
            path.write_text(json.dumps(chrome_trace(self.ranks), allow_nan=False), encoding="utf-8")
            self.json_path = path
            self.png_path = _picture(self.ranks, self.folder / f"{stem}.png")
        except OSError as error:
            log.warning("the trace cannot be written to %s: %s", self.folder, error)
            return
        shown = f", {self.png_path}" if self.png_path else ""
        log.info("trace: %s (open it at ui.perfetto.dev)%s", self.json_path, shown)

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.drop()  # the other ranks may be elsewhere: nothing collective now


def _picture(ranks: list[Recorded], path: Path) -> Path | None:
    try:
        from tritonspeed.profiling.timeline import draw
    except ImportError as error:
        log.warning("no timeline was drawn: %s. Install it: pip install matplotlib", error)
        return None
    draw(ranks, path)
    return path
