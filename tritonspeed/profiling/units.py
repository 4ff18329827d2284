"""When forward and backward of each unit begin and end, by hooks that are there only while somebody listens.

A unit's backward begins where autograd comes to the node that made its output, and ends where the gradient of its
first differentiable input is complete. One without such an input (an embedding) ends where another unit, which is not
inside it, begins, or backward ends. The root's is what is around all others: the loss, and what is between units.

Nothing is wrapped and no view is made: the graph, and so the order of every sum in it, is the one without us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonspeed.comm.spans import UNIT_AGAIN, UNIT_BACKWARD, UNIT_FORWARD, Span, Spans
from tritonspeed.zero import ShardedModel
from tritonspeed.zero.guard import ModuleHook
from tritonspeed.zero.hooks import in_backward
from tritonspeed.zero.tree import tensors_in

_on_model: WeakKeyDictionary[nn.Module, ReferenceType[UnitTimes]] = WeakKeyDictionary()  # whose hooks a model has


class UnitTimes:
    """The hooks on the modules of every unit.

    Args:
        sharded: the model in its units.
        spans: where they are told.
    """

    def __init__(self, sharded: ShardedModel, spans: Spans) -> None:
        self._spans = spans
        self.at_boundary: Callable[[], None] | None = None  # called where a unit begins or ends
        self._forwards: list[Span] = []
        self._backwards: list[tuple[nn.Module, Span]] = []  # open ones, each inside the one before
        self._inside: dict[nn.Module, set[nn.Module]] = {}
        self._handles: list[RemovableHandle] = []
        earlier = _on_model.get(sharded.model)
        if earlier is not None and (other := earlier()) is not None:
            other.remove()  # the model was sharded anew, by another engine: units would be told of twice
        _on_model[sharded.model] = ref(self)
        for group in sharded.groups:
            parts = {part for module in group.modules for part in module.modules() if part is not module}
            for module in group.modules:
                if module not in parts:  # the root has parts of its own among its modules: they are inside it
                    self._inside[module] = set(module.modules())
                    self._hook(module, group.name)

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, module: nn.Module, name: str) -> None:
        @torch._dynamo.disable
        def pre_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            again = in_backward()
            if not again and self._backwards and not self._forwards:
                self.end_backward()  # an earlier one was interrupted
            if torch.is_grad_enabled():
                differentiable = (t for t in tensors_in((args, kwargs)) if t.requires_grad)
                if (first := next(differentiable, None)) is not None:
                    first.register_hook(self._leaving(module))
            self._pass_boundary()
            if self._spans.on:
                self._forwards.append(self._spans.open(UNIT_AGAIN if again else UNIT_FORWARD, name))

        @torch._dynamo.disable
        def post_forward(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._pass_boundary()
            if self._forwards:
                self._forwards.pop().close()
            if torch.is_grad_enabled():
                for tensor in tensors_in(output):
                    if tensor.grad_fn is not None:
                        tensor.grad_fn.register_prehook(self._entering(module, name))

        pre, post = ModuleHook(pre_forward), ModuleHook(post_forward)
        self._handles.append(module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(post, always_call=True))

    def _entering(self, module: nn.Module, name: str) -> Callable[[Any], None]:
        def enter(_: Any) -> None:
            if any(open_one is module for open_one, _ in self._backwards) or not self._spans.on:
                return
            self._pass_boundary()
            while self._backwards and module not in self._inside[self._backwards[-1][0]]:
                self._backwards.pop()[1].close()
            self._backwards.append((module, self._spans.open(UNIT_BACKWARD, name)))

        return enter

    def _leaving(self, module: nn.Module) -> Callable[[Tensor], None]:
        def leave(_: Tensor) -> None:
            if any(open_one is module for open_one, _ in self._backwards):
                self._close_until(module)

        return leave

    def _pass_boundary(self) -> None:
        if self.at_boundary is not None:
            self.at_boundary()

    def _close_until(self, module: nn.Module) -> None:
        while True:
            last, span = self._backwards.pop()
            span.close()
            if last is module:
                return

    def end_backward(self) -> None:
        """Backward has ended, or will not come to its end."""
        while self._backwards:
            self._backwards.pop()[1].close()
