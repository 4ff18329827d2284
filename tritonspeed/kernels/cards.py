"""What a launch depends on of a GPU: its properties, not its name, because cards of one architecture differ.

``CARDS`` are typical cards of the architectures that every kernel is compiled for, so that launches can be chosen and
looked at where no GPU is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as a kernel's launch sees it.

    Attributes:
        backend: Triton's name: "cuda", "hip" or "xpu"; "interpreter" where kernels are interpreted.
        arch: "sm_90", "gfx942", ...
        warp_size: threads that march together.
        num_sms: streaming multiprocessors (AMD: compute units).
        max_shared_bytes: shared memory that one block may have.
        l2_bytes: the last cache before the memory.
        memory_bytes: the whole memory.
    """

    backend: str
    arch: str
    warp_size: int
    num_sms: int
    max_shared_bytes: int
    l2_bytes: int
    memory_bytes: int

    @property
    def key(self) -> str:
        """The card in a file's name: "cuda/sm_90/132sm-50mib-80gib"."""
        gib = round(self.memory_bytes / GIB)
        return f"{self.backend}/{self.arch}/{self.num_sms}sm-{self.l2_bytes // MIB}mib-{gib}gib"

    @property
    def compute_capability(self) -> int:
        """90 for sm_90; 0 where the backend is not CUDA."""
        return int(self.arch.removeprefix("sm_")) if self.backend == "cuda" else 0


INTERPRETER = Card("interpreter", "interpreter", 32, 4, 227 * KIB, 50 * MIB, 8 * GIB)  # few SMs: programs are slow

CARDS = {
    "sm_80": Card("cuda", "sm_80", 32, 108, 163 * KIB, 40 * MIB, 80 * GIB),  # A100
    "sm_86": Card("cuda", "sm_86", 32, 82, 99 * KIB, 6 * MIB, 24 * GIB),  # RTX 3090
    "sm_89": Card("cuda", "sm_89", 32, 128, 99 * KIB, 72 * MIB, 24 * GIB),  # RTX 4090
    "sm_90": Card("cuda", "sm_90", 32, 132, 227 * KIB, 50 * MIB, 80 * GIB),  # H100
    "sm_100": Card("cuda", "sm_100", 32, 148, 227 * KIB, 126 * MIB, 180 * GIB),  # B200
    "sm_120": Card("cuda", "sm_120", 32, 170, 99 * KIB, 96 * MIB, 32 * GIB),  # RTX 5090
    "gfx90a": Card("hip", "gfx90a", 64, 104, 64 * KIB, 8 * MIB, 64 * GIB),  # one die of an MI250X
    "gfx942": Card("hip", "gfx942", 64, 304, 64 * KIB, 256 * MIB, 192 * GIB),  # MI300X, its Infinity Cache as L2
    "gfx950": Card("hip", "gfx950", 64, 256, 160 * KIB, 256 * MIB, 288 * GIB),  # MI355X
    "gfx1100": Card("hip", "gfx1100", 32, 96, 64 * KIB, 96 * MIB, 24 * GIB),  # RX 7900 XTX
}

_SHARED_BYTES = {name: card.max_shared_bytes for name, card in CARDS.items()}


@cache
def read_card(kind: str, index: int) -> Card:
    """The card behind a device of this machine."""
    properties: Any = torch.get_device_module(kind).get_device_properties(index)
    if kind == "xpu":
        num_sms, l2_bytes = properties.gpu_subslice_count, getattr(properties, "last_level_cache_size", 0)
        return Card("xpu", "xpu", 32, num_sms, 64 * KIB, l2_bytes, properties.total_memory)
    if torch.version.hip is not None:
        arch, backend = properties.gcnArchName.split(":")[0], "hip"
    else:
        arch, backend = f"sm_{properties.major}{properties.minor}", "cuda"
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0) or _SHARED_BYTES.get(arch, 64 * KIB)
    return Card(
        backend, arch, properties.warp_size, properties.multi_processor_count, shared_bytes, properties.L2_cache_size,
        properties.total_memory,
    )  # fmt: skip
