"""What the compile lane builds: one module per kernel file, each with ``BUILDS``: name → ``Build``.

A build calls the function that launches (not the public one, which sends CPU tensors to the reference) on CPU tensors
without contents; the launches are recorded as they would be on each card, then compiled. Take aligned and odd shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Build:
    """One call and what its machine code must be.

    Attributes:
        call: launches; run once for every card, under ``recording``.
        widest_load: bytes that each launch's widest load from global memory must have; 0 asks nothing.
        uses_tensor_cores: matrix instructions must be there.
        cards: names in ``CARDS`` to build for; empty is all. Anything but empty needs a reason beside it.
    """

    call: Callable[[], Any]
    widest_load: int = 16
    uses_tensor_cores: bool = False
    cards: tuple[str, ...] = ()
