"""Run an operation for its launches alone: no arithmetic, no memory touched, no GPU.

Under ``recording`` kernels are not carried out; under ``ShapesOnly`` neither is what PyTorch does around them. The
matmul of a fused linear cross-entropy over a vocabulary of 128 Ki, 9 TFLOP, takes microseconds, and its output is
memory that nobody has written: an address, a shape and a type, which is all that a launch is made of.
"""

import mmap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tritonspeed.kernels._ops import LAUNCHERS

RESERVED_BYTES = 2**26
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python knows Linux's number from 3.13 on


class ShapesOnly(TorchDispatchMode):
    """Within, operators on CPU tensors return memory of the right shape and our own ops go to their launchers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One operator."""
        schema, named = func._schema, dict(kwargs or {})
        if func.namespace == "tritonspeed":
            given = [
                args[i] if i < len(args) else named.get(argument.name, argument.default_value)
                for i, argument in enumerate(schema.arguments)
            ]
            with self:
                return LAUNCHERS[schema.name.removeprefix("tritonspeed::")](*given)
        if schema.name == "aten::_local_scalar_dense":
            return args[0].new_ones((), device="cpu").item() if args[0].device.type == "cpu" else func(*args)
        if schema.is_mutable:
            return _written(schema, args, named)
        if any(returned.alias_info is not None for returned in schema.returns):
            return func(*args, **named)  # a view costs nothing
        try:
            return tree_map_only(Tensor, _unwritten, _on_meta(func, args, named))
        except NotImplementedError:  # its shape depends on the values: indices are small
            return func(*args, **named)


def _on_meta(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    args, named = tree_map_only(Tensor, lambda x: x.to("meta"), (args, named))
    takes = {argument.name for argument in func._schema.arguments}
    if "device" in takes:
        named["device"] = torch.device("meta")
    named.pop("generator", None)
    return func(*args, **named)


def _unwritten(x: Tensor) -> Tensor:
    """Addresses for a meta tensor. Large ones are reserved, not allocated: a case may be larger than this machine."""
    num_elems = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    num_bytes = num_elems * x.dtype.itemsize
    if num_bytes < RESERVED_BYTES or x.numel() == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    reserved = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = torch.frombuffer(reserved, dtype=torch.uint8).view(x.dtype)
    return flat.as_strided(x.shape, x.stride())


def _written(schema: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What an operator in place would return: the tensors that it was to write."""
    arguments = zip(schema.arguments, [*args, *([None] * len(schema.arguments))], strict=False)
    written = [
        named.get(argument.name, value)
        for argument, value in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not schema.returns:
        return None
    return written[0] if len(schema.returns) == 1 else tuple(written[: len(schema.returns)])
