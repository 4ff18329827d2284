"""A unit of communication at run time: its buckets go and come together, and it counts who needs it whole."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from tritonspeed.zero.bucket import Bucket, ShardState

# Parameter -> weak references to its Group and Bucket, and its number there. Weak, because a bucket holds its
# parameters, and a value that holds its key never goes. Whoever made the group keeps it.
_group_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Group:
    """The parameters that are gathered and freed together.

    A *hold* is a reason to stay whole ("forward", "backward", "external", "gathered"), counted, so that nested calls of
    one module, recomputation inside backward and ``GatheredParameters`` do not take it from under each other.

    Args:
        index: place in the fixed order of units.
        name: the module's name, for logs and errors.
        buckets: what it is made of.
        modules: the modules whose call needs it.
    """

    def __init__(self, index: int, name: str, buckets: list[Bucket], modules: list[nn.Module]) -> None:
        self.index, self.name, self.buckets, self.modules = index, name, buckets, modules
        self.holds: Counter[str] = Counter()
        self.num_elems = sum(b.layout.numel for b in buckets if b.frees)
        self.frees = any(b.frees for b in buckets)
        self.is_whole = True  # kept by wait and reshard
        self.keeper: RemovableHandle | None = None  # what holds it where no sharded model does: until it is empty
        self.owner: ref[Any] | None = None  # the sharded model that holds it
        for bucket in buckets:
            for i, p in enumerate(bucket.parameters):
                _group_of[p] = (ref(self), ref(bucket), i)

    @property
    def is_sharded(self) -> bool:
        return self.frees and all(b.state is ShardState.SHARDED for b in self.buckets if b.frees)

    def unshard(self, ahead: bool = False) -> None:
        """Start gathering what is sharded; ``ahead`` of its use, as far as there is room."""
        for bucket in self.buckets:
            bucket.unshard(ahead)

    def wait(self) -> None:
        """Until all of it is whole."""
        for bucket in self.buckets:
            bucket.wait()
        self.is_whole = True

    def acquire(self, reason: str) -> None:
        """Make it whole, and keep it so for ``reason`` until ``release``."""
        self.unshard()
        self.holds[reason] += 1
        self.wait()

    def release(self, reason: str, every: bool = False) -> None:
        """End one hold of ``reason`` (or every one of them). Freeing is the caller's decision: ``reshard``."""
        if every or self.holds[reason] <= 1:
            del self.holds[reason]
        else:
            self.holds[reason] -= 1

    def forget(self) -> None:
        """Manage these parameters no longer; they stay as they are."""
        for bucket in self.buckets:
            for p in bucket.parameters:
                _group_of.pop(p, None)

    def disown(self, parameters: list[Parameter]) -> None:
        """Leave these parameters to the group that has taken them over."""
        for bucket in self.buckets:
            bucket.disown(parameters)
        self.buckets = [b for b in self.buckets if b.parameters]
        if not self.buckets and self.keeper is not None:
            self.keeper.remove()

    def reshard(self) -> None:
        """Free the parameters, unless somebody still holds them."""
        if not self.holds and self.frees:
            for bucket in self.buckets:
                bucket.reshard()
            self.is_whole = False


def group_of(p: torch.Tensor) -> Group | None:
    """The unit that ``p`` belongs to; None for a parameter that is not sharded by anyone."""
    found = _group_of.get(p)
    return found[0]() if found else None


def behind_placeholder(t: torch.Tensor) -> list[Parameter]:
    """The parameters that a placeholder without its Parameter stands for: the whole bucket's, which share its memory.

    ``state_dict()`` of a model that zero.Init has built gives such tensors; transformers 4 gathers what is in it.
    """
    if type(t) is not torch.Tensor or t.layout != torch.strided or t.device.type == "meta":
        return []
    if t.untyped_storage().nbytes() != t.element_size():
        return []
    wanted, seen = t.untyped_storage().data_ptr(), set()
    for _, of_bucket, _ in list(_group_of.values()):
        bucket = of_bucket()
        if bucket is None or id(bucket) in seen or bucket.state is not ShardState.SHARDED:
            continue
        seen.add(id(bucket))
        if bucket.parameters and bucket.parameters[0].data.untyped_storage().data_ptr() == wanted:
            return list(bucket.parameters)
    return []


def place_of(p: torch.Tensor) -> tuple[Group, Bucket, int]:
    """p's unit, bucket, and number in the bucket.

    Raises:
        ValueError: p is not managed.
    """
    found = _group_of.get(p)
    group, bucket = (found[0](), found[1]()) if found else (None, None)
    if found is None or group is None or bucket is None:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is not managed by ZeRO: pass parameters of the model that was"
            " given to initialize() or zero.shard()"
        )
    return group, bucket, found[2]


def groups_of(parameters: list[Parameter]) -> list[Group]:
    """The distinct units of ``parameters``, in their fixed order; parameters that are not managed are passed over."""
    groups = {id(g): g for g in map(group_of, parameters) if g is not None}
    return sorted(groups.values(), key=lambda g: g.index)
