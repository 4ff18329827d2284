"""Whole parameters for the length of a ``with``: to look at them, or to change them on one rank for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from tritonspeed import comm
from tritonspeed.zero.group import Group, behind_placeholder, group_of, groups_of, place_of

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Parameter -> its version when a context last kept its changes


class GatheredParameters:
    """Make parameters whole on every rank inside the context. Collective: all ranks enter and leave.

    Args:
        params: one parameter, or any iterable of them (generators too, duplicates once, each rank in any order);
            those that nobody shards, and None, are passed over.
        modifier_rank: the rank whose changes are kept: on leaving they are broadcast, and the masters cut from them
            anew, at every stage. None means nothing is changed.
        fwd_module: accepted for DeepSpeed's signature; units are found without it.
        enabled: False makes the context a no-op.

    Raises:
        ValueError: on leaving, when parameters were changed, in place or by ``p.data = values``, although
            ``modifier_rank`` is None; or were given data of another shape.
    """

    def __init__(
        self,
        params: Parameter | Iterable[Parameter | None],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, torch.Tensor) else [p for p in params if p is not None]
        items = [q for p in given for q in ([p] if group_of(p) is not None else behind_placeholder(p))]
        self.params = list({id(p): p for p in items}.values()) if enabled else []
        self.modifier_rank = modifier_rank
        self._groups: list[Group] = []
        self._versions: dict[int, int] = {}

    def __enter__(self) -> GatheredParameters:
        self.params = sorted((p for p in self.params if group_of(p) is not None), key=_place)
        self._groups = groups_of(self.params)
        for group in self._groups:
            group.acquire("gathered")
        self._versions = {id(p): p._version for p in self.params}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            replaced = [p for p in self.params if self._view_again(p, kind is None)]
            # versions only grow: what a context inside this one has kept is not lost
            changed = [p for p in self.params if p._version > max(self._versions[id(p)], _kept.get(p, 0))]
            if kind is None and self.modifier_rank is not None:
                self._keep_changes()
            elif kind is None and (changed or replaced):
                raise ValueError(
                    f"{len(changed + replaced)} parameter(s), the first of shape"
                    f" {tuple((changed + replaced)[0].shape)}, were changed inside GatheredParameters with"
                    " modifier_rank=None, and the changes would be lost: name the rank whose values to keep,"
                    " modifier_rank=0"
                )
        finally:
            for group in self._groups:
                group.release("gathered")
                group.reshard()

    def _view_again(self, p: Parameter, keeps: bool) -> bool:
        """Whether ``p.data = values`` was said of it, as PEFT does where it merges; the modifier's values are taken."""
        _, bucket, index = place_of(p)
        return bucket.view_again(index, take=keeps and bucket.mesh.rank == self.modifier_rank)

    def _keep_changes(self) -> None:
        assert self.modifier_rank is not None, "changes are kept of a rank that was named"
        touched: dict[int, tuple[Any, list[int]]] = {}
        for p in self.params:
            _, bucket, index = place_of(p)
            comm.broadcast_(bucket.mesh, p.data, self.modifier_rank, f"{bucket.name}: gathered")
            touched.setdefault(id(bucket), (bucket, []))[1].append(index)
            _kept[p] = p._version
        for bucket, indices in touched.values():
            bucket.take_back(indices)


def _place(p: Parameter) -> tuple[int, str, int]:
    """What orders parameters alike on all ranks."""
    group, bucket, index = place_of(p)
    return group.index, bucket.name, index
