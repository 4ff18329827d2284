"""A Llama-like decoder with recomputed blocks, for sizes from a toy to tens of billions of parameters.

Shapes: B rows, T tokens, D width, F feed-forward, V vocabulary. A block has 4·D² (less with grouped heads) + 3·D·F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tritonspeed.kernels import linear_cross_entropy

INIT_STD = 0.02
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class LlamaSize:
    """The dimensions; ``num_kv_heads`` below ``num_heads`` groups the queries."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    feed_forward: int
    vocabulary: int

    @property
    def num_params(self) -> int:
        kv = self.width * self.num_kv_heads // self.num_heads
        block = 2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.feed_forward + 2 * self.width
        return self.num_layers * block + 2 * self.vocabulary * self.width + self.width

    def train_flops(self, tokens: int, length: int) -> float:
        """Of forward and backward, recomputation not counted: 6 a parameter and token, and causal attention's."""
        matrices = self.num_params - self.vocabulary * self.width  # an embedding is read, not multiplied
        return tokens * (6.0 * matrices + 6.0 * self.num_layers * self.width * length)

    def activation_bytes(self, tokens: int) -> int:
        """In 16 bits, at most: what each block starts from, one block's own, and fp32 logits of 4,096 tokens twice."""
        block = tokens * (16 * self.width + 6 * self.feed_forward) * 2
        return self.num_layers * tokens * self.width * 2 + block + 8 * min(tokens, 4096) * self.vocabulary


SIZES = {
    "toy": LlamaSize(64, 2, 4, 2, 160, 256),
    "7b": LlamaSize(4096, 32, 32, 32, 11008, 32000),  # Llama 2 7B
    "8b": LlamaSize(4096, 32, 32, 8, 14336, 128256),  # Llama 3 8B
    "13b": LlamaSize(5120, 40, 40, 40, 13824, 32000),  # Llama 2 13B
}


class Block(nn.Module):
    """Pre-norm attention with rotary positions, and a gated feed-forward: x [B, T, D] -> [B, T, D]."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = size.num_heads, size.num_kv_heads
        kv = size.width * size.num_kv_heads // size.num_heads
        self.norm_attention = nn.RMSNorm(size.width, eps=1e-5)
        self.query = nn.Linear(size.width, size.width, bias=False)
        self.key = nn.Linear(size.width, kv, bias=False)
        self.value = nn.Linear(size.width, kv, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.norm_ff = nn.RMSNorm(size.width, eps=1e-5)
        self.gate = nn.Linear(size.width, size.feed_forward, bias=False)
        self.up = nn.Linear(size.width, size.feed_forward, bias=False)
        self.down = nn.Linear(size.feed_forward, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        query, key, value = (
            linear(h).view(*h.shape[:2], heads, -1).transpose(1, 2)
            for linear, heads in (
                (self.query, self.num_heads),
                (self.key, self.num_kv_heads),
                (self.value, self.num_kv_heads),
            )
        )
        groups = self.num_heads > self.num_kv_heads
        mixed = F.scaled_dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True, enable_gqa=groups)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm_ff(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotate(x: Tensor) -> Tensor:
    """[B, H, T, d] with each pair of halves turned by its position."""
    half = x.shape[-1] // 2
    rates = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Head(nn.Module):
    """Hidden states and targets → mean cross-entropy, without the logits of all tokens at once."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size.vocabulary, size.width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, self.weight, targets)


class Llama(nn.Module):
    """[B, T + 1] int64 -> mean cross-entropy over the T predictions. Blocks are recomputed in backward."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.head = Head(size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x), tokens[:, 1:])


def initialise(module: nn.Module) -> None:
    """For ``ts.zero.apply_later``: matrices from a normal distribution."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
