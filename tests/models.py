"""Small models whose shapes are odd on purpose: nothing divides by the world or by a vector width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """norm → attention-like mix → norm → MLP, residual; a frozen scale and mixed shapes inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x)).cumsum(-2) / x.shape[-2]
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Embedding, blocks, norm, head (tied or not). ``recompute`` is None, "reentrant" or "plain"."""

    def __init__(
        self, vocab: int = 37, width: int = 13, depth: int = 3, tied: bool = False, recompute: str | None = None
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def batch(rank: int, step: int, vocab: int = 37, rows: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens, (rows, length) int64 each, fixed by rank and step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]
