"""Softmax modules: torch.nn's, and attention's scores scaled, masked and normalised in one pass."""

import warnings

from torch import Tensor, nn

from tritonspeed.kernels.softmax import softmax


class Softmax(nn.Softmax):
    """``torch.nn.Softmax`` by the fused kernel; rows of −∞ give zeros instead of NaN.

    Args:
        dim: the axis that is normalised; None guesses as torch.nn does, with its warning.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As the original's."""
        if self.dim is not None:
            return softmax(input, self.dim)
        dim = 0 if input.ndim in (0, 1, 3) else 1
        warnings.warn(f"Softmax: dim is not given, {dim} is taken for {input.ndim} axes: pass dim", stacklevel=2)
        return softmax(input, dim)


class ScaledMaskedSoftmax(nn.Module):
    """softmax(scale · scores + mask) over the keys, what Megatron-LM's FusedScaleMaskSoftmax does.

    Args:
        scale: multiplied into the scores before the mask.
        causal: query i sees the keys j ≤ i + (K − Q).
    """

    def __init__(self, scale: float = 1.0, causal: bool = False) -> None:
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            scores: (..., Q, K).
            mask: broadcastable to scores: boolean, True takes part (Megatron's True is masked out: pass ~mask), or
                a float that is added.

        Returns:
            (..., Q, K), scores' type; rows without anything left are zeros.
        """
        return softmax(scores, scale=self.scale, mask=mask, causal=self.causal)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"scale={self.scale}, causal={self.causal}"


__all__ = ["ScaledMaskedSoftmax", "Softmax"]
