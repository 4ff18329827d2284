"""A scheduler's signal ends the step that is under way, not the process: so that it can be saved.

    SIGTERM on any rank  →  a flag  →  asked() at the end of the step, the same answer on every rank
                         →  the engine saves, and exits with the code that the scheduler expects

Processes that a rank forks (data-loader workers) have the handler of before.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from tritonspeed import comm
from tritonspeed.comm import Mesh

log = logging.getLogger("tritonspeed")

Handler = Callable[[int, FrameType | None], Any] | int | None
_installed: weakref.WeakSet[SaveOnSignal] = weakref.WeakSet()


class SaveOnSignal:
    """Remembers that one of ``signals`` came. One that comes again, while the state is being saved, changes nothing.

    Handlers belong to the main thread: made elsewhere, this rank hears of other ranks' signals only, and says so.

    Args:
        signals: what the scheduler sends.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        self.came: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}
        if threading.current_thread() is not threading.main_thread():
            log.warning(
                "%s would end this process unsaved: handlers can only be set in the main thread, so call initialize()"
                " there",
                " or ".join(each.name for each in signals),
            )
            return
        _watch_forks()
        for each in signals:
            self._before[each] = signal.signal(each, self._remember)
        _installed.add(self)

    def asked(self, mesh: Mesh) -> bool:
        """Whether the signal came to any rank, the same on all of them. Collective: a few bytes from every rank."""
        came = torch.tensor([self.came is not None], dtype=torch.float64, device=mesh.device)
        return max(comm.read_scalars(mesh, comm.exchange(mesh, came).flatten())) > 0

    def close(self) -> None:
        """Give the signals back to who had them before, unless someone else has taken them since."""
        _installed.discard(self)
        for each, before in self._before.items():
            if signal.getsignal(each) == self._remember:
                signal.signal(each, before if before is not None else signal.SIG_DFL)
        self._before.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)


_watching = False


def _watch_forks() -> None:
    """From now on a forked process starts without our handlers."""
    global _watching
    if not _watching and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_child_alone)
        _watching = True


def _leave_child_alone() -> None:
    for each in list(_installed):
        each.close()
