"""The model and the data that every system trains: a plain GPT, without dropout, and deterministic token rows.

Shapes: B batch rows per rank, T tokens, D width, H heads, V vocabulary. Parameters of the default size: 8 blocks ×
12·D² + 2·V·D + positions, with D = 512 and V = 4,096: 29.5 M, 56 MiB as bf16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = {"communication-heavy": (1, 32), "compute-heavy": (2, 128)}  # batch rows per rank, tokens per row


@dataclass(frozen=True)
class Size:
    """The model's dimensions.

    Args:
        num_blocks, width, num_heads, vocabulary, max_tokens: the usual five.
        tied: the output head shares the embedding's weight.
    """

    num_blocks: int = 8
    width: int = 512
    num_heads: int = 8
    vocabulary: int = 4096
    max_tokens: int = 128
    tied: bool = False


SIZES = {"base": Size(), "small": Size(num_blocks=4, width=128, num_heads=4, vocabulary=512)}


class Block(nn.Module):
    """Pre-norm attention and MLP: x [B, T, D] -> [B, T, D]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.norm_attention = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.mlp_up = nn.Linear(size.width, 4 * size.width)
        self.mlp_down = nn.Linear(4 * size.width, size.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x_BTD + self.mlp_down(F.gelu(self.mlp_up(self.norm_mlp(x_BTD))))


class GPT(nn.Module):
    """tokens [B, T + 1] int64 -> mean cross-entropy over the T predictions, 0-d fp32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.max_tokens, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_blocks))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if size.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x_BTD = self.embedding(inputs) + self.position(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits = self.head(self.norm(x_BTD)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_model(size: Size, seed: int = 0) -> GPT:
    """The same fp32 weights everywhere, each one representable in bf16.

    A system that makes its masters from a bf16 model starts from bf16 values; one that keeps the fp32 model would
    start elsewhere.
    """
    torch.manual_seed(seed)
    model = GPT(size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def make_batch(step: int, rank: int, rows: int, tokens: int, vocabulary: int) -> Tensor:
    """[rows, tokens + 1] int64: arithmetic sequences modulo the vocabulary, one of four strides a row.

    Learnable (the stride can be read off the first two tokens), different on each rank and step, and a function of its
    arguments only.
    """
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    start = torch.randint(vocabulary, (rows, 1), generator=generator)
    stride = torch.randint(1, 5, (rows, 1), generator=generator)
    return (start + stride * torch.arange(tokens + 1)) % vocabulary
