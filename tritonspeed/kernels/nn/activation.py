"""What stands between the linears of a feed-forward layer, as modules without parameters (BiasGELU has the bias)."""

import torch
from torch import Tensor, nn

from tritonspeed.kernels.activations import gelu_form
from tritonspeed.kernels.bias_gelu import bias_gelu
from tritonspeed.kernels.glu import glu, glu_packed


class _Gated(nn.Module):
    _activation: str

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            return glu_packed(gate, self._activation, gate_first=self.gate_first, operation=type(self).__name__)
        return glu(gate, up, self._activation, operation=type(self).__name__)

    def extra_repr(self) -> str:
        return f"gate_first={self.gate_first}"


class SwiGLU(_Gated):
    """silu(gate) · up of two tensors, or of the halves of one: the output of a fused gate-and-up projection.

    Args:
        gate_first: in one tensor, the gate is the first half.
    """

    _activation = "silu"


class GEGLU(_Gated):
    """gelu(gate) · up of two tensors, or of the halves of one.

    Args:
        approximate: as in ``torch.nn.GELU``: "none" or "tanh".
        gate_first: in one tensor, the gate is the first half.
    """

    def __init__(self, approximate: str = "none", gate_first: bool = True) -> None:
        super().__init__(gate_first)
        self.approximate = approximate
        self._activation = gelu_form("GEGLU", approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}, gate_first={self.gate_first}"


class BiasGELU(nn.Module):
    """dropout(gelu(x + bias)) in one pass, after a linear that leaves its bias out.

    Args:
        num_features: length of the last axis.
        approximate: as in ``torch.nn.GELU``: "none" or "tanh".
        dropout_p: probability of a zero, in training.
        device, dtype: of the bias.
    """

    def __init__(
        self,
        num_features: int,
        approximate: str = "none",
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.approximate, self.dropout_p = num_features, approximate, dropout_p
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return bias_gelu(x, self.bias, approximate=self.approximate, dropout_p=dropout_p, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.num_features}, approximate={self.approximate!r}, dropout_p={self.dropout_p}"
