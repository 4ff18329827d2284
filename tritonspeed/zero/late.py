"""Updates that run in a thread of their own, under the next forward: the unit that is fetched waits for its buckets.

    main      measure · decide · start ─┐ forward: unit 0   unit 1   unit 2  ...        backward     measure ...
    worker                              └ update  0 1 2 3 4 ... in forward order · commit
                                              unshard(k) waits until k has been updated

The norm is known before anything is updated, so clipping is exact and nothing is ever taken back. A step then takes
backward + max(forward, update) instead of their sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch

from tritonspeed.offload.crossing import aside
from tritonspeed.zero.bucket import Bucket


class LateUpdates:
    """At most one set of updates under way."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._done: dict[int, threading.Event] = {}
        self._buckets: list[Bucket] = []
        self._error: BaseException | None = None

    def start(self, buckets: list[Bucket], run: Callable[[], Iterator[Bucket]], end: Callable[[], None]) -> None:
        """Update ``buckets`` from now on.

        Args:
            run: updates them, and gives each as soon as it is done.
            end: what is to happen after the last.
        """
        self.finish()
        self._buckets, self._done = buckets, {id(bucket): threading.Event() for bucket in buckets}
        for bucket in buckets:
            bucket.is_updating = True
        beside, spans = aside(buckets[0].mesh.device), buckets[0].mesh.spans

        def work() -> None:
            try:
                with torch.no_grad(), beside, spans.beside():
                    for bucket in run():
                        self._done[id(bucket)].set()
                    end()
            except BaseException as error:  # raised again by whoever waits: it is no use to anyone here
                self._error = error
            finally:
                for event in self._done.values():
                    event.set()

        self._thread = threading.Thread(target=work, name="tritonspeed update", daemon=False)
        self._thread.start()

    def wait_for(self, bucket: Bucket) -> None:
        """Until ``bucket`` has been updated.

        Raises:
            RuntimeError: some update failed; its cause says why.
        """
        if id(bucket) in self._done:
            self._done[id(bucket)].wait()
        self._settle(bucket)
        self.check()

    def finish(self) -> None:
        """Until everything has been updated, and committed.

        Raises:
            RuntimeError: some update failed; its cause says why.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for bucket in self._buckets:
            self._settle(bucket)
        self._buckets, self._done = [], {}
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong: masters are then partly of this step, partly of the one before."""
        if self._error is not None:
            raise RuntimeError(
                "the optimizer's update, which runs under the next forward, failed (its cause stands above): what is on"
                " disk is the state of the last committed step, what is in memory is of no step. Start again from there"
            ) from self._error

    @staticmethod
    def _settle(bucket: Bucket) -> None:
        if bucket.is_updating:
            bucket.is_updating = False
            bucket.drop_grad()
