"""When units come and go: hooks on modules, on their inputs and outputs, and one callback.

    forward of module k      unit k whole; unit k+1 on its way           (pre-forward hook)
    after module k           unit k freed, unless it is needed again soon    (post-forward hook)
    backward reaches k       unit k whole; unit k-1 on its way           (hook on k's outputs)
    backward leaves k        unit k freed                                (hook on k's inputs)
    backward has ended       what is left: units without such inputs, gradients not yet sent     (engine callback)

The hooks sit on modules, not on the engine, so ``model(...)``, ``model.encoder(...)`` and ``generate`` work as they
are. Recomputation inside backward (activation checkpointing, reentrant or not) finds its unit whole, or makes it so.
What a module shows of its parameters between those events is ``guard``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.group import Group
from tritonspeed.zero.guard import GuardedParameters, ModuleHook, hide_sharded, keep_loaded, refuse_sharded
from tritonspeed.zero.order import Limits, Order
from tritonspeed.zero.reduce import Reducer
from tritonspeed.zero.tree import map_tensors, tensors_in


def in_backward() -> bool:
    """Whether this thread runs inside an autograd backward."""
    return torch._C._current_graph_task_id() != -1


class Hooks:
    """The order of events of one sharded model.

    Args:
        model: its root module.
        groups: units, in their fixed order; group 0 is the root's.
        reducer: where gradients go.
        limits: how far to fetch ahead and what to keep.
    """

    def __init__(self, model: nn.Module, groups: list[Group], reducer: Reducer[Bucket], limits: Limits) -> None:
        self.model, self.groups, self.reducer = model, groups, reducer
        self.order = Order([g.num_elems for g in groups], limits)
        self.begin_backward: Callable[[], float] | None = None  # what gradients are multiplied with
        self._scale = 1.0
        self.after_backward: Callable[[], None] | None = None
        self.on_discard: Callable[[], None] | None = None  # gradients were dropped: a backward had not finished
        self._handles: list[RemovableHandle] = []
        self._guarded: list[nn.Module] = []
        self._running: list[list[Group]] = []  # per forward of a hooked module under way: units it read from elsewhere
        self._backward_open = False
        self._installed = False
        self.install()

    # installing

    def install(self) -> None:
        """Register every hook; a no-op where they are."""
        if self._installed:
            return
        self._installed = True
        frees = any(g.frees for g in self.groups)
        self._hook_module(self.model, self.groups[0])
        for group in self.groups:
            if group.frees:
                for module in group.modules:
                    if module is not self.model:
                        self._hook_module(module, group)
            for bucket in group.buckets:
                if bucket.trainable:
                    for i, p in enumerate(bucket.parameters):
                        self._handles.append(p.register_post_accumulate_grad_hook(self._taker(bucket, i)))
        for module in self.model.modules():
            if module._parameters:
                self._handles.append(module.register_state_dict_post_hook(hide_sharded))
                self._handles.append(module.register_load_state_dict_pre_hook(refuse_sharded))
                self._handles.append(module.register_load_state_dict_post_hook(keep_loaded))
                if frees and not isinstance(module._parameters, GuardedParameters):  # zero.Init's are no plain dict
                    module.__dict__["_parameters"] = GuardedParameters(module._parameters, self._read)
                    self._guarded.append(module)

    def remove(self) -> None:
        """Take every hook off; ``install`` puts them back. Parameters stay where they are."""
        for handle in self._handles:
            handle.remove()
        for module in self._guarded:
            module.__dict__["_parameters"] = dict(dict.items(module._parameters))
        self._handles, self._guarded, self._installed = [], [], False

    def _hook_module(self, module: nn.Module, group: Group) -> None:
        @torch._dynamo.disable
        def pre_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._pre_forward(group, module, args, kwargs)

        @torch._dynamo.disable
        def post_forward(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return self._post_forward(group, module, output)

        pre, post = ModuleHook(pre_forward), ModuleHook(post_forward)
        self._handles.append(module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(post, always_call=True))

    def _taker(self, bucket: Bucket, index: int) -> Callable[[Tensor], None]:
        # Weak, because what a parameter's hook holds is out of the garbage collector's sight, and we hold the parameter
        hooks, home = ref(self), ref(bucket)

        def take(p: Tensor) -> None:
            gradient, p.grad = p.grad, None
            assert gradient is not None, "a post-accumulate hook sees a gradient"
            ours, place = hooks(), home()
            if ours is not None and place is not None:
                ours._open_backward()
                if ours._scale != 1.0:
                    gradient.detach().mul_(ours._scale)
                ours.reducer.receive(place, index, gradient)

        return take

    # forward

    def _pre_forward(self, group: Group, module: nn.Module, args: Any, kwargs: Any) -> Any:
        recomputing = in_backward()
        if not recomputing and module is self.model:
            self._running.clear()  # an interrupted forward (Ctrl-C) did not come to its end
        if not recomputing and not self._running:
            self._begin_iteration()
        self._running.append([])
        if group.frees:
            self._need(group, "backward" if recomputing else "forward")
        if not torch.is_grad_enabled() or not group.frees:
            return None
        watched: list[Tensor] = []

        def watch(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            watched.append(t.view_as(t))  # a view of its own: its gradient is complete when this module's backward is
            return watched[-1]

        args, kwargs = map_tensors((args, kwargs), watch)
        if len(watched) == 1:
            watched[0].register_hook(lambda _: self._leave_backward(group))
        elif watched:
            torch.autograd.graph.register_multi_grad_hook(watched, lambda _: self._leave_backward(group))
        return args, kwargs

    def _post_forward(self, group: Group, module: nn.Module, output: Any) -> None:
        elsewhere = self._running.pop() if self._running else []
        recomputing = in_backward()
        if group.frees and not recomputing:
            group.release("forward")
            if not (torch.is_grad_enabled() and self.order.keep(group.index, self._live_elems())):
                group.reshard()
        if torch.is_grad_enabled():
            is_root = module is self.model and not recomputing
            for tensor in tensors_in(output):
                if tensor.requires_grad and (group.frees or is_root or elsewhere):
                    tensor.register_hook(self._entering(group, elsewhere))
        if not self._running and not recomputing and not torch.is_grad_enabled():
            self._sweep("external")

    def _entering(self, group: Group, elsewhere: list[Group]) -> Callable[[Tensor], None]:
        def enter(_: Tensor) -> None:
            self._open_backward()
            if group.frees and not group.holds["backward"]:
                self._need(group, "backward")
            for read in elsewhere:
                if not read.holds["external"]:
                    read.acquire("external")

        return enter

    def _begin_iteration(self) -> None:
        if self._backward_open:  # a backward that raised never came to its callback
            self._backward_open = False
            self.reducer.reset()
            self._sweep("backward", "forward", "external")
            if self.on_discard is not None:
                self.on_discard()
        self.order.begin("train" if torch.is_grad_enabled() else "eval")

    def _need(self, group: Group, reason: str) -> None:
        """Make ``group`` whole for ``reason`` now, and start the units that come next."""
        self.order.need(group.index)
        group.holds[reason] += 1
        group.unshard()
        for index in self.order.ahead(self._live_elems()):
            self.groups[index].unshard(ahead=True)
        group.wait()

    def _live_elems(self) -> int:
        return sum(g.num_elems for g in self.groups if g.frees and not g.is_sharded)

    def _read(self, group: Group) -> None:
        if group.is_whole and group.holds["backward"]:  # its own module, recomputed
            return
        if self._running and group not in self._running[-1]:
            self._running[-1].append(group)
        if (self._running or in_backward()) and not group.holds["external"]:
            group.acquire("external")

    # backward

    def _open_backward(self) -> None:
        if not self._backward_open:
            self._scale = self.begin_backward() if self.begin_backward is not None else 1.0
            self._backward_open = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _leave_backward(self, group: Group) -> None:
        if group.index != 0:  # the root stays until backward has ended
            group.release("backward", every=True)
            group.reshard()
            self.reducer.leave(group.buckets)

    def _end_backward(self) -> None:
        self._backward_open = False
        self.reducer.finish_backward()
        self._sweep("backward", "external", *(() if self._running else ("forward",)))
        if self.after_backward is not None:
            self.after_backward()
        self.reducer.check_all_used()

    def _sweep(self, *reasons: str) -> None:
        """End every hold for ``reasons`` and free whatever nobody holds: units fetched ahead in vain among them."""
        for group in self.groups:
            for reason in reasons:
                group.release(reason, every=True)
            if group.frees:
                group.reshard()
