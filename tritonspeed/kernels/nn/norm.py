"""LayerNorm and RMSNorm: ``torch.nn``'s, parameters, state dict and arguments, computed by the kernels."""

import torch
from torch import Tensor

from tritonspeed.kernels.layer_norm import layer_norm
from tritonspeed.kernels.rms_norm import rms_norm


def _rows(x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """x with the normalised axes as one."""
    if len(normalized_shape) == 1 and x.shape[-1:] == normalized_shape:
        return x
    if tuple(x.shape[x.ndim - len(normalized_shape) :]) != normalized_shape or x.ndim < len(normalized_shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, its last axes must be {normalized_shape}: as the norm was made"
        )
    return x.flatten(x.ndim - len(normalized_shape))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


class LayerNorm(torch.nn.LayerNorm):
    """A drop-in for ``torch.nn.LayerNorm``; y comes in x's type whatever the parameters'."""

    def forward(self, input: Tensor) -> Tensor:
        rows = _rows(input, self.normalized_shape)
        y = layer_norm(rows, _flat(self.weight), _flat(self.bias), self.eps)
        return y.view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """A drop-in for ``torch.nn.RMSNorm``; y comes in x's type whatever the weight's.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.
        offset: added to the weight: 1 for weights kept around zero, as Gemma's are, which then start at zero.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
    ) -> None:
        self.offset = offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """The norm starts as a plain one: offset + weight is 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        rows = _rows(x, self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y = rms_norm(rows, _flat(self.weight), eps, offset=self.offset)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", offset={self.offset}" if self.offset else "")
