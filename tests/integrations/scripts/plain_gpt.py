"""A small GPT in plain PyTorch, for scripts without Hugging Face: blocks in a ModuleList, the head tied or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH = 64, 32


class SmallEmbedding(nn.Embedding):
    """Its own start, so that a tied head's logits are small; drawn before DeepSpeed's zero.Init takes it apart."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)


class Block(nn.Module):
    """Causal attention and an MLP, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.qkv(self.before_attention(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.before_mlp(x))


class PlainGPT(nn.Module):
    """(batch, length) tokens → (batch, length, VOCABULARY) logits.

    Args:
        tied: the head is the embedding.
        call: how a block is called: ``call(block, x)``; a checkpointing function, or nothing.
    """

    def __init__(self, tied: bool = False, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.embedding = SmallEmbedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.call = call or (lambda block, x: block(x))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(self.norm(x))


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def token_rows(count: int, length: int = 16, seed: int = 1) -> Tensor:
    """(count, length) random tokens."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
