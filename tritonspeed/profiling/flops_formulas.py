"""Floating-point operations of one call, from its operands: matrix products, convolutions and attention.

PyTorch's own formulas, with those that it lacks: attention on a CPU, grouped products, products with a vector, and the
operations of ``tritonspeed`` that multiply matrices, which PyTorch sees as one opaque call. A multiplication with its
addition is two. Elementwise work is not counted: it is bound by memory. Causal attention is counted whole, as PyTorch
and the papers do, though a kernel may skip the half above the diagonal.

Here and not in the kernels' files: a tuned configuration belongs to the exact source of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

Formula = Callable[..., int]
_COUNTED_NAMESPACES = ("aten", "prim", "prims", "tritonspeed", "profiler", "c10d", "_c10d_functional", "debugprims")
# "linear" and "matmul" come whole from nested tensors only
_OPAQUE = (
    "linear",
    "matmul",
    "_cudnn_rnn",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "mkldnn_rnn_layer",
    "_scaled_grouped_mm",
)


def flops_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """What this call of ``op`` costs; 0 where it multiplies no matrices.

    Args:
        op: an operator, of whichever overload.
        args, kwargs: its operands.
        out: its result.
    """
    own = _own().get(op)
    if own is not None:
        return own(*args, **kwargs)
    formula = flop_counter.flop_registry.get(op)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def is_opaque(op: Any) -> bool:
    """Whether ``op`` may multiply matrices and there is no formula for it: a kernel of somebody else's, a fused RNN."""
    if has_formula(op):
        return False
    namespace, _, name = op._qualified_op_name.partition("::")
    return namespace not in _COUNTED_NAMESPACES or name in _OPAQUE


def has_formula(op: Any) -> bool:
    """Whether its operations can be counted."""
    return op in _own() or op in flop_counter.flop_registry


_formulas: dict[Any, Formula] = {}


def _own() -> dict[Any, Formula]:
    if not _formulas:
        aten, ours = torch.ops.aten, torch.ops.tritonspeed
        import tritonspeed.kernels  # noqa: F401  defines the operations

        found: dict[Any, Formula] = {
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            aten._grouped_mm: _grouped,
            aten.mv: _vector,
            aten.dot: _vector,
            aten.addmv: lambda y, a, x, **_: _vector(a, x),
        }
        named = {
            "linear_cross_entropy": _linear_cross_entropy,
            "matmul_w4a16": lambda x, codes, *_: _product(x, codes),
            "matmul_w8a16": lambda x, codes, *_: _product(x, codes),
            "matmul_w8a8": lambda x, scales, codes, *_: _product(x, codes),
        }
        _formulas.update(found | {getattr(ours, name): formula for name, formula in named.items()})
    return _formulas


def _product(x: Tensor, rows: Tensor) -> int:
    """x (..., K) · rows (N, ·)ᵀ: codes may be packed, so K is x's."""
    return 2 * x.numel() * rows.shape[0]


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Each row of a meets one of the groups of b: (T, K) · (G, K, N), (G, M, K) · (G, K, N) or (M, T) · (T, N)."""
    return 2 * a.numel() * b.shape[-1]


def _vector(a: Tensor, x: Tensor) -> int:
    return 2 * a.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products: the scores again, and the gradients of both forward ones."""
    return flop_counter.sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    target: Any,
    g: Any,
    reduction: str,
    num_chunks: Any,
    wants_hidden: bool,
    wants_weight: bool,
    *_: Any,
) -> int:
    """The logits, and in the same call the gradients over both of its operands where they are wanted."""
    return 2 * hidden.numel() * weight.shape[0] * (1 + wants_hidden + wants_weight)
