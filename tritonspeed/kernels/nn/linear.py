"""A linear layer whose weight is quantised, for inference: made from a ``torch.nn.Linear``, a GPTQ or an AWQ layer."""

import torch
from torch import Tensor, nn

from tritonspeed.kernels.matmul_w4a16 import matmul_w4a16
from tritonspeed.kernels.matmul_w8a8 import matmul_w8a8
from tritonspeed.kernels.matmul_w8a16 import matmul_w8a16
from tritonspeed.kernels.packing import (
    CHUNK,
    PackedWeight,
    from_awq,
    from_gptq,
    pack_fp8,
    pack_w4,
    pack_w8,
    unpack_reference,
)
from tritonspeed.kernels.quantize import quantize

# format → (type of the codes, bits, format of the activations' codes, type of the scales)
_FORMATS: dict[str, tuple[torch.dtype, int, str | None, torch.dtype]] = {
    "w4a16": (torch.uint8, 4, None, torch.float16),
    "w8a16": (torch.int8, 8, None, torch.float32),
    "w8a8": (torch.int8, 8, "int8", torch.float32),
    "fp8": (torch.float8_e4m3fn, 8, "fp8", torch.float32),
}


class QuantizedLinear(nn.Module):
    """y = x · Wᵀ + bias with W in 4 or 8 bits; "w8a8" and "fp8" quantise x as well, one scale a row, as it comes.

    A new one has room for ``load_state_dict``; ``from_linear``, ``from_gptq`` and ``from_awq`` fill it. All but the
    bias are buffers: ``codes``, ``scales``, ``zeros`` and ``input_index`` where there are such, of types that
    safetensors keeps.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        format: "w4a16", "w8a16", "w8a8" or "fp8".
        group_size: weights of a row that share a scale, a multiple of 32; None is the whole row, as "w8a8" and "fp8"
            always have it.
        symmetric: False gives 4-bit groups a zero each.
        reorders_input: whether activations are permuted first, as GPTQ's activation order asks for.
        device: of the buffers.
        dtype: of the bias.

    Raises:
        ValueError: another format, or groups that it does not have.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_index: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "w4a16",
        group_size: int | None = 128,
        symmetric: bool = True,
        reorders_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_format(format, symmetric)
        codes_dtype, bits, activations, scale_dtype = _FORMATS[format]
        group = None if activations is not None else group_size
        unit = group or CHUNK
        k = -(-in_features // unit) * unit
        num_groups = k // group if group else 1
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.register_buffer("codes", torch.empty(out_features, k * bits // 8, dtype=codes_dtype, device=device))
        self.register_buffer("scales", torch.empty(num_groups, out_features, dtype=scale_dtype, device=device))
        zeros = None if symmetric else torch.empty(num_groups, out_features, dtype=torch.uint8, device=device)
        self.register_buffer("zeros", zeros)
        index = torch.empty(in_features, dtype=torch.int64, device=device) if reorders_input else None
        self.register_buffer("input_index", index)
        room = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if room is None else nn.Parameter(room, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "w4a16", group_size: int | None = 128, symmetric: bool = True
    ) -> "QuantizedLinear":
        """Quantise a layer's weight; arguments as above.

        Raises:
            ValueError: a format or group size that there is not, or a weight that is not finite.
        """
        _check_format(format, symmetric)
        if format == "w4a16":
            packed = pack_w4(linear.weight, group_size, symmetric)
        elif format == "fp8":
            packed = pack_fp8(linear.weight)
        else:
            packed = pack_w8(linear.weight, group_size if format == "w8a16" else None)
        return cls._of(packed, format, linear.bias, None)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        zero_offset: int = 1,
    ) -> "QuantizedLinear":
        """Take over a 4-bit GPTQ layer, bit for bit; arguments and errors as in ``packing.from_gptq``."""
        packed, index = from_gptq(qweight, qzeros, scales, g_idx, zero_offset=zero_offset)
        return cls._of(packed, "w4a16", bias, index)

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None) -> "QuantizedLinear":
        """Take over a 4-bit AWQ layer, bit for bit; arguments and errors as in ``packing.from_awq``."""
        return cls._of(from_awq(qweight, qzeros, scales), "w4a16", bias, None)

    @classmethod
    def _of(cls, packed: PackedWeight, format: str, bias: Tensor | None, index: Tensor | None) -> "QuantizedLinear":
        n, k = packed.shape
        module = cls(k, n, bias=False, format=format, group_size=None, device="meta")
        module.codes, module.scales, module.zeros = packed.codes, packed.scales, packed.zeros
        module.input_index = index
        module.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale; K, padded, where it is the whole row."""
        return self.codes.shape[1] * 8 // _FORMATS[self.format][1] // self.scales.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, (N, K), its columns in the order of the layer's inputs."""
        w = unpack_reference(PackedWeight(self.codes, self.scales, self.zeros, self.in_features), dtype)
        return w if self.input_index is None else w[:, self.input_index.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"QuantizedLinear: x is {tuple(x.shape)}, its last axis must be in_features {self.in_features}"
            )
        if self.input_index is not None:
            x = x.index_select(-1, self.input_index)
        if self.format == "w4a16":
            return matmul_w4a16(x, self.codes, self.scales, self.zeros, self.bias)
        if self.format == "w8a16":
            return matmul_w8a16(x, self.codes, self.scales, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"QuantizedLinear: {self.format!r} rounds its input, which has no gradient: run under torch.no_grad(),"
                ' or take format="w8a16"'
            )
        q = quantize(x, "int8" if self.format == "w8a8" else "fp8")
        return matmul_w8a8(q.codes, q.scales, self.codes, self.scales, self.bias, x.dtype)

    def extra_repr(self) -> str:
        """Sizes, format and groups, for ``print(model)``."""
        group = "row" if self.scales.shape[0] == 1 else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" format={self.format}, group={group}, symmetric={self.zeros is None}"
        )


def _check_format(format: str, symmetric: bool) -> None:
    if format not in _FORMATS:
        raise ValueError(f"QuantizedLinear: format is {format!r}, must be one of {', '.join(_FORMATS)}")
    if not symmetric and format != "w4a16":
        raise ValueError(f"QuantizedLinear: {format!r} has a sign and no zeros: set symmetric=True, or take w4a16")
