"""Models that are ordinary for their users and unusual for a sharder: each trains as it does without us."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, lock_step
from models import Block, Net, batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tritonspeed as ts


def frozen() -> Net:
    """An embedding, a whole block, and one bias in another."""
    net = Net(depth=4)
    for module in (net.embed, net.blocks[1]):
        module.requires_grad_(False)
    net.blocks[2].up.bias.requires_grad_(False)
    return net


def frozen_but_head() -> Net:
    net = Net()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    return net


class Unused(Net):
    """A block, and a module outside the blocks, that forward never calls."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.spare = nn.Linear(5, 3)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in (0, 1, 3):
            x = self.blocks[i](x)
        return self.norm(x)


class Repeated(Net):
    """Two blocks, each used three times, as ALBERT does."""

    def __init__(self, recompute: str | None = None) -> None:
        super().__init__(depth=2, recompute=recompute)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant") if self.recompute else block(x)
        return self.norm(x)


class Siamese(Net):
    """Every block on two branches at once."""

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = -x.flip(-1)
        for block in self.blocks:
            x, y = block(x), block(y)
        return self.norm(x + y * 0.5)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """None, some or all of three experts, chosen from the data: different ranks choose different ones, and numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(width), nn.ModuleList([Expert(width) for _ in range(3)])

    def forward(self, x: Tensor, choice: int) -> Tensor:
        y = self.norm(x)
        for i, expert in enumerate(self.experts):
            x = x + expert(y) if i < choice % 4 else x
        return x + y


class MixtureNet(Net):
    """Routed blocks (each a unit), or a mixture beside the blocks, whose experts would be units if it were no leaf."""

    def __init__(self, leaf: bool = False, recompute: str | None = None) -> None:
        super().__init__(recompute=recompute)
        width = self.norm.normalized_shape[0]
        self.leaf = leaf
        if leaf:
            self.mixture = Mixture(width)
            ts.zero.set_z3_leaf_modules(self, [Mixture])
        else:
            self.blocks = nn.ModuleList([Mixture(width) for _ in range(4)])

    def hidden(self, tokens: Tensor) -> Tensor:
        x, choice = self.embed(tokens), int(tokens.sum())
        for i, block in enumerate(self.blocks):
            if self.leaf:
                x = block(x)
            elif self.recompute:
                x = checkpoint(block, x, choice + i, use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x, choice + i)
        return self.norm(self.mixture(x, choice) if self.leaf else x)


class TwoTypes(nn.Module):
    """A bf16 linear between fp32 norms, all of one module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mix(self.norm(x).bfloat16()).float()


def two_types() -> Net:
    net = Net()
    net.blocks = nn.ModuleList([TwoTypes(13) for _ in range(3)])
    return net


class InPlace(Block):
    """Writes into what it was given, and into what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.down.bias
        y = super().forward(x)
        y += x
        return y


class InnerCheckpoint(Block):
    """Recomputes a part of itself only."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.down(checkpoint(lambda t: F.gelu(self.up(t)), x, use_reentrant=False))


def with_blocks(kind: Any, depth: int = 3) -> Net:
    net = Net()
    net.blocks = nn.ModuleList([kind(13) for _ in range(depth)])
    return net


@dataclass
class Output:
    """What a block may return; ``extra`` flows into the loss too, ``lost`` never does."""

    x: Tensor
    extra: Tensor
    lost: Tensor


class Returns(Block):
    """A block that takes keywords and returns a tuple, a dict or a dataclass."""

    kind: str = "tuple"

    def forward(self, *, x: Tensor, extra: Tensor) -> Any:  # type: ignore[override]
        y = super().forward(x)
        parts = {"x": y, "extra": extra + y.square().mean(), "lost": self.mix(y)}
        return {"tuple": tuple(parts.values()), "dict": parts, "dataclass": Output(**parts)}[self.kind]


class ReturnsNet(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Returns(13) for _ in range(3)])
        for block in self.blocks:
            block.kind = kind

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x, extra = self.embed(tokens), torch.zeros(())
        for block in self.blocks:
            out = block(x=x, extra=extra)
            out = vars(out) if isinstance(out, Output) else out
            x, extra = out[:2] if isinstance(out, tuple) else (out["x"], out["extra"])
        logits = self.head(self.norm(x))
        assert targets is not None
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten()) + 0.1 * extra


class FusedHead(Net):
    """Reads the head's weight, and a norm's inside a block, without calling the modules that own them.

    The head is large enough to be a unit of its own.
    """

    def __init__(self) -> None:
        super().__init__(vocab=97)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = F.linear(self.hidden(tokens), self.head.weight) * self.blocks[1].norm.weight.square().mean()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class Towers(Net):
    """An encoder whose output every decoder block takes beside its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(13, 1, 11, dropout=0.0) for _ in range(2)])

    def hidden(self, tokens: Tensor) -> Tensor:
        memory = super().hidden(tokens)
        x = self.embed(tokens.flip(-1))
        for layer in self.decoder:
            x = layer(x, memory)
        return x


def tiny() -> nn.Module:
    """Two weights: smaller than a page, smaller than the world."""
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))


def drive_tiny(model: Any, rank: int, step: int) -> Tensor:
    tokens, _ = batch(rank, step)
    loss = (model(tokens.float().view(-1, 1) / 37) - 0.3).square().mean()
    loss.backward()
    return loss.detach()


def only_blocks(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that was given every other parameter, in two groups."""
    chosen = list(parameters)[::2]
    half = len(chosen) // 2
    return torch.optim.SGD([{"params": chosen[:half]}, {"params": chosen[half:], "lr": 0.01}], lr=0.05)


NOTHING_KEPT = {"limits": ts.zero.Limits(max_reuse_distance=0)}
CASES = {
    "plain": Case(),
    "tied": Case(partial(Net, tied=True)),
    "tied, recomputed": Case(partial(Net, tied=True, recompute="reentrant")),
    "frozen": Case(frozen),
    "frozen but the head": Case(frozen_but_head),
    "unused": Case(Unused),
    "repeated": Case(Repeated),
    "repeated, recomputed": Case(partial(Repeated, "plain")),
    "repeated, recomputed reentrantly": Case(partial(Repeated, "reentrant")),
    "two branches": Case(Siamese),
    "routed by rank": Case(MixtureNet),
    "routed by rank, nothing kept": Case(MixtureNet, steps=5, options=NOTHING_KEPT),
    "routed by rank, recomputed": Case(partial(MixtureNet, recompute="plain")),
    "routed by rank, recomputed reentrantly": Case(partial(MixtureNet, recompute="reentrant")),
    "routed by rank, a leaf": Case(partial(MixtureNet, leaf=True)),
    "two types": Case(two_types),
    "recomputed": Case(partial(Net, recompute="plain")),
    "recomputed reentrantly": Case(partial(Net, recompute="reentrant")),
    "recomputed in part": Case(partial(with_blocks, InnerCheckpoint)),
    "in-place residual": Case(partial(with_blocks, InPlace)),
    "returns tuple": Case(partial(ReturnsNet, "tuple")),
    "returns dict": Case(partial(ReturnsNet, "dict")),
    "returns dataclass": Case(partial(ReturnsNet, "dataclass")),
    "fused head": Case(FusedHead),
    "two towers": Case(Towers),
    "smaller than the world": Case(tiny, drive_tiny),
    "half of the parameters": Case(optimizer=only_blocks),
    "no prefetch": Case(options={"limits": ts.zero.Limits(prefetch_bucket_size=0)}),
    "nothing kept": Case(options=NOTHING_KEPT),
    "no overlap": Case(options={"overlap": False}),
    "small chunks": Case(options={"sub_group_size": 100, "reduce_bucket_size": 1}),
}
IN_WORLDS_OF_ANY_SIZE = ("tied", "routed by rank", "repeated, recomputed reentrantly", "smaller than the world")


def run(name: str, sharding: str) -> None:
    lock_step(CASES[name], sharding)


@pytest.mark.parametrize("sharding", ["0", "2", "3", "3 persistent"])
@pytest.mark.parametrize("name", CASES)
def test_trains_as_without_us(ranks: Any, name: str, sharding: str) -> None:
    ranks(2, run, name, sharding)


@pytest.mark.parametrize("sharding", ["0", "2", "3"])
@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("name", IN_WORLDS_OF_ANY_SIZE)
def test_world_sizes(ranks: Any, name: str, world: int, sharding: str) -> None:
    ranks(world, run, name, sharding)
