"""One flat buffer of parameters over the ranks: its storage, its gradient, and who holds which bytes when.

The parameters of a bucket are views of ``whole``, so an all-gather lands in place with no copy out, and the gradient
of a bucket leaves in one piece. Sizes in elements, N ranks, P = layout.numel:

    whole     W[P]     compute dtype     what the modules compute with; at stage 3 only while in use
    master    M[P/N]   fp32              what the optimizer updates (stage 0: M[P]); trainable buckets only
    shard     S[P/N]   compute dtype     what ``whole`` is gathered from at stage 3 where it is not the rounded master:
                                         frozen, rounded at random, or the master is elsewhere
    grad      G[P/N]   accumulate dtype  the sum over the ranks (stage 0: G[P]), from its first reduction to the step
    outbox    g[P]     compute dtype     this rank's gradient, from its first element to its departure

Where the compute dtype is the master's, ``master`` is the own slice of ``whole`` itself (stages 0-2), not a copy.
Master and shard may live in other tiers than the device: ``homes`` knows. On disk they are ``master_flat`` and
``shard_flat``, and the attributes of a resident one are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.comm import Mesh, Pending
from tritonspeed.comm.spans import FETCH, FETCH_WAIT, GATHER_SEND, GATHER_WAIT, UPDATE_WAIT, Span
from tritonspeed.offload import Tier
from tritonspeed.offload.crossing import Crossing
from tritonspeed.offload.disk import DiskFlat
from tritonspeed.offload.tiers import Handle
from tritonspeed.zero.gradient import Gradient
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.plan import BucketPlan
from tritonspeed.zero.stages import Stage


class ShardState(Enum):
    """Where a bucket's parameters are.

    - ``SHARDED``: the modules' parameters are placeholders of the right shape that read as NaN and refuse writes;
      ``whole`` holds no memory.
    - ``GATHERING``: ``whole`` is allocated and on its way; placeholders still stand in the modules.
    - ``WHOLE``: the parameters are views of ``whole``.
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    WHOLE = "whole"


class Bucket(Gradient):
    """See the module's docstring. Made whole; ``reshard`` frees it where the stage shards parameters.

    Args:
        plan: names, places and dtypes; the parameters' present values become the bucket's (rank 0's, on every rank).
        mesh: the ranks that share it.
        stage: what is sharded; a persistent bucket keeps its parameters at stage 3 too.
        ledger: where its bytes are entered.
        trains: False where no optimizer will come: then there are neither masters nor gradients.
        homes: where masters and shards live; None is the device.
    """

    def __init__(
        self,
        plan: BucketPlan,
        mesh: Mesh,
        stage: Stage,
        ledger: Ledger,
        trains: bool = True,
        homes: Homes | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layout, self.types = plan.name, plan.layout, plan.types
        self.parameters = list(plan.parameters)
        self.mesh, self.ledger, self.homes, self.stage = mesh, ledger, homes, stage
        self.tier, self.shard_tier = homes.tiers(plan.name) if homes else (Tier.DEVICE, Tier.DEVICE)
        self.trainable = plan.trainable and trains
        self.frees = stage.shards_parameters and not plan.persistent
        self.own = self.layout.interval(mesh.rank)
        self.owned = self.own if stage.shards_optimizer else (0, self.layout.numel)
        self.state = ShardState.WHOLE
        self.master: Tensor | None = None  # None too where it is on disk: ``master_flat``
        self.master_flat: DiskFlat | None = None
        self.shard: Tensor | None = None
        self.shard_flat: DiskFlat | None = None
        self.shard_crosses = False  # ``shard`` stands beside a GPU
        self.stepper: Any = None  # the ZeroOptimizer that updates it
        self.is_updating = False  # the stepper has not come to it yet: ``settle`` waits
        self.refuse: Callable[[], None] | None = None  # while its states are away: raises, and says who has them
        self._pending: Pending | None = None
        self._arriving: tuple[Handle, Tensor] | None = None  # the shard, on its way from the disk
        self._fetching: Span | None = None
        self._crossing: Crossing | None = None  # the shard, last time it went from the host to the device
        self._take_values()

    @property
    def slices(self) -> list[tuple[int, int]]:
        """The rank slices that this rank's optimizer owns: its own, or all of them at stage 0.

        Stage 0 walks the very slices that the other stages own, so that all of them do the same arithmetic.
        """
        n = self.layout.slice_numel
        return [(lo, lo + n) for lo in range(self.owned[0], self.owned[1], n)]

    def _take_values(self) -> None:
        """Copy the parameters in, agree on rank 0's values, cut the master, point the parameters at ``whole``."""
        source_type = self.parameters[0].dtype
        for p in self.parameters:
            source_type = torch.promote_types(source_type, p.dtype) if p.dtype != source_type else source_type
        values = torch.zeros(self.layout.numel, dtype=source_type, device=self.mesh.device)
        with torch.no_grad():
            for p, span in zip(self.parameters, self.layout.spans, strict=True):
                values[span.offset : span.end].copy_(p.detach().reshape(-1))
        comm.broadcast_(self.mesh, values, 0, self.name)
        compute = self.types.compute
        self.whole = values if values.dtype == compute else values.to(compute)
        self.ledger.add("communication" if self.frees else "parameters", self._whole_bytes)
        if self.trainable:
            self._cut_master(values)
        if self.frees and (not self.trainable or not self.rounds_master):
            self._cut_shard()
        self._views = [self.whole[s.offset : s.end].view(s.shape) for s in self.layout.spans]
        self._show(self._views)
        # true shapes without memory: one NaN seen everywhere, so reading is loud and writing in place is an error
        nothing = float("nan") if compute.is_floating_point else 0
        self._blank = torch.full((), nothing, dtype=compute, device=self.mesh.device)
        self._blanks = [self._blank.expand(s.shape) for s in self.layout.spans] if self.frees else []

    @property
    def rounds_master(self) -> bool:
        """Whether the shard is the rounded master, made where it is needed: the master stands where modules compute."""
        return self.tier is not Tier.DISK and not self.is_apart

    def _cut_master(self, values: Tensor) -> None:
        """This rank's masters, in their tier.

        Args:
            values: (P,) of the whole bucket, in the dtype that the parameters had.
        """
        compute, master, (lo, hi) = self.types.compute, self.types.master, self.owned
        category = "parameters" if compute == master else "optimizer"
        if self.rounds_master and compute == master and not self.frees:
            self.master = self.whole[lo:hi]
        elif self.tier is Tier.DEVICE:
            self.master = values[lo:hi].to(master, copy=True)
            self.ledger.add(category, self.master.nbytes)
        elif self.tier is Tier.HOST:
            self.master = self.home.empty(hi - lo, master).copy_(values[lo:hi])
            self.ledger.host.add(category, self.master.nbytes)
        else:
            self.master_flat = self.home.on_disk(self.name, "master", master, self.layout, self.owned)
            self.master_flat.fill(values[lo:hi].to("cpu", master))

    def _cut_shard(self) -> None:
        """This rank's slice in the compute dtype, in its tier."""
        own = self.whole[slice(*self.own)]
        if self.shard_tier is Tier.DISK:
            self.shard_flat = self.home.on_disk(
                self.name, "parameters", self.types.compute, self.layout, self.own, slots=1
            )
            self.shard_flat.fill(own.to("cpu"))
        elif self.shard_tier is Tier.HOST:
            self.shard = self.home.empty(own.numel(), own.dtype, crosses=True).copy_(own)
            self.shard_crosses = not self.home.shares_memory
            self.ledger.host.add("parameters", self.shard.nbytes)
        else:
            self.shard = own.clone()
            self.ledger.add("parameters", self.shard.nbytes)

    @property
    def _whole_bytes(self) -> int:
        return self.layout.numel * self.types.compute.itemsize

    def _show(self, tensors: list[Tensor]) -> None:
        for p, tensor in zip(self.parameters, tensors, strict=True):
            p.data = tensor

    def view_again(self, index: int, take: bool) -> bool:
        """Where somebody gave a whole parameter other memory (``p.data = values``): make it a view of ``whole`` again.

        Args:
            index: which.
            take: copy the values that it was given into ``whole``; else they are dropped.

        Returns:
            Whether it had other memory.

        Raises:
            ValueError: values of another shape.
        """
        p, view = self.parameters[index], self._views[index]
        given = p.data
        if given.data_ptr() == view.data_ptr() and given.shape == view.shape:
            return False
        p.data = view
        if given.shape != view.shape:
            raise ValueError(
                f"a parameter of '{self.name}' has the shape {tuple(view.shape)} and was given data of shape"
                f" {tuple(given.shape)}: shapes are fixed once ZeRO manages a parameter, change them before"
            )
        if take:
            view.copy_(given)
        return True

    def unshard(self, ahead: bool = False) -> None:
        """Start gathering ``whole``; a no-op unless it is sharded. ``wait`` ends it.

        Args:
            ahead: it is not needed yet: what is on disk may be left there while reading ahead has no room.
        """
        if self.refuse is not None:
            self.refuse()
        if self.state is not ShardState.SHARDED:
            return
        if ahead and (self.is_updating or not self._has_room()):
            return
        with self.mesh.spans.span(GATHER_SEND, self.name, self._whole_bytes):
            self._start_gather()

    def _start_gather(self) -> None:
        self.settle()
        self._check_blank()
        self.whole.untyped_storage().resize_(self._whole_bytes)
        self.ledger.add("communication", self._whole_bytes)
        if self.shard_flat is not None:
            self._arriving = self._fetch_shard()  # a gather under way holds the ranks' order: it starts in ``wait``
        else:
            self._pending = self._gather()
        self.state = ShardState.GATHERING

    def _has_room(self) -> bool:
        if self.shard_flat is None:
            return True
        return self.home.may_stage(self.layout.slice_numel * self.types.compute.itemsize)

    def _fetch_shard(self) -> tuple[Handle, Tensor]:
        assert self.shard_flat is not None, "what is fetched is on disk"
        staging = self.home.stage(self.shard_flat.numel, self.shard_flat.dtype)
        self._fetching = self.mesh.spans.start(FETCH, self.name, staging.nbytes)
        return self.shard_flat.fetch(0, self.shard_flat.numel, staging), staging

    def settle(self, committed: bool = False) -> None:
        """Until the optimizer has updated this bucket, if it is about to.

        Args:
            committed: wait until what it has written to disk is the truth, which is when all buckets have been updated.
        """
        if self.refuse is not None:
            self.refuse()
        if committed and self.stepper is not None:
            self.stepper.late.finish()
        elif self.is_updating:
            with self.mesh.spans.span(UPDATE_WAIT, self.name, on_host=True):
                self.stepper.settle(self)

    def _check_blank(self) -> None:
        """``fill_`` and ``zero_`` are allowed to write the one element that a placeholder is. On a GPU, looking would
        wait for the device."""
        if self._blank.device.type != "cpu" or self.mesh.is_simulated or not self._blank.is_floating_point():
            return
        if not self._blank.isnan():
            self._blank.fill_(float("nan"))
            raise ValueError(
                f"a parameter of '{self.name}' was written to (zero_, fill_, nn.init.zeros_, ...) while it was sharded,"
                " and the value is lost: write inside `with ts.zero.GatheredParameters([parameter], modifier_rank=0):`"
            )

    def _gather(self) -> Pending:
        """Put this rank's slice into ``whole``, which has memory, and start gathering the others'."""
        crossing = self._fill_own()
        if crossing is None:
            return comm.all_gather_(self.mesh, self.whole, self.name)
        self._crossing = crossing
        with crossing.following():
            pending = comm.all_gather_(self.mesh, self.whole, self.name)
        return pending

    def _fill_own(self) -> Crossing | None:
        """Start putting this rank's slice into ``whole``; None where the current stream does it, as its next work."""
        place = self.whole[slice(*self.own)]
        homes = self.homes
        if self.shard_flat is not None:
            handle, staging = self._arriving or self._fetch_shard()
            self._arriving = None
            with self.mesh.spans.span(FETCH_WAIT, self.name, staging.nbytes, on_host=True):
                handle.wait()
            if self._fetching is not None:
                self._fetching.close()
            assert homes is not None, "another tier than the device has homes"
            crossing = None if homes.shares_memory else homes.crossings.up(staging, place)
            if crossing is None:
                place.copy_(staging)
            homes.unstage(staging, after=crossing)
            return crossing
        source = self.shard if self.shard is not None else self.master
        assert source is not None, "a bucket that frees its parameters has something to gather them from"
        if self.shard_crosses and homes is not None:
            return homes.crossings.up(source, place)
        place.copy_(source)
        return None

    def keep_rounded(self) -> None:
        """Hold the bf16 copy of the own slice, because it is not what rounding the master again would give.

        No other type is rounded at random: there is nothing to hold.
        """
        if self.frees and self.rounds_master and self.shard is None and self.types.compute == torch.bfloat16:
            assert self.master is not None, "only trainable buckets are stepped"
            self.shard = self.master.to(self.types.compute)
            self.ledger.add("parameters", self.shard.nbytes)

    def wait(self) -> None:
        """Until the gather has landed; then the parameters are views of ``whole``."""
        if self.state is ShardState.GATHERING:
            with self.mesh.spans.span(GATHER_WAIT, self.name, self._whole_bytes):
                self._end_gather()

    def _end_gather(self) -> None:
        if self._arriving is not None:
            self._pending = self._gather()
        assert self._pending is not None, "a gathering bucket has a gather under way"
        self._pending.wait()
        self._pending = None
        if self._crossing is not None:
            self._crossing.join()
        self._show(self._views)
        self.state = ShardState.WHOLE

    def reshard(self) -> None:
        """Free ``whole`` and put placeholders into the modules; a no-op where the stage keeps parameters."""
        if not self.frees or self.state is ShardState.SHARDED:
            return
        self.wait()
        self._show(self._blanks)
        self.whole.untyped_storage().resize_(0)
        self.ledger.add("communication", -self._whole_bytes)
        self.state = ShardState.SHARDED

    def renew(self) -> None:
        """After a step: if somebody holds ``whole`` although the stage frees it, gather the updated values again."""
        if self.trainable:
            self.regather()

    def regather(self) -> None:
        """The same after any change, of frozen parameters too."""
        if self.frees and self.state is not ShardState.SHARDED:
            self.wait()
            self._gather().wait()
            if self._crossing is not None:
                self._crossing.join()

    def take_back(self, indices: Sequence[int]) -> None:
        """Make parameters changed by hand in ``whole``, equal on every rank, the truth: cut masters and shards anew.

        Args:
            indices: which parameters; the masters of the others keep the bits that ``whole`` does not have.
        """
        for span in (self.layout.spans[i] for i in indices):
            for (lo, hi), write in ((self.owned, self.write_master), (self.own, self.write_shard)):
                start, end = max(lo, span.offset), min(hi, span.end)
                if start < end:
                    write(start, self.whole[start:end])

    def read_master(self, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the bucket as this rank has them best: master, else shard, else ``whole``.

        They are within ``owned`` where there are masters, else within ``own``. A view, unless they are on disk.
        """
        self.settle(committed=True)
        if self.trainable:
            flat, resident, first = self.master_flat, self.master, self.owned[0]
        else:
            flat, resident, first = self.shard_flat, self.shard, self.own[0]
        if flat is not None and lo < hi:
            return flat.read(lo - first, hi - first)
        if flat is not None:
            return torch.empty(0, dtype=flat.dtype)  # this rank has none of it
        return self.whole[lo:hi] if resident is None else resident[lo - first : hi - first]

    def write_master(self, lo: int, values: Tensor) -> None:
        """Set the masters from the bucket's element ``lo`` on, within ``owned``; nothing where there are none."""
        self.settle(committed=True)
        at = lo - self.owned[0]
        if self.master_flat is not None:
            self.master_flat.edit(at, values.to("cpu", self.types.master))
        elif self.master is not None and values.data_ptr() != self.master[at:].data_ptr():
            self.master[at : at + values.numel()].copy_(values)

    def write_shard(self, lo: int, values: Tensor) -> None:
        """Set the shard from the bucket's element ``lo`` on, within ``own``; nothing where there is none."""
        self.settle()
        at = lo - self.own[0]
        if self.shard_flat is not None:
            self.shard_flat.edit(at, values.to("cpu", self.types.compute))
        elif self.shard is not None:
            if self._crossing is not None:
                self._crossing.wait()  # a GPU may be reading it still
            self.shard[at : at + values.numel()].copy_(values)

    def disown(self, parameters: Iterable[Parameter]) -> None:
        """Others manage these parameters from now on; when none is left, the memory goes."""
        gone = {id(p) for p in parameters}
        kept = [i for i, p in enumerate(self.parameters) if id(p) not in gone]
        self.parameters = [self.parameters[i] for i in kept]
        self._views = [self._views[i] for i in kept]
        self._blanks = [self._blanks[i] for i in kept] if self._blanks else []
        if not kept:
            self.master = self.shard = None
            for flat in (self.master_flat, self.shard_flat):
                if flat is not None:
                    flat.remove()
            self.master_flat = self.shard_flat = None
            self.whole.untyped_storage().resize_(0)

    def publish(self) -> Pending:
        """After the optimizer wrote this rank's slice of ``whole``: send it to the others (stages 1, 2)."""
        if self.frees or self.owned == (0, self.layout.numel):
            return Pending(self.mesh, [])
        return comm.all_gather_(self.mesh, self.whole, self.name)
