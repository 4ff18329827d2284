"""Bytes this rank holds, by category: the memory equation is held to what was really allocated."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from tritonspeed.offload import Tier

CATEGORIES = ("parameters", "gradients", "optimizer", "communication")
NEW_PEAK = ""  # in place of a category: a new peak starts
Change = tuple[float, str, int]  # seconds (``time.perf_counter``), category, its bytes from then on


@dataclass
class Account:
    """Bytes in one place, by category, and the highest total since ``reset_peak``.

    Attributes:
        changes: what has changed when, while somebody wants to know.
    """

    bytes_of: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak_bytes: int = 0
    peak_of: dict[str, int] = field(default_factory=dict)
    changes: list[Change] | None = field(default=None, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, category: str, num_bytes: int) -> None:
        """Enter ``num_bytes`` more (or, negative, fewer) bytes of ``category``."""
        with self._lock:  # an update under the next forward enters what it makes
            self.bytes_of[category] += num_bytes
            total = self.total_bytes
            if total > self.peak_bytes:
                self.peak_bytes, self.peak_of = total, dict(self.bytes_of)
            if self.changes is not None:
                self.changes.append((time.perf_counter(), category, self.bytes_of[category]))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of.values())

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        if self.changes is not None:
            self.changes.append((time.perf_counter(), NEW_PEAK, 0))
        self.peak_bytes, self.peak_of = self.total_bytes, dict(self.bytes_of)


@dataclass
class Ledger(Account):
    """What stands on the device where modules compute; ``host`` and ``disk`` have what is offloaded.

    Every allocation of a bucket passes here. On a CPU, device and host are one memory: what is offloaded to the host is
    entered there all the same.
    """

    host: Account = field(default_factory=Account)
    disk: Account = field(default_factory=Account)

    def of(self, tier: Tier) -> Account:
        """The account of a tier."""
        return {Tier.DEVICE: self, Tier.HOST: self.host, Tier.DISK: self.disk}[tier]

    def reset_peaks(self) -> None:
        """Start new peaks everywhere."""
        for account in (self, self.host, self.disk):
            account.reset_peak()
