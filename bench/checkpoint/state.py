"""What is saved: a transformer's weights in bf16, fp32 masters and AdamW's two moments; 14 bytes a parameter.

Every rank holds its part of every tensor, cut along the first dimension, as ZeRO-3 and FSDP do. The values are one
number in all of them (`fill`), so that reading back (`held`) shows whether a checkpoint is of one step or of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = {"model": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
BYTES_PER_PARAMETER = sum(dtype.itemsize for dtype in KINDS.values())


@dataclass(frozen=True)
class Size:
    """Blocks of a transformer of that width, without embeddings: 12·width² parameters each, and a few."""

    blocks: int = 8
    width: int = 1024

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every parameter, in the order of the model."""
        with torch.device("meta"):
            model = Stack(self)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    @property
    def state_bytes(self) -> int:
        return BYTES_PER_PARAMETER * self.num_parameters


class Block(nn.Module):
    """The parameters of a transformer's block, and a cheap forward through all of them: x [B, D] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.out(self.qkv(self.norm(x)).chunk(3, -1)[2])
        return x + self.down(torch.relu(self.up(mixed)))


class Stack(nn.Module):
    """Blocks, one after another: x [B, D] -> 0-d."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().pow(2).mean()


def local_state(size: Size, rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """kind → name → this rank's rows, random."""
    state: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for name, shape in size.shapes().items():
        if shape[0] % world:
            raise ValueError(f"{name} has {shape[0]} rows, which {world} ranks do not share evenly")
        for kind, dtype in KINDS.items():
            state[kind][name] = torch.randn((shape[0] // world, *shape[1:])).to(dtype)
    return state
