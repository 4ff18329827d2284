"""States of a sharded model put away in host memory between phases: a model that generates needs the device alone.

A state's storage on the device shrinks to nothing and grows again where it was: it is the same storage, and every view
of it (masters, chunks, moments, parameters) is the same tensor before and after. While it is away, those tensors are
placeholders of the true shape that read as NaN, and what would compute with them raises.

    optim_states             the optimizer's tensors
    hp_params                fp32 masters, where they are not the parameters themselves
    lp_params                parameters: whole at stages 0 to 2, shards at stage 3; masters too that are the same memory
    lp_grads                 gradients summed over the ranks, if there are any
    contiguous_grad_buffer   this rank's gradients of unfinished accumulations, if there are any
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage

from tritonspeed.offload import Tier
from tritonspeed.offload.memory import host_empty
from tritonspeed.zero.bucket import Bucket

if TYPE_CHECKING:
    from tritonspeed.zero.shard import ShardedModel

log = logging.getLogger("tritonspeed")


class OffloadStateTypeEnum(str, Enum):
    """Kinds of state, by DeepSpeed's names; the plain strings do as well."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class OffloadDeviceEnum(str, Enum):
    """Places, by DeepSpeed's names; the plain strings do as well."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(eq=False)
class _Stored:
    """One storage that is away.

    Attributes:
        category: the ledger's.
        host: its bytes.
        views: tensors that show it, and what they were.
    """

    kind: str
    category: str
    storage: UntypedStorage
    host: Tensor
    views: list[tuple[Tensor, Tensor]]


class Away:
    """What of one model is away.

    Args:
        sharded: the model; its stepper is asked for when something happens.
    """

    def __init__(self, sharded: ShardedModel) -> None:
        self.sharded = sharded
        self._stored: list[_Stored] = []
        self._spare: list[Tensor] = []  # page-locked memory of the last time: locking it again would take longer
        self._end_guard: list[Callable[[], None]] = []

    @property
    def kinds(self) -> list[str]:
        """Names of what is away."""
        return [kind.value for kind in OffloadStateTypeEnum if any(each.kind == kind for each in self._stored)]

    @torch.no_grad()
    def offload(
        self,
        include: Container[OffloadStateTypeEnum | str] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Free the device of these states; what is in host memory or on disk anyway stays there.

        Args:
            include: kinds of state; None is all of them.
            device: "cpu"; "none" does nothing.
            pin_memory: page-locked host memory, which is kept for the next time.
            non_blocking: return while the GPU still copies; the memory is free for what it is given next.

        Raises:
            ValueError: another kind or place, or parameters are held whole (inside ``GatheredParameters``).
        """
        where = device.value if isinstance(device, Enum) else str(device)
        if where == "none":
            log.warning("offload_states(device='none') moves nothing: leave device out, or pass 'cpu'")
            return
        if where != "cpu":
            raise ValueError(f"offload_states(device={where!r}): states go to host memory alone, device='cpu'")
        wanted = _wanted(include)
        self._come_to_rest()
        mesh_device = self.sharded.mesh.device
        on_gpu = mesh_device.type == "cuda"
        for kind in wanted:
            for category, tensors in list(self._states_of(kind)):
                self._put(kind, category, tensors, pin_memory and on_gpu)
        if on_gpu and not non_blocking:
            torch.cuda.current_stream(mesh_device).synchronize()
        if self._stored and not self._end_guard:
            self._guard()

    @torch.no_grad()
    def reload(self, non_blocking: bool = False) -> None:
        """Bring everything back to where it was.

        Args:
            non_blocking: return while the GPU still copies; what it is given next comes after.
        """
        ledger, device = self.sharded.ledger, self.sharded.mesh.device
        while self._stored:
            each = self._stored.pop()
            each.storage.resize_(each.host.numel())
            _bytes_of(each.storage).copy_(each.host, non_blocking=True)
            for tensor, was in each.views:
                tensor.data = was
            ledger.add(each.category, each.host.numel())
            ledger.host.add(each.category, -each.host.numel())
            if device.type == "cuda":
                self._spare.append(each.host)
        if device.type == "cuda" and not non_blocking:
            torch.cuda.current_stream(device).synchronize()
        for end in self._end_guard:
            end()
        self._end_guard.clear()

    def require_here(self, call: str) -> None:
        """Raise if ``call`` needs what is away.

        Raises:
            ValueError: something is away, or the whole model is another's now.
        """
        if self.sharded.taken_over:
            raise ValueError(
                f"{call} of an engine whose model was given to initialize() or zero.shard() again: the later one trains"
                " it now"
            )
        if self._stored:
            raise ValueError(f"{call} while {', '.join(self.kinds)} are in host memory: call reload_states() first")

    def close(self) -> None:
        """Bring everything back, and let go of host memory."""
        self.reload()
        self._spare.clear()

    def _come_to_rest(self) -> None:
        """Updates have ended, and nothing is whole that the stage frees."""
        if self.sharded.stepper is not None:
            self.sharded.stepper.late.finish()
        for group in self.sharded.groups:
            if group.holds and group.frees:
                raise ValueError(
                    f"offload_states() while '{group.name}' is held whole ({', '.join(group.holds)}): call it between"
                    " steps, outside GatheredParameters"
                )
            group.reshard()

    # what there is

    def _states_of(self, kind: str) -> Iterator[tuple[str, list[Tensor]]]:
        """(the ledger's category, tensors of one storage) of every storage of a kind on the device."""
        for bucket in self.sharded.buckets:
            on_device = bucket.tier is Tier.DEVICE  # else masters, moments and sums are on the host, or on disk
            if kind == "lp_params":
                yield from self._parameters_of(bucket)
            elif kind == "hp_params" and on_device and bucket.master is not None and not _is_in_whole(bucket):
                category = "parameters" if bucket.types.compute == bucket.types.master else "optimizer"
                yield category, [bucket.master, *self._masters_of(bucket)]
            elif kind == "lp_grads" and on_device and bucket.grad is not None:
                yield "gradients", [bucket.grad]
            elif kind == "contiguous_grad_buffer" and bucket.outbox is not None:
                yield "gradients", [bucket.outbox]
            elif kind == "optim_states" and on_device:
                yield from (("optimizer", [state]) for state in self._moments_of(bucket))

    def _parameters_of(self, bucket: Bucket) -> Iterator[tuple[str, list[Tensor]]]:
        if bucket.shard is not None and bucket.shard_tier is Tier.DEVICE:
            yield "parameters", [bucket.shard]
        if bucket.frees:
            return
        shown = [p for p in bucket.parameters if p.numel()]
        masters = [bucket.master, *self._masters_of(bucket)] if _is_in_whole(bucket) else []
        yield "parameters", [bucket.whole, *shown, *(m for m in masters if m is not None)]

    def _masters_of(self, bucket: Bucket) -> list[Tensor]:
        stepper = self.sharded.stepper
        return [chunk.master for chunk in stepper.chunks if chunk.bucket is bucket] if stepper is not None else []

    def _moments_of(self, bucket: Bucket) -> Iterator[Tensor]:
        stepper = self.sharded.stepper
        for chunk in stepper.chunks if stepper is not None else ():
            if chunk.bucket is bucket:
                states = stepper.state.get(chunk.master, {}).values()  # type: ignore[union-attr]
                yield from (
                    s for s in states if isinstance(s, Tensor) and s.numel() > 1 and s.device == chunk.master.device
                )

    # moving

    def _put(self, kind: str, category: str, tensors: list[Tensor], pin: bool) -> None:
        storage = tensors[0].untyped_storage()
        num_bytes = storage.nbytes()
        if num_bytes < tensors[0].nbytes:  # a placeholder: away already, or on disk
            return
        host = self._host(num_bytes, pin)
        host.copy_(_bytes_of(storage), non_blocking=True)  # what reuses the memory on this stream comes after
        views = [(tensor, tensor.data) for tensor in tensors]
        for tensor, was in views:
            tensor.data = _placeholder(was)
        storage.resize_(0)
        self._stored.append(_Stored(kind, category, storage, host, views))
        self.sharded.ledger.add(category, -num_bytes)
        self.sharded.ledger.host.add(category, num_bytes)

    def _host(self, num_bytes: int, pin: bool) -> Tensor:
        for i, each in enumerate(self._spare):
            if each.numel() == num_bytes:
                return self._spare.pop(i)
        return host_empty(num_bytes, torch.uint8, pin=pin)

    def _guard(self) -> None:
        """Forward, backward and step, and whoever reads parameters, raise until everything is back."""

        def refuse(call: str) -> Callable[..., Any]:
            return lambda *_: self.require_here(call)

        sharded = self.sharded
        modules = dict.fromkeys([sharded.model, *(m for group in sharded.groups for m in group.modules)])
        handles: list[Any] = [m.register_forward_pre_hook(refuse("forward"), prepend=True) for m in modules]
        if sharded.stepper is not None:
            handles.append(sharded.stepper.register_step_pre_hook(refuse("step()")))
        self._end_guard = [handle.remove for handle in handles]
        begin = sharded.hooks.begin_backward
        sharded.hooks.begin_backward = refuse("backward")
        self._end_guard.append(lambda: setattr(sharded.hooks, "begin_backward", begin))
        for bucket in sharded.buckets:
            bucket.refuse = refuse("reading or changing parameters")
            self._end_guard.append(functools.partial(setattr, bucket, "refuse", None))


def _wanted(include: Container[OffloadStateTypeEnum | str] | None) -> list[str]:
    known = [kind.value for kind in OffloadStateTypeEnum]
    if include is None:
        return known
    if isinstance(include, str):
        include = [include]
    names = [getattr(each, "value", each) for each in include]  # type: ignore[attr-defined]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"offload_states(include={names}): {unknown[0]!r} is none of {', '.join(known)}")
    return [kind for kind in known if kind in names]


def _is_in_whole(bucket: Bucket) -> bool:
    """Whether the master is the own slice of the parameters' memory."""
    master = bucket.master
    return master is not None and master.untyped_storage().data_ptr() == bucket.whole.untyped_storage().data_ptr()


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """A storage as (nbytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _placeholder(tensor: Tensor) -> Tensor:
    nothing = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), nothing, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
