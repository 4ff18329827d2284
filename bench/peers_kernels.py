"""Kernels of others for our cases: torch's fused ones and cuBLAS, Liger, bitsandbytes, DeepSpeed, where they are there.

A peer is ``prepare(inputs) → call``, by (operation, direction, variant) of the case; a variant that starts with
"groups of" is named by these words alone. It imports its package inside ``prepare``: one that is missing is one absent
variant. What a peer's call returns is compared with our reference, so that a peer that computes something else shows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels.packing import values_reference
from tritonspeed.tuning.case import Case, Inputs, gradients

Prepare = Callable[[Inputs], Callable[[], Any]]
Key = tuple[str, str, str]


def peers_of(case: Case) -> dict[str, Prepare]:
    """Name → how to prepare it."""
    variant = "groups of" if case.variant.startswith("groups of") else case.variant
    return PEERS.get((case.name, case.direction, variant), {})


def _torch_fused_adamw(inputs: Inputs) -> Callable[[], Any]:
    """The same work: gradient widened, fused update, copy written."""
    step = torch.tensor(10.0, device=inputs["master"].device)

    def call() -> Tensor:
        torch._fused_adamw_(
            [inputs["master"]], [inputs["grad"].float()], [inputs["exp_avg"]], [inputs["exp_avg_sq"]], [], [step],
            lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        if inputs["param_out"] is not None:
            inputs["param_out"].copy_(inputs["master"])
        return inputs["master"]

    return call


def _deepspeed_fused_adam(inputs: Inputs) -> Callable[[], Any]:
    """DeepSpeed's CUDA kernel, built on first use; the gradient is widened and the copy written as DeepSpeed does."""
    from deepspeed.ops.adam import FusedAdam

    param = torch.nn.Parameter(inputs["master"])
    optimizer = FusedAdam([param], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def call() -> Tensor:
        param.grad = inputs["grad"].float()
        optimizer.step()
        if inputs["param_out"] is not None:
            inputs["param_out"].copy_(param.detach())
        return param.detach()

    return call


def _liger(name: str, *arguments: Any) -> Callable[..., Any]:
    """A function of Liger's functional interface, with what follows the tensors bound."""

    def call(*tensors: Tensor) -> Any:
        from liger_kernel.transformers import functional

        return getattr(functional, name)(*tensors, *arguments)

    return call


def _forward(function: Callable[..., Any], *names: str) -> Prepare:
    def prepare(inputs: Inputs) -> Callable[[], Any]:
        tensors = [inputs[name] for name in names]
        return lambda: function(*tensors)

    return prepare


def _backward(function: Callable[..., Any], leaves: Sequence[str], grad: str) -> Prepare:
    def prepare(inputs: Inputs) -> Callable[[], Any]:
        tensors = [inputs[name].detach().requires_grad_() for name in leaves]
        output = function(*tensors)
        return lambda: torch.autograd.grad(output, tensors, inputs[grad], retain_graph=True)

    return prepare


def _liger_rope(inputs: Inputs) -> Callable[[], Any]:
    """Liger takes (batch, heads, positions, width), full tables, and turns its inputs in place."""
    q, k = (inputs[name].transpose(1, 2) for name in ("q", "k"))
    cos, sin = (torch.cat((inputs[name], inputs[name]), -1).to(q.dtype).unsqueeze(0) for name in ("cos", "sin"))
    rope = _liger("liger_rope")
    return lambda: rope(q.clone(), k.clone(), cos, sin)[0].transpose(1, 2)


def _liger_linear_cross_entropy(inputs: Inputs) -> Callable[[], Any]:
    loss = _liger("liger_fused_linear_cross_entropy")
    leaves = {name: inputs[name] for name in ("hidden", "weight")}

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(hidden, weight, inputs["target"])

    return lambda: gradients(function, leaves, inputs["g"].view(()))


def _cublas(inputs: Inputs) -> Callable[[], Any]:
    """The unquantised matmul: what a quantised one must never be slower than."""
    weight = values_reference(inputs["codes"], inputs["scales"], inputs.get("zeros"), inputs["x"].dtype)
    return lambda: F.linear(inputs["x"], weight)


def _torch_int4pack(inputs: Inputs) -> Callable[[], Any]:
    """PyTorch's own W4A16 kernel; its zero points are floats, and its weights in its own order."""
    codes, scales, zeros = inputs["codes"], inputs["scales"].bfloat16(), inputs["zeros"]
    group = 2 * codes.shape[1] // scales.shape[0]
    packed = torch._convert_weight_to_int4pack(codes, 8)
    parameters = torch.stack((scales, (8 - zeros.bfloat16()) * scales), -1).contiguous()
    return lambda: torch._weight_int4pack_mm(inputs["x"], packed, group, parameters)


def _bitsandbytes_nf4(inputs: Inputs) -> Callable[[], Any]:
    """bitsandbytes' 4-bit kernel, on its own NF4 codes of the same weights: its speed, not our numbers."""
    import bitsandbytes

    weight = values_reference(inputs["codes"], inputs["scales"], inputs["zeros"], inputs["x"].dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(inputs["x"], codes.t(), quant_state=state)


def _torch_int8(inputs: Inputs) -> Callable[[], Any]:
    x, weight = inputs["x"].view(torch.int8), inputs["codes"].view(torch.int8).t()
    rows, columns = inputs["x_scales"][:, None], inputs["scales"]
    return lambda: (torch._int_mm(x, weight) * rows * columns).bfloat16()


def _torch_fp8(inputs: Inputs) -> Callable[[], Any]:
    x, weight = (inputs[name].view(torch.float8_e4m3fn) for name in ("x", "codes"))
    scales = inputs["x_scales"][:, None].contiguous(), inputs["scales"].contiguous()
    return lambda: torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16)


_LAYER_NORM, _RMS_NORM = _liger("liger_layer_norm", 1e-5), _liger("liger_rms_norm", 1e-6, 0.0, "llama", False)
_SWIGLU, _SOFTMAX = _liger("liger_swiglu"), _liger("liger_softmax")
PEERS: dict[Key, dict[str, Prepare]] = {
    ("adamw_", "forward", ""): {"torch fused": _torch_fused_adamw, "DeepSpeed FusedAdam": _deepspeed_fused_adam},
    ("sum_of_squares", "forward", ""): {
        "torch vector_norm": lambda inputs: (
            lambda: torch.linalg.vector_norm(inputs["x"], dtype=torch.float32).double().square()
        )
    },
    ("layer_norm", "forward", ""): {"Liger": _forward(_LAYER_NORM, "x", "weight", "bias")},
    ("layer_norm", "backward", ""): {"Liger": _backward(_LAYER_NORM, ("x", "weight", "bias"), "g")},
    ("rms_norm", "forward", ""): {"Liger": _forward(_RMS_NORM, "x", "weight")},
    ("rms_norm", "backward", ""): {"Liger": _backward(_RMS_NORM, ("x", "weight"), "g")},
    ("softmax", "forward", ""): {"Liger": _forward(_SOFTMAX, "x")},
    ("softmax", "backward", ""): {"Liger": _backward(_SOFTMAX, ("x",), "g")},
    ("swiglu", "forward", ""): {"Liger": _forward(_SWIGLU, "gate", "up")},
    ("swiglu", "backward", ""): {"Liger": _backward(_SWIGLU, ("gate", "up"), "grad")},
    ("rotary", "forward", ""): {"Liger": _liger_rope},
    ("cross_entropy", "forward", ""): {"Liger": _forward(_liger("liger_cross_entropy"), "logits", "target")},
    ("linear_cross_entropy", "both", ""): {"Liger": _liger_linear_cross_entropy},
    ("matmul_w4a16", "forward", "groups of"): {
        "16-bit cuBLAS": _cublas,
        "torch int4pack": _torch_int4pack,
        "bitsandbytes NF4": _bitsandbytes_nf4,
    },
    ("matmul_w8a16", "forward", ""): {"16-bit cuBLAS": _cublas},
    ("matmul_w8a8", "forward", "int8"): {"torch _int_mm": _torch_int8},
    ("matmul_w8a8", "forward", "fp8"): {"torch _scaled_mm": _torch_fp8},
}
