"""What every rank has issued, so that two ranks that part ways get an error that names both places, not a hang.

Each collective is entered as (operation, unit, elements) into a rolling 64-bit hash and a ring of the last entries.
The hash rides along on the gradient-norm exchange of every step: equal hashes mean equal histories. Where a rank waits
in a collective beyond its time limit, it and every other rank publish their position to the store, and the error
says where each of them stands.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

KEPT_ENTRIES = 512  # a step of a 100-layer model is about 400 collectives
HEARTBEAT_S = 2.0
STUCK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One collective as this rank issued it."""

    seq: int
    operation: str
    unit: str
    num_elems: int

    def __str__(self) -> str:
        return f"#{self.seq} {self.operation} of '{self.unit}' ({self.num_elems:,} elements)"


class FlightRecorder:
    """The history of one rank's collectives over one mesh.

    Args:
        rank, world: this rank's place.
        store: a ``torch.distributed`` store, to publish positions through; None records only.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        self.rank, self.world = rank, world
        self.seq = 0
        self.hash = 0
        self.entries: deque[Entry] = deque(maxlen=KEPT_ENTRIES)
        self._store = store
        self._waiting_since: float | None = None
        self._warned = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def record(self, operation: str, unit: str, num_elems: int) -> None:
        """Enter one collective into the hash and the log."""
        self.seq += 1
        entry = Entry(self.seq, operation, unit, num_elems)
        digest = hashlib.blake2b(f"{self.hash}|{operation}|{unit}|{num_elems}".encode(), digest_size=8).digest()
        self.hash = int.from_bytes(digest, "little")
        self.entries.append(entry)
        if self._store is not None and self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="tritonspeed-watchdog", daemon=True)
            self._thread.start()
            # a thread inside the store when the interpreter ends takes the process down with it
            atexit.register(self.close)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a blocking wait: a failure inside is re-raised with the position of every rank."""
        self._waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.where_everyone_stands()}") from error
        finally:
            self._waiting_since = None
            self._warned = False

    def position(self) -> str:
        """One line: the last collective this rank issued, and whether it waits in it."""
        last = str(self.entries[-1]) if self.entries else "nothing yet"
        since = self._waiting_since
        doing = f"waiting for {time.monotonic() - since:.0f} s in" if since is not None else "computing after"
        return f"{doing} {last}"

    def where_everyone_stands(self) -> str:
        """A line per rank, read from the store; ranks that published nothing are named as silent."""
        lines = [f"  rank {self.rank}: {self.position()}"]
        if self._store is not None:
            self._publish()
            time.sleep(1.5 * HEARTBEAT_S)  # let the others' watchdogs beat once more
            for rank in range(self.world):
                if rank != self.rank:
                    lines.append(f"  rank {rank}: {self._read(rank)}")
        return "Where the ranks stand:\n" + "\n".join(lines)

    def history_json(self) -> str:
        """The kept entries, for the comparison of two ranks whose hashes differ."""
        return json.dumps([[e.seq, e.operation, e.unit, e.num_elems] for e in self.entries])

    def close(self) -> None:
        """Stop the watchdog, and wait until it has."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * HEARTBEAT_S)
            atexit.unregister(self.close)
        self._store = None

    def _key(self, rank: int) -> str:
        return f"tritonspeed/position/{rank}"

    def _publish(self) -> None:
        self._store.set(self._key(self.rank), self.position())

    def _read(self, rank: int) -> str:
        try:
            if self._store.check([self._key(rank)]):
                return self._store.get(self._key(rank)).decode()
        except RuntimeError as error:
            return f"unknown, the store is gone ({error})"
        return "silent: it has issued no collective, or has ended"

    def _beat(self) -> None:
        import logging

        log = logging.getLogger("tritonspeed")
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._publish()
            except RuntimeError:  # the store has gone with rank 0: nothing left to tell
                return
            since = self._waiting_since
            if since is not None and not self._warned and time.monotonic() - since > STUCK_AFTER_S:
                self._warned = True
                others = [f"  rank {rank}: {self._read(rank)}" for rank in range(self.world) if rank != self.rank]
                log.warning("rank %d is %s. The others:\n%s", self.rank, self.position(), "\n".join(others))


def first_difference(histories: list[str]) -> str:
    """The first place where the ranks' histories differ, one line per rank (input: each rank's ``history_json``)."""
    logs = [{entry[0]: Entry(*entry) for entry in json.loads(text)} for text in histories]
    shared = sorted(set.union(*(set(log) for log in logs)))
    for seq in shared:
        entries = [log.get(seq) for log in logs]
        if len({(e.operation, e.unit, e.num_elems) if e else None for e in entries}) > 1:
            return "\n".join(f"  rank {rank}: {entry or 'nothing'}" for rank, entry in enumerate(entries))
    return f"  before the last {KEPT_ENTRIES} collectives, which agree"
