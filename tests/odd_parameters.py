"""Parameters of odd shapes for the optimizers, gradients that a seed decides, and a state that went through a file."""

import io
from typing import Any

import torch
from torch import nn


def parameters(dtype: torch.dtype = torch.float32, seed: int = 3) -> list[nn.Parameter]:
    """A scalar, an empty one, a channels-last one, a matrix."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((), (0,), (2, 3, 4, 5), (17, 33))]
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    """Standard normal ones, drawn in fp32."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dict as a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)
