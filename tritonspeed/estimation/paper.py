"""A run's buckets, groups, tiers and tiles without their memory: what the walk in ``memory`` enters into a ledger.

Where a rank's part lives is decided by the run's own ``Homes``, tiles come and go through its own ``Ring``, gradients
leave by its own ``Reducer``; what stands here is only how many bytes each of a bucket's tensors has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tritonspeed.estimation.paper_ledger import PaperLedger
from tritonspeed.estimation.paper_tiers import PaperFlat, PaperHomes, States
from tritonspeed.offload import Tier
from tritonspeed.offload.stream import Buffer, Ring
from tritonspeed.offload.tiers import Handle
from tritonspeed.zero.chunk import cuts
from tritonspeed.zero.homes import PAGE_ELEMS
from tritonspeed.zero.layout import round_up, runs
from tritonspeed.zero.ledger import Account
from tritonspeed.zero.plan import BucketPlan, UnitPlan
from tritonspeed.zero.stages import Stage
from tritonspeed.zero.tile import GRADIENT, MASTER, PARAMETERS, is_staged, tile_ends

if TYPE_CHECKING:
    from tritonspeed.zero.bucket import Bucket


@dataclass
class PaperBucket:
    """A bucket whose memory is only counted: what ``Reducer`` needs of one, and ``Ring`` of its tiles.

    Attributes:
        keeps_rounded: its bf16 copy is not what rounding the master gives.
    """

    plan: BucketPlan
    stage: Stage
    ledger: PaperLedger
    homes: PaperHomes
    keeps_rounded: bool = False
    outbox: object | None = None
    is_updating: bool = False
    tiles: list[PaperTile] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.layout, self.types = self.plan.name, self.plan.layout, self.plan.types
        self.parameters, self.trainable = self.plan.parameters, self.plan.trainable
        self.tier, self.shard_tier = self.homes.tiers(self.name)
        self.frees = self.stage.shards_parameters and not self.plan.persistent
        self.whole_bytes = self.layout.numel * self.types.compute.itemsize
        self.owned = self.layout.slice_numel if self.stage.shards_optimizer else self.layout.numel
        self.shard_flat: PaperFlat | None = None
        self.has_shard = False
        self._kind, self._outbox_bytes, self._grad_bytes = "communication", 0, 0
        self._staged: Tensor | None = None
        self._grad: Tensor | None = None  # where it crosses to the host
        self._landing: Tensor | None = None

    @property
    def rounds_master(self) -> bool:
        """As the run's bucket: no shard is kept where the master stands where modules compute."""
        return self.tier is Tier.DEVICE or (self.tier is Tier.HOST and self.homes.shares_memory)

    # between steps

    def build(self) -> None:
        """Enter parameters, masters and shards."""
        if not self.frees:
            self.ledger.add("parameters", self.whole_bytes)
        if self.trainable:
            self._enter_master()
        needs_shard = not self.trainable or not self.rounds_master
        if self.frees and (needs_shard or (self.keeps_rounded and self.types.compute == torch.bfloat16)):
            self._enter_shard(self.shard_tier if needs_shard else Tier.DEVICE)

    def enter_states(self, states: States | int) -> None:
        """Enter what the first step makes.

        Args:
            states: of the optimizer; a number is their bytes here, where they are not offloaded.
        """
        if isinstance(states, int):
            self.ledger.add("optimizer", states)
            return
        slice_numel = self.layout.slice_numel
        num_slices = self.owned // slice_numel
        if self.tier is Tier.DISK:
            for kind, dtype in states.kinds(slice_numel).items():
                self.homes.on_disk(self.name, kind, dtype, self.layout, (0, self.owned))
            self.ledger.host.add("optimizer", num_slices * states.scale_bytes(slice_numel))
        else:
            self.ledger.of(self.tier).add("optimizer", num_slices * states.slice_bytes(slice_numel))
        self._cut_tiles(states)

    @property
    def is_staged(self) -> bool:
        """Whether a step needs buffers for it."""
        return is_staged(cast("Bucket", self), self.homes)

    def _enter_master(self) -> None:
        compute, master = self.types.compute, self.types.master
        if self.tier is Tier.DISK:
            self.homes.on_disk(self.name, MASTER, master, self.layout, (0, self.owned))
        elif self.frees or compute != master or not self.rounds_master:
            category = "parameters" if compute == master else "optimizer"
            self.ledger.of(self.tier).add(category, self.owned * master.itemsize)

    def _enter_shard(self, tier: Tier) -> None:
        self.has_shard = True
        numel, compute = self.layout.slice_numel, self.types.compute
        if tier is Tier.DISK:
            flat = self.homes.on_disk(self.name, PARAMETERS, compute, self.layout, (0, numel), slots=1)
            self.shard_flat = cast(PaperFlat, flat)
        else:
            self.ledger.of(tier).add("parameters", numel * compute.itemsize)

    # whole or not

    def unshard(self, ahead: bool) -> bool:
        """Enter ``whole`` and what it is read into; whether it was started."""
        if ahead and (self.is_updating or not self._has_room()):
            return False
        self.settle()
        self.ledger.add("communication", self.whole_bytes)
        if self.shard_flat is not None:
            self._staged = self.homes.stage(self.shard_flat.numel, self.types.compute)
        return True

    def _has_room(self) -> bool:
        return self.shard_flat is None or self.homes.may_stage(self.layout.slice_numel * self.types.compute.itemsize)

    def wait(self) -> None:
        """It has come: what it was read into goes."""
        if self._staged is not None:
            self.homes.unstage(self._staged)
            self._staged = None

    def reshard(self) -> None:
        """``whole`` goes."""
        self.wait()
        self.ledger.add("communication", -self.whole_bytes)

    # gradients

    def receive(self, index: int, gradient: object, accumulating: bool) -> None:
        """Of ``Reducer``: a gradient opens the outbox."""
        if self.outbox is None:
            self.outbox = True
            self._kind = "gradients" if accumulating else "communication"
            itemsize = self.types.accumulate.itemsize if accumulating else self.types.compute.itemsize
            self._outbox_bytes = self.layout.numel * itemsize
            self.ledger.add(self._kind, self._outbox_bytes)

    def send(self, accumulating: bool) -> Callable[[], None]:
        """Of ``Reducer``: the outbox leaves; ends when what is returned is called."""
        self.settle()
        self.receive(0, None, accumulating)
        stands_in = self.types.accumulate if accumulating else self.types.compute
        wire = self.types.reduce or stands_in
        self.outbox, world = None, self.layout.world
        if world == 1 and wire == stands_in:
            self.ledger.add(self._kind, -self._outbox_bytes)
            self._take(stands_in)
            return lambda: None
        extra = self.layout.numel * wire.itemsize if wire != stands_in else 0
        received = (world - 1) * self.layout.slice_numel * wire.itemsize if world > 1 else 0
        held = [(self._kind, self._outbox_bytes), ("communication", extra + received)]
        self.ledger.add("communication", extra + received)
        if self._crosses:
            held.append(("communication", self.owned * self.types.accumulate.itemsize))
            self.ledger.add(*held[-1])
        else:
            self._take(self.types.accumulate)

        def finish() -> None:
            if self._crosses and (world == 1 or self.homes.mesh.backend == "nccl"):
                self._take(wire)
            elif self._crosses:
                self.ledger.add("communication", -held.pop()[1])
                self._take(self.types.accumulate)
            for kind, num_bytes in held:
                self.ledger.add(kind, -num_bytes)

        return finish

    @property
    def _crosses(self) -> bool:
        elsewhere = not self.homes.shares_memory and self.tier is not Tier.DEVICE
        return elsewhere and self.owned == self.layout.slice_numel

    @property
    def _account(self) -> Account:
        on_device = self.tier is Tier.DEVICE or not (self._crosses or self.homes.shares_memory)
        return self.ledger if on_device else self.ledger.host

    def _take(self, dtype: torch.dtype) -> None:
        """A sum comes: the first stands in its own dtype, what is added to it in the accumulate dtype."""
        if self._crosses:
            self.land()
            self._landing = self.homes.lend("gradients", self.owned, dtype)
            self.homes.leave(torch.empty(self.owned, dtype=dtype, device="meta"), self._landing)
            return
        before = self._grad_bytes
        self._grad_bytes = self.owned * (self.types.accumulate if before else dtype).itemsize
        if self._grad_bytes != before:
            self._account.add("gradients", self._grad_bytes)
            self._account.add("gradients", -before)

    def land(self) -> None:
        """The sum on its way has come."""
        place, self._landing = self._landing, None
        if self._grad is None or place is None:
            self._grad = place if self._grad is None else self._grad
            return
        if self._grad.dtype != self.types.accumulate:
            narrow, self._grad = self._grad, self.homes.lend("gradients", self.owned, self.types.accumulate, False)
            self.homes.take_back("gradients", narrow)
        self.homes.take_back("gradients", place)

    def settle(self) -> None:
        """It has been updated, if it was about to be."""
        if self.is_updating:
            self.is_updating = False
            self.drop_grad()

    def drop_grad(self) -> None:
        """The gradient goes, unless the update that runs late still reads it."""
        if self.is_updating:
            return
        self.land()
        if self._grad is not None:
            self.homes.take_back("gradients", self._grad)
        self._account.add("gradients", -self._grad_bytes)
        self.outbox, self._grad, self._grad_bytes = None, None, 0

    # the step

    def _cut_tiles(self, states: States) -> None:
        """As ``zero.tile.cut_tiles``, of one optimizer group."""
        slice_numel, spans = self.layout.slice_numel, self.layout.spans
        kinds: dict[str, torch.dtype] = {}
        if self.tier is Tier.DISK:
            kinds = {MASTER: self.types.master, **states.kinds(slice_numel)}
        for lo in range(0, self.owned, slice_numel):
            hi = lo + slice_numel
            if self.is_staged:
                ends = tile_ends(runs(spans, {s.name: 0 for s in spans}, lo, hi), lo, hi, self.homes.tile_elems)
            else:
                ends = cuts(lo, hi, self.homes.sub_group_size)
            self.tiles += [PaperTile(self, last - first, kinds) for first, last in pairwise(ends)]

    @property
    def stages_copy(self) -> bool:
        """Whether a tile's compute-dtype copy needs a place in a buffer."""
        if self.shard_flat is not None:
            return True
        on_host = self.tier is not Tier.DEVICE
        if self.frees:
            return self.has_shard and self.shard_tier is Tier.DEVICE and on_host and not self.homes.shares_memory
        is_master = self.types.compute == self.types.master and self.rounds_master
        return not is_master and on_host and not self.homes.shares_memory

    @property
    def stages_gradient(self) -> bool:
        """Whether the gradient comes from the device tile by tile."""
        return not self.homes.shares_memory and self.owned != self.layout.slice_numel


@dataclass
class PaperTile:
    """What ``Ring`` asks of a tile: which of a buffer's tensors it touches."""

    bucket: PaperBucket
    numel: int
    kinds: dict[str, torch.dtype]

    def __post_init__(self) -> None:
        self.needs_buffer = self.bucket.is_staged

    def fetch(self, buffer: Buffer | None) -> None:
        """Make what the tile needs of a buffer."""
        if buffer is None:
            return
        for kind, dtype in self.kinds.items():
            buffer.of(kind, dtype, self.numel)
        if self.bucket.stages_gradient:
            buffer.of(GRADIENT, self.bucket.types.accumulate, self.numel)
        if self.bucket.stages_copy:
            buffer.of(PARAMETERS, self.bucket.types.compute, self.numel)

    def fetch_ahead(self, buffer: Buffer | None) -> None: ...

    def forget(self) -> None: ...

    def wait(self) -> None: ...

    def store(self) -> list[Handle]:
        return []

    def leave(self) -> None: ...


def paper_ring(buckets: Sequence[PaperBucket], homes: PaperHomes) -> Ring[PaperTile]:
    """The step's buffers, entered as they are made."""

    def empty(numel: int, dtype: torch.dtype) -> Tensor:
        homes.ledger.host.add("communication", numel * dtype.itemsize)
        return homes.empty(numel, dtype)

    longest = max((tile.numel for bucket in buckets for tile in bucket.tiles if tile.needs_buffer), default=0)
    return Ring(homes.offload.buffers, lambda: Buffer(round_up(longest, PAGE_ELEMS), empty))


class PaperGroup:
    """One unit: its buckets on paper, and whether they are whole."""

    def __init__(self, index: int, unit: UnitPlan, buckets: list[PaperBucket]) -> None:
        self.index, self.name, self.modules, self.buckets = index, unit.name, unit.modules, buckets
        self.num_elems = sum(b.layout.numel for b in buckets if b.frees)
        self.frees = any(b.frees for b in buckets)
        self._here: set[int] = set()

    @property
    def whole(self) -> bool:
        """Whether any of it is whole, or on its way."""
        return bool(self._here)

    def unshard(self, ahead: bool = False) -> None:
        """Start what is not here."""
        for bucket in self.buckets:
            if bucket.frees and id(bucket) not in self._here and bucket.unshard(ahead):
                self._here.add(id(bucket))

    def wait(self) -> None:
        """Until it is here."""
        for bucket in self.buckets:
            bucket.wait()

    def reshard(self) -> None:
        """All of it goes."""
        for bucket in self.buckets:
            if id(bucket) in self._here:
                bucket.reshard()
        self._here.clear()
