"""What a forward and backward hold besides the model's state, found without memory: tensors that have only shapes.

A copy of the model, whose parameters are fake tensors of the compute dtype, runs one forward and backward on fake
inputs. Every storage that an operation makes is counted while it lives: inputs, what autograd saves, temporaries,
logits, gradients between their computation and the bucket that takes them (ours take each at once), buffers. The
operations are those of the true run, so recomputation (torch.utils.checkpoint), attention kernels and autocast follow
by themselves. Parameters are not counted: they belong to ``memory``'s equation.

    activation_bytes(model, (tokens, targets), dtype=torch.bfloat16)

Out of sight stays what a kernel takes and returns within one operation. Where PyTorch's CPU kernels take more than a
megabyte or two, `_SCRATCH_OF` adds it (peak resident memory over an operation's output, torch 2.13, 1 and 2 threads,
fp32 and bf16, 8 to 60 MiB operands): convolutions take their operands a second time, reordered (measured 1.0 × input +
output), attention's backward one of its operands (1.05 to 1.3 ×), our own operations, which are several of PyTorch's
here, fp32 copies of the largest operand (cross-entropy: three). Matrix products, norms, softmax, gelu and embeddings
took at most 3 MiB; what the first call of each leaves behind (packing buffers, code pages) is in `memory`'s margin.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from tritonspeed.zero.guard import ModuleHook
from tritonspeed.zero.init import Unready
from tritonspeed.zero.plan import LeafRules, repeated_blocks
from tritonspeed.zero.tree import map_tensors, tensors_in

Step = Callable[[nn.Module], Tensor]  # runs the model forward and returns its loss

_OWN_COPIES = 4  # of the largest operand in fp32, for our own operations on a CPU

INPUTS, BUFFERS, BACKWARD, SCRATCH, REST = "inputs", "buffers", "backward", "scratch", "outside the blocks"


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward and backward, besides parameters and what is accumulated of their gradients.

    Attributes:
        forward_bytes, backward_bytes: the highest sum in each.
        saved_bytes: between the two: what backward was saved for.
        kept_bytes: after them: inputs, buffers, the loss.
        at_peak: at the highest of all moments, by the block in whose forward (or recomputation) it was made;
            "inputs", "buffers", "backward", "scratch" (of one operation) and "outside the blocks" are the other names.
    """

    forward_bytes: int
    backward_bytes: int
    saved_bytes: int
    kept_bytes: int
    at_peak: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_bytes, self.backward_bytes)


def activation_bytes(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | Step,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> int:
    """Peak bytes of one forward and backward of ``model``, besides parameters and their accumulated gradients.

    Arguments and errors are those of ``measure_activations``, which says more.
    """
    return measure_activations(model, inputs, dtype, autocast).peak_bytes


def measure_activations(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | Step,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
) -> Activations:
    """Run ``model`` on shapes alone, and count.

    Args:
        model: on any device, the meta device included; it is left as it is, and its weights are not copied.
        inputs: one micro batch: positional arguments, keyword arguments (a mapping), or a function that calls the
            model it is given and returns the loss. Real tensors, or shapes on the meta device. Without a function,
            the loss is the output's ``loss``, or its first tensor, reduced if it is not a scalar.
        dtype: of floating parameters and buffers; None keeps their own.
        autocast: dtype of ``torch.autocast`` around forward.
        device: "cpu", or "cuda" on a machine that has one: which kernels are taken to run.

    Raises:
        ValueError: the model's path depends on values of tensors, which shapes do not have.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        double = _double(model, dtype, torch.device(device))
        step = inputs if callable(inputs) and not isinstance(inputs, Tensor) else _step_of(inputs, device)
        try:
            return Meter(double).run(step, autocast, device)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"the path of {type(model).__name__} depends on values ({error}), and here tensors have only shapes:"
                " pass inputs= a function of the model that goes round that place, or leave inputs out"
            ) from error


@dataclass
class _Held:
    """One storage that lives: whose it is, its bytes, and what tells of its end."""

    name: str
    num_bytes: int
    end: weakref.ref = field(repr=False)


class Meter(TorchDispatchMode):
    """Counts the storages that live, operation by operation; real tensors or fake ones.

    Args:
        model: its parameters are not counted; its blocks give the names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.bytes_of: dict[str, int] = {}
        self.live_bytes = self.peak_bytes = 0
        self.peak_of: dict[str, int] = {}
        self._held: dict[int, _Held] = {}
        self._where = [REST]
        self._elsewhere = [p.untyped_storage() for p in model.parameters()]  # kept: an address must not come again
        self._skipped = {storage._cdata for storage in self._elsewhere}

    def run(self, step: Step, autocast: torch.dtype | None = None, device: str = "cpu") -> Activations:
        """One forward and backward of the model in training mode, gradients dropped as soon as they are whole."""
        within: AbstractContextManager = torch.autocast(device, autocast) if autocast else nullcontext()
        with self._uncollected(), self._hooked(), self:
            for buffer in self.model.buffers():
                self._enter(buffer, BUFFERS)
            self.model.train()
            with within:
                loss = step(self.model)
            forward_bytes, saved_bytes, at_peak = self.peak_bytes, self.live_bytes, self.peak_of
            self.peak_bytes, self._where = self.live_bytes, [BACKWARD]
            loss.backward()
            kept_bytes = self.live_bytes
        if self.peak_bytes > forward_bytes:
            at_peak = self.peak_of
        at_peak = {name: num_bytes for name, num_bytes in at_peak.items() if num_bytes}
        return Activations(forward_bytes, self.peak_bytes, saved_bytes, kept_bytes, at_peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked many times per operation
            return func(*args, **kwargs)
        for t in tensors_in((args, kwargs)):
            self._enter(t, INPUTS)
        result = func(*args, **kwargs)
        for t in tensors_in(result):
            self._enter(t, self._where[-1])
        scratch_bytes = _scratch_bytes(func, (args, kwargs), result)
        if self.live_bytes + scratch_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes + scratch_bytes
            self.peak_of = self.bytes_of | {SCRATCH: scratch_bytes}
        return result

    def _enter(self, t: Tensor, name: str) -> None:
        if t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._skipped:
            return
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(name, 0, weakref.ref(storage, lambda _: self._leave(key)))
        self._add(held.name, num_bytes - held.num_bytes)  # not nothing for one we know: it was resized
        held.num_bytes = num_bytes

    def _leave(self, key: int) -> None:
        held = self._held.pop(key)
        self._add(held.name, -held.num_bytes)

    def _add(self, name: str, num_bytes: int) -> None:
        self.bytes_of[name] = self.bytes_of.get(name, 0) + num_bytes
        self.live_bytes += num_bytes

    @contextmanager
    def _uncollected(self) -> Iterator[None]:
        """Cycles live on: in a run, nobody knows when they are collected."""
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Blocks say when they run; a gradient goes as soon as it is whole, as into a bucket."""

        def take(p: Tensor) -> None:
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(take) for p in self.model.parameters() if p.requires_grad]
        for name, module in repeated_blocks(self.model, LeafRules()).items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._where.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._where.pop() and None, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _scratch_bytes(func: Any, operands: Any, result: Any) -> int:
    """What ``func`` takes and gives back within itself on a CPU: see the module's docstring."""
    own = func.namespace == "tritonspeed"
    if not own and func not in _SCRATCH_OF:
        return 0
    taken = [t for t in tensors_in(operands) if t.device.type == "cpu"]
    if not taken:
        return 0
    if own:
        return _OWN_COPIES * max(t.numel() for t in taken) * torch.float32.itemsize
    return _SCRATCH_OF[func]([t.nbytes for t in taken], [t.nbytes for t in tensors_in(result)])


_aten = torch.ops.aten
_SCRATCH_OF: dict[Any, Callable[[list[int], list[int]], int]] = {
    _aten.convolution.default: lambda taken, made: sum(taken) + sum(made),
    _aten.convolution_backward.default: lambda taken, made: sum(taken) + sum(made),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda taken, made: 3 * max(taken) // 2,
}


def _double(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """A copy of ``model`` whose tensors are fake ones; ours among its hooks do nothing there."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        tensors = [*dict.values(module._parameters), *module._buffers.values(), *vars(module).values()]
        for t in tensors:
            if not isinstance(t, Tensor) or id(t) in memo:
                continue
            kind = dtype if dtype not in (None, torch.float32) and t.is_floating_point() else t.dtype
            fake = torch.empty(t.shape, dtype=kind, device=device)
            memo[id(t)] = Parameter(fake, requires_grad=t.requires_grad) if isinstance(t, Parameter) else fake
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Unready):  # built under zero.Init, and refuses to run until it is sharded for training
                memo[id(hook)] = ModuleHook()
    return copy.deepcopy(model, memo)


def _step_of(inputs: Any, device: str) -> Step:
    """Calls the model with ``inputs``, made fake, and makes a scalar of what comes out."""

    def fake(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=device)

    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    args, kwargs = map_tensors((args, kwargs), fake)

    def step(model: nn.Module) -> Tensor:
        output = model(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = next(t for t in tensors_in(output) if t.requires_grad)
        return loss if loss.ndim == 0 else loss.sum()

    return step
