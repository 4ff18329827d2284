"""Cross-entropy on a CPU, in PyTorch: the kernels' statistics and gradients, for chunks of logits and as operators.

The maths is ``cross_entropy``'s. The rows' functions take logits (M, V) and targets (M,), and work in fp32, or fp64 for
fp64.
"""

from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels.cross_entropy_rows import CrossEntropyOptions, empty_gradient


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """What the softmax is of, and its slope over the logits where that is not 1."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not softcap:
        return x, None
    share = (x / softcap).tanh_()
    return softcap * share, 1 - share.square()


def row_losses(logits: Tensor, target: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
    """Losses (M,), 0 where ignored; statistics (2, M): max x, and log Σ exp(x − max x).

    Raises:
        IndexError: a target is neither a class nor ignore_index.
    """
    is_ignored = target == options.ignore_index
    wrong = target[((target < 0) | (target >= logits.shape[1])) & ~is_ignored]
    if wrong.numel():
        raise IndexError(f"target {int(wrong[0])} is out of bounds: there are {logits.shape[1]} classes")
    x, _ = _capped(logits, options.softcap)
    top = x.amax(1)
    top = top.masked_fill(top == -torch.inf, 0)
    rest = x - top.unsqueeze(1)
    log_total = rest.exp().sum(1).log()
    rest_y = rest.gather(1, target.masked_fill(is_ignored, 0).long().unsqueeze(1)).squeeze(1)
    losses, epsilon = log_total - rest_y, options.label_smoothing
    if epsilon:
        losses = (1 - epsilon) * losses + epsilon * (log_total - rest.mean(1))
    losses = losses + options.z_loss * (top + log_total).square()
    return losses.masked_fill_(is_ignored, 0), torch.stack((top, log_total))


def row_gradients(
    logits: Tensor, target: Tensor, statistics: Tensor, g: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """Gradients (M, V) of the rows' losses, times g (M,) if there is one; 0 where ignored."""
    is_ignored, epsilon = target == options.ignore_index, options.label_smoothing
    x, slope = _capped(logits, options.softcap)
    top, log_total = statistics
    dx = (x - top.unsqueeze(1)).sub_(log_total.unsqueeze(1)).exp_()
    if options.z_loss:
        dx.mul_((1 + 2 * options.z_loss * (top + log_total)).unsqueeze(1))
    classes = target.masked_fill(is_ignored, 0).long().unsqueeze(1)
    dx.sub_(epsilon / logits.shape[1]).scatter_add_(1, classes, dx.new_full(classes.shape, epsilon - 1))
    if slope is not None:
        dx.mul_(slope)
    if g is not None:
        dx.mul_(g.unsqueeze(1))
    return dx.masked_fill_(is_ignored.unsqueeze(1), 0)


def reduced(losses: Tensor, target: Tensor, reduction: str, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss, and for "mean" 1 / count, by which gradients are yet to be multiplied; empty else."""
    if reduction == "mean":
        count = (target != ignore_index).sum()
        return losses.sum() / count, 1 / count.clamp(min=1).to(losses.dtype)
    return losses.sum() if reduction == "sum" else losses, losses.new_empty(0)


def forward_cpu(logits: Tensor, target: Tensor, reduction: str, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``cross_entropy_forward`` on CPU tensors."""
    rows, classes, at = logits.reshape(-1, logits.shape[-1]), target.reshape(-1), CrossEntropyOptions(*options)
    losses, statistics = row_losses(rows, classes, at)
    loss, scale = reduced(losses, classes, reduction, at.ignore_index)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss, statistics.view(2, *target.shape), scale


def backward_cpu(g: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, scale: Tensor, *options: Any) -> Tensor:
    """The operator ``cross_entropy_backward`` on CPU tensors."""
    rows, at = logits.reshape(-1, logits.shape[-1]), CrossEntropyOptions(*options)
    row_g = g.reshape(-1).to(statistics.dtype) * (scale if scale.numel() else 1)
    gradients = row_gradients(rows, target.reshape(-1), statistics.view(2, -1), row_g.expand(rows.shape[0]), at)
    return empty_gradient(logits).copy_(gradients.view(logits.shape))


def backward_cpu_(g: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, scale: Tensor, *options: Any) -> None:
    """The operator ``cross_entropy_backward_`` on CPU tensors."""
    logits.copy_(backward_cpu(g, logits, target, statistics, scale, *options))
