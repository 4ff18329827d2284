"""Losses as modules: ``torch.nn.CrossEntropyLoss`` as it is called, and the output layer and its loss in one."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tritonspeed.kernels.cross_entropy import DTYPES, cross_entropy
from tritonspeed.kernels.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``: same constructor, call and state dict.

    Class indices without class weights take the kernel. Probabilities as targets, class weights, and types without a
    kernel take PyTorch's own.

    Args:
        z_loss, softcap, overwrite_logits: as in ``tritonspeed.kernels.cross_entropy``; for class indices only.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        overwrite_logits: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if weight is not None and (z_loss or softcap):
            raise ValueError(
                "CrossEntropyLoss: class weights take PyTorch's cross-entropy, which has neither z_loss nor softcap:"
                " drop the weight, or both"
            )
        self.z_loss, self.softcap, self.overwrite_logits = z_loss, softcap, overwrite_logits

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (V,), (N, V) or (N, V, ...), target the same without V, or of input's shape as probabilities."""
        has_kernel = self.weight is None and input.dtype in DTYPES and not target.is_floating_point()
        if not has_kernel:
            if self.z_loss or self.softcap:
                raise ValueError(
                    f"CrossEntropyLoss: z_loss and softcap want class indices and logits with a kernel: target is"
                    f" {target.dtype}, input {input.dtype}: set them to 0 and None"
                )
            return super().forward(input, target)
        return cross_entropy(
            input.movedim(1, -1) if input.ndim > 2 else input,
            target.long(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            z_loss=self.z_loss,
            softcap=self.softcap,
            overwrite_logits=self.overwrite_logits,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class LinearCrossEntropyLoss(nn.Module):
    """A model's last linear layer and its loss, without the logits.

        loss = F.cross_entropy(lm_head(hidden).flatten(0, 1), target.flatten())      # holds tokens × vocabulary logits
        loss = LinearCrossEntropyLoss()(hidden, lm_head, target)                     # holds one chunk of them

    Args:
        ignore_index, label_smoothing, reduction, z_loss, softcap, num_chunks: as in
            ``tritonspeed.kernels.linear_cross_entropy``.
        shift: token t is to be predicted from hidden[..., t - 1, :], as in causal language models: pass the tokens
            themselves as target. The targets are shifted, hidden is not copied; with reduction "none" each sequence's
            last loss is 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        num_chunks: int | None = None,
        shift: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.z_loss, self.softcap, self.num_chunks, self.shift = z_loss, softcap, num_chunks, shift

    def forward(self, hidden: Tensor, weight: Tensor | nn.Module, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., H), weight (V, H) or a layer that has it (and its bias), target (...), bias (V,)."""
        if isinstance(weight, nn.Module):
            bias = getattr(weight, "bias", None) if bias is None else bias
        matrix: Any = weight.weight if isinstance(weight, nn.Module) else weight
        if self.shift:
            target = F.pad(target[..., 1:], (0, 1), value=self.ignore_index)
        return linear_cross_entropy(
            hidden,
            matrix,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            z_loss=self.z_loss,
            softcap=self.softcap,
            num_chunks=self.num_chunks,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing},"
            f" shift={self.shift}"
        )
