"""Rotary position embedding as a module: the tables of cosines and sines, and what turns q and k by them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonspeed.kernels.rotary import rotary


class RotaryEmbedding(nn.Module):
    """Angles position · base^(−2j/dim) in fp32, whatever type the model is cast to, and their rotation of q and k.

    No parameters, nothing in the state dict. Where many layers share positions, take ``cos_sin`` once and give it to
    ``tritonspeed.kernels.rotary`` in each.

    Args:
        dim: elements of a head that are turned, even.
        base: the longest wavelength is 2π · base^(1 − 2/dim).
        inv_freq: (dim/2,) frequencies to take instead: scaled ones of long-context models.
        attention_scaling: factor of both tables (YaRN).
        interleaved: pairs are neighbours (GPT-J) instead of halves (Llama).
        sequence_dim: 1 for q as (B, S, H, D), 2 for (B, H, S, D).
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        inv_freq: Tensor | None = None,
        attention_scaling: float = 1.0,
        interleaved: bool = False,
        sequence_dim: int = 1,
    ) -> None:
        super().__init__()
        if dim % 2 or dim < 2 or (inv_freq is not None and inv_freq.shape != (dim // 2,)):
            given = "" if inv_freq is None else f" and inv_freq {tuple(inv_freq.shape)}"
            raise ValueError(f"RotaryEmbedding: dim is {dim}{given}: dim must be even, inv_freq ({dim // 2},)")
        self.dim, self.base, self.attention_scaling = dim, base, attention_scaling
        self.interleaved, self.sequence_dim = interleaved, sequence_dim
        self._given = None if inv_freq is None else inv_freq.detach().to("cpu", torch.float32)
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        if self._given is not None:
            return self._given.to(device or torch.get_default_device())
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        return 1.0 / self.base**exponents

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies(self.inv_freq.device)  # to another device, never to another type
        return self

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of some positions.

        Args:
            positions: (S,) or (B, S), integers or floats.

        Returns:
            cos, sin: (S, dim/2) or (B, S, dim/2), fp32.
        """
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None, *, offset: int = 0, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Turn q and k.

        Args:
            q, k: (B, S, H, D) or (B, H, S, D), as ``sequence_dim`` says; D ≥ dim.
            positions: (S,) or (B, S). Default offset, offset + 1, ...
            offset: the first position where none are given: tokens in the cache.
            in_place: write into q and k.

        Returns:
            q and k turned.
        """
        if positions is None:
            positions = torch.arange(offset, offset + q.shape[self.sequence_dim], device=q.device)
        return rotary(
            q, k, *self.cos_sin(positions), interleaved=self.interleaved, in_place=in_place,
            sequence_dim=self.sequence_dim, rotary_dim=self.dim,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The constructor's arguments that matter."""
        return f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}, sequence_dim={self.sequence_dim}"


__all__ = ["RotaryEmbedding"]
