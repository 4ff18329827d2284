"""Figures on their way to writers: a thread writes what a step leaves, and the step goes on.

    put()  →  waiting figures  →  every half second, or flush()  →  each writer, which then puts them on its disk

So a process that is killed loses what came in its last half second. A writer that fails is said once and left out; one
that hangs keeps its thread, not the training, and what cannot wait any longer is dropped.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

log = logging.getLogger("tritonspeed")

LINGER_S = 0.5  # figures of this long are written together
CLOSE_S = 10.0  # how long a writer may take with the last of them
MAX_WAITING = 10_000  # entries: some hours of steps


class Event(NamedTuple):
    """One figure.

    Attributes:
        name: "Train/Samples/lr".
        value: a number.
        samples: samples that all ranks had seen.
    """

    name: str
    value: float
    samples: int


class Entry(NamedTuple):
    """What is written together.

    Attributes:
        events: figures by name.
        step: all facts of a step, where they come from one.
    """

    events: Sequence[Event]
    step: dict[str, Any] | None = None


class Writer(Protocol):
    """Where figures go. Called by one thread, never by two at once."""

    name: str

    def write(self, entries: Sequence[Entry]) -> None:
        """Write them, so that they are seen by others when it returns."""

    def close(self) -> None:
        """Nothing more will come."""


class Outbox:
    """Hands entries to writers, in a thread that is started with the first one.

    Args:
        writers: each gets every entry.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = list(writers)
        self._waiting: list[Entry] = []
        self._changed = threading.Condition()
        self._is_writing = self._hurries = self._closing = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        ours = weakref.ref(self)
        self._at_exit = lambda: (outbox := ours()) is not None and outbox.close()
        atexit.register(self._at_exit)

    def put(self, entry: Entry) -> None:
        """Take an entry; returns at once."""
        if not self.writers or self._closing or os.getpid() != self._process:
            return
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                names = ", ".join(each.name for each in self.writers)
                self._give_up(f"{names}: the last figures have not been written for too long")
                return
            self._waiting.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tritonspeed monitor", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = 0.0) -> bool:
        """Write what waits now, not in half a second.

        Args:
            timeout_s: wait for it this long.

        Returns:
            Whether all is written.
        """
        with self._changed:
            if not self._waiting and not self._is_writing:
                return True
            self._hurries = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._is_writing, timeout_s)

    def close(self) -> None:
        """Write what waits, and close the writers; a writer that hangs is left behind, and that is said."""
        atexit.unregister(self._at_exit)
        if self._closing or os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            self._close_writers()
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            names = ", ".join(each.name for each in self.writers)
            log.warning("%s: not done %g s after the end of the run: its last figures are missing", names, CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._linger()
                entries, self._waiting = self._waiting, []
                self._is_writing, self._hurries = bool(entries), False
            for writer in list(self.writers):
                self._write(writer, entries)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                if self._closing and not self._waiting:
                    break
        self._close_writers()

    def _linger(self) -> None:
        until = time.monotonic() + LINGER_S
        while not (self._hurries or self._closing) and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _write(self, writer: Writer, entries: Sequence[Entry]) -> None:
        try:
            if entries:
                writer.write(entries)
        except Exception as error:  # whatever a library raises: figures are not worth a run
            self.writers.remove(writer)
            log.warning("%s is off from here on, training goes on: %s", writer.name, _said(error))

    def _close_writers(self) -> None:
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                log.warning("%s: could not be closed: %s", writer.name, _said(error))

    def _give_up(self, reason: str) -> None:
        log.warning("%s. They are off from here on, training goes on", reason)
        self.writers.clear()
        self._waiting.clear()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
