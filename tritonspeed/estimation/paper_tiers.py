"""What the walk's buckets live in, without the memory: the optimizer's tensors, files that are only measured, tiers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonspeed.comm import Mesh
from tritonspeed.kernels.dynamic_code import MIN_ELEMS, num_blocks
from tritonspeed.offload.page_file import PageFile, Piece, header_bytes
from tritonspeed.zero.homes import PAGE_ELEMS, Homes
from tritonspeed.zero.layout import round_up
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.plan import BucketPlan
from tritonspeed.zero.stages import Stage


@dataclass(frozen=True)
class States:
    """The optimizer's tensors: how many per element, and in which type."""

    num_moments: int
    kind: str = "fp32"

    def slice_bytes(self, num_elems: int) -> int:
        """Of one rank's slice of a bucket, whose parameters are taken to be one optimizer group."""
        return sum(dtype.itemsize * num_elems for dtype in self.kinds(num_elems).values()) + self.scale_bytes(num_elems)

    def kinds(self, num_elems: int) -> dict[str, torch.dtype]:
        """Names and types of those that have as many elements as the slice: what is on disk, where masters are."""
        dtype = {"bf16": torch.bfloat16, "8bit": torch.uint8}.get(self.kind, torch.float32)
        if self.kind == "8bit" and num_elems < MIN_ELEMS:
            dtype = torch.float32
        return {f"moment {i}": dtype for i in range(self.num_moments)}

    def scale_bytes(self, num_elems: int) -> int:
        """Of what goes with moments in 8 bits, and stays in memory."""
        blocks = num_blocks(0, num_elems) if self.kind == "8bit" and num_elems >= MIN_ELEMS else 0
        return self.num_moments * torch.float32.itemsize * blocks


class PaperFlat(NamedTuple):
    """Stands in for a ``DiskFlat``."""

    numel: int
    dtype: torch.dtype


@dataclass
class _PaperFolder:
    """Stands in for a ``DiskFolder``: counts the files that would be in it, headers and both slots."""

    rank: int
    world: int
    num_bytes: int = 0

    def flat(
        self, bucket: str, kind: str, dtype: torch.dtype, numel: int, pieces: Sequence[Piece], slots: int = 2
    ) -> PaperFlat:
        file = PageFile(bucket, kind, dtype, numel, tuple(pieces), self.rank, self.world)
        self.num_bytes += slots * (len(header_bytes(file)) + file.data_bytes)
        return PaperFlat(numel, dtype)


class PaperHomes(Homes):
    """The run's tiers, on the meta device.

    Args:
        options: sizes, and what is to live where.
        device: of the ranks, "cpu" or "cuda".
        world: ranks.
        plans: every bucket to come.
    """

    def __init__(
        self,
        options: ShardOptions,
        device: str,
        world: int,
        stage: Stage,
        ledger: Ledger,
        plans: Iterable[BucketPlan],
    ) -> None:
        backend = "none" if world == 1 else "nccl" if device == "cuda" else "gloo"
        super().__init__(options.offload, Mesh(0, world, torch.device(device), backend), stage, ledger, plans)
        self.folder = _PaperFolder(0, world)
        self.sub_group_size = options.sub_group_size
        longest = round_up(options.sub_group_size, PAGE_ELEMS) or self.offload.tile_elems
        self.tile_elems = min(self.offload.tile_elems, longest)

    def empty(self, numel: int, dtype: torch.dtype, crosses: bool = False) -> Tensor:
        return torch.empty(numel, dtype=dtype, device="meta")

    def _folder(self, path: str) -> Any:
        return self.folder
