"""Operations and time of each module, by what it ran: hooks say where a run is, a dispatch mode what it does.

    forward     an operation belongs to the innermost module that runs
    recompute   the same, where the module runs inside a backward
    backward    an operation belongs to the module whose forward made the autograd node that runs

The nodes are marked when a module's forward ends; nothing is added to the graph, no operation changes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from tritonspeed.profiling.flops_formulas import flops_of, has_formula, is_opaque
from tritonspeed.zero.guard import ModuleHook
from tritonspeed.zero.hooks import in_backward
from tritonspeed.zero.tree import tensors_in

_MARK = "tritonspeed module"  # in an autograd node's metadata


@dataclass
class Counts:
    """Floating-point operations by module name, each module's own: those of its children are theirs.

    Attributes:
        forward, backward, recompute: by when they ran.
        opaque: operations that may multiply matrices and could not be counted.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    recompute: Counter[str] = field(default_factory=Counter)
    opaque: set[str] = field(default_factory=set)

    def add(self, other: Counts) -> None:
        """Add what another count has."""
        self.forward.update(other.forward)
        self.backward.update(other.backward)
        self.recompute.update(other.recompute)
        self.opaque |= other.opaque

    @property
    def num_forward(self) -> int:
        return self.forward.total()

    @property
    def num_backward(self) -> int:
        """Without what was recomputed."""
        return self.backward.total()

    @property
    def num_recompute(self) -> int:
        return self.recompute.total()


@dataclass
class _Running:
    name: str
    since: int  # autograd's number of the next node
    start: Any  # seconds, or a GPU's event


class ModuleWatch:
    """Hooks on every module of a model: which one runs, and for how long.

    Args:
        model: the model.
        ignored: classes whose modules count as part of those around them.
    """

    def __init__(self, model: nn.Module, ignored: Sequence[type] = ()) -> None:
        self.counts = Counts()
        self.counting = False
        self._running: list[_Running] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._inner_handles: list[RemovableHandle] = []  # of modules inside compiled ones
        first = next((p for p in model.parameters()), None)
        self._on_gpu = first is not None and first.device.type == "cuda"
        self.has_compiled = False
        compiled: set[nn.Module] = set()
        for name, module in model.named_modules():
            handles = self._inner_handles if module in compiled else self._handles
            if _is_compiled(module):
                self.has_compiled = True
                compiled.update(module.modules())
            if type(module) not in ignored:
                self._hook(name, module, handles)

    def remove(self) -> None:
        """Take the hooks off."""
        self.leave_compiled_alone()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def leave_compiled_alone(self) -> None:
        """Take the hooks off that are inside compiled modules, which they would break into pieces: before timing."""
        for handle in self._inner_handles:
            handle.remove()
        self._inner_handles.clear()

    def forget_times(self) -> None:
        """Time from here on."""
        self._spans.clear()

    def seconds(self) -> dict[str, float]:
        """What each module's forwards took, its children and what it waited for included. Waits for a GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            found[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(found)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count the operations of the block, which is slower for it: what is timed is better not counted.

        What is compiled runs uncompiled meanwhile: nobody sees into a compiled graph.
        """
        self.counting = True
        try:
            with torch.compiler.set_stance("force_eager"), _Count(self):
                yield
        finally:
            self.counting = False

    def _hook(self, name: str, module: nn.Module, handles: list[RemovableHandle]) -> None:
        @torch._dynamo.disable
        def enter(_: nn.Module, args: Any) -> None:
            self._running.append(_Running(name, torch._C._autograd._get_sequence_nr(), self._now()))

        @torch._dynamo.disable
        def leave(_: nn.Module, args: Any, output: Any) -> None:
            if not self._running or self._running[-1].name != name:  # the hooks came while it ran
                return
            ended = self._running.pop()
            if not in_backward():
                self._spans.append((name, ended.start, self._now()))
            if self.counting and torch.is_grad_enabled():
                _mark(output, ended)

        handles.append(module.register_forward_pre_hook(ModuleHook(enter), prepend=True))
        handles.append(module.register_forward_hook(ModuleHook(leave), always_call=True))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def saw(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One operation has run."""
        packet = op._overloadpacket
        if is_opaque(packet):
            self.counts.opaque.add(packet._qualified_op_name)
        else:
            self._add(packet, packet._qualified_op_name, args, kwargs, out)

    def saw_whole(self, op: HigherOrderOperator, args: Any, kwargs: Any) -> None:
        """An operation that is made of functions, as flex_attention, is about to run."""
        if has_formula(op):
            self._add(op, op.name(), args, kwargs, None)
        else:
            self.counts.opaque.add(op.name())

    def _add(self, op: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        try:
            num_flops = flops_of(op, args, kwargs, out)
        except Exception:  # operands that a formula has not met: the step goes on
            self.counts.opaque.add(name)
            return
        if not num_flops:
            return
        node: Any = torch._C._current_autograd_node()
        if self._running:
            kind = self.counts.recompute if in_backward() else self.counts.forward
            kind[self._running[-1].name] += num_flops
        elif node is not None:
            self.counts.backward[node.metadata.get(_MARK, "")] += num_flops
        else:
            self.counts.forward[""] += num_flops


def _is_compiled(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


_QUESTIONS = frozenset(  # asked of nested tensors, by way of dispatch; answered without us
    [
        *("size", "sym_size", "stride", "sym_stride", "numel", "sym_numel", "dim", "storage_offset", "layout"),
        *("sym_storage_offset", "is_contiguous", "sym_is_contiguous", "is_strides_like_format"),
        "is_non_overlapping_and_dense",
    ]
)


class _Count(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, watch: ModuleWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self._watch.saw_whole(func, args, kwargs)
            return func(*args, **kwargs)  # without us: what it is made of is counted as one
        if func._overloadpacket.__name__ in _QUESTIONS:
            return NotImplemented
        if torch.is_inference_mode_enabled():  # there composite operations come whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._watch.saw(func, args, kwargs, out)
        return out


def _mark(output: Any, ended: _Running) -> None:
    """Name the nodes that were made since the module began, but for those that a module inside it has named."""
    reached: list[Any] = [t.grad_fn for t in tensors_in(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(reached)
    while reached:
        node = reached.pop()
        if node._sequence_nr() < ended.since:
            continue
        node.metadata.setdefault(_MARK, ended.name)
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                reached.append(before)
