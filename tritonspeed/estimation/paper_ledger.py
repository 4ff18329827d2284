"""A ledger of bytes that are only counted, by phase of a training step."""

from __future__ import annotations

from collections.abc import Callable

from tritonspeed.zero.ledger import Account, Ledger


class PaperLedger(Ledger):
    """A ledger that also knows the highest sum over device and host, which on a CPU are one memory, in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.host = _Watched(self._watch)
        self.phase = "rest"
        self.together: dict[str, int] = {}

    def begin(self, phase: str) -> None:
        """From now on it is ``phase``."""
        self.phase = phase
        self._watch()

    def add(self, category: str, num_bytes: int) -> None:
        super().add(category, num_bytes)
        self._watch()

    def _watch(self) -> None:
        total = self.total_bytes + self.host.total_bytes
        self.together[self.phase] = max(total, self.together.get(self.phase, 0))


class _Watched(Account):
    def __init__(self, watch: Callable[[], None]) -> None:
        super().__init__()
        self._watch_all = watch

    def add(self, category: str, num_bytes: int) -> None:
        super().add(category, num_bytes)
        self._watch_all()
