"""Where the bytes of training state live, and what is asked of a place: three tiers, one small protocol.

    DEVICE   where the modules compute
    HOST     the host's memory, page-locked where a GPU reads it
    DISK     files of safetensors, read and written around the page cache

A *flat* is one rank's part of one tensor of a bucket (its masters, one of its moments, its 16-bit copy): a run of
elements that is fetched before it is used and stored after it was changed. What is resident is its own fetch, so a
resident step and an offloaded one are the same lines.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Tier(Enum):
    """A place for bytes; the values are a ds_config.json's words."""

    DEVICE = "none"
    HOST = "cpu"
    DISK = "nvme"

    @classmethod
    def of(cls, name: str | Tier) -> Tier:
        """The tier of a name: none or device, cpu or host, nvme or disk.

        Raises:
            ValueError: another name.
        """
        if isinstance(name, Tier):
            return name
        names = {"none": cls.DEVICE, "device": cls.DEVICE, "cpu": cls.HOST, "host": cls.HOST}
        names |= {"nvme": cls.DISK, "disk": cls.DISK}
        if name not in names:
            raise ValueError(f"offload to {name!r}: the tiers are {', '.join(names)}")
        return names[name]


class Handle(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Until it has ended; raises what went wrong."""


class Flat(Protocol):
    """A run of elements that lives in some tier.

    Attributes:
        numel, dtype: of the whole run.
        page_elems: fetches and stores start and end at multiples of it, or at the end.
    """

    numel: int
    dtype: torch.dtype
    page_elems: int

    def fetch(self, lo: int, hi: int, into: Tensor) -> Handle:
        """Start reading elements [lo, hi) into ``into``, (hi - lo,) in host memory that begins on a page."""

    def store(self, lo: int, values: Tensor) -> Handle:
        """Start writing ``values``, contiguous in host memory that begins on a page, from element ``lo`` on."""


class Done:
    """A handle of what needed no time."""

    def wait(self) -> None:
        """Nothing is left to wait for."""
