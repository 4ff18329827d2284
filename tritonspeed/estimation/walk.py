"""One rank's way through building a model and training it, on integers: every allocation enters the ledger.

The order of units, the order in which gradients leave, and the buffers of the step are the run's own objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tritonspeed.estimation.paper import PaperBucket, PaperGroup, paper_ring
from tritonspeed.estimation.paper_ledger import PaperLedger
from tritonspeed.estimation.paper_tiers import PaperHomes
from tritonspeed.offload.disk_flat import TILE_BYTES
from tritonspeed.zero.group import group_of
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.order import Order
from tritonspeed.zero.reduce import Reducer, departure_order
from tritonspeed.zero.stages import Stage


def build(groups: Sequence[PaperGroup], ledger: PaperLedger) -> int:
    """Make every bucket, as ``ShardedModel`` does; the most bytes of device and host together on the way.

    Parameters that have memory keep it until their bucket has taken the values over; those on the meta device get
    theirs when their unit's turn comes.
    """
    held = sum(_own_bytes(p) for p in _parameters(groups) if p.device.type != "meta")
    peak_bytes = held
    for group in groups:
        made = sum(_own_bytes(p) for p in _parameters([group]) if p.device.type == "meta")
        made += sum(p.nbytes for p in _parameters([group]) if group_of(p) is not None)  # gathered from zero.Init's
        wholes = 0
        for bucket in group.buckets:
            source = _source_type(bucket)
            values = bucket.layout.numel * source.itemsize
            whole = 0 if source == bucket.types.compute else bucket.whole_bytes
            bucket.build()
            both = ledger.total_bytes + ledger.host.total_bytes
            peak_bytes = max(peak_bytes, held + made + wholes + values + whole + both + TILE_BYTES)
            wholes += bucket.whole_bytes if bucket.frees else 0
            for p in bucket.parameters:
                if p.device.type == "meta":
                    made -= _own_bytes(p)
                else:
                    held -= _own_bytes(p)
    return peak_bytes


def _parameters(groups: Sequence[PaperGroup]) -> list[nn.Parameter]:
    return [p for group in groups for bucket in group.buckets for p in bucket.parameters]


def _own_bytes(p: nn.Parameter) -> int:
    """Of a parameter where it stands now; where zero.Init has cut it, of this rank's part."""
    group = group_of(p)
    return p.nbytes if group is None else p.nbytes // group.buckets[0].mesh.world


def _source_type(bucket: PaperBucket) -> torch.dtype:
    source = bucket.parameters[0].dtype
    for p in bucket.parameters:
        source = torch.promote_types(source, p.dtype) if p.dtype != source else source
    return source


class Walk:
    """Training iterations over the units: two, the first to learn their order.

    Args:
        groups: units, in their fixed order.
        homes: the tiers.
        ledger: where everything is entered.
        stage, options: as of the run.
        num_accumulated: micro-steps per step.
        rounds: bytes that each round of the optimizer's step holds, where it needs whole matrices.
        steps_flat: the optimizer takes tiles one by one, so that it can do so under the next forward.
    """

    def __init__(
        self,
        groups: list[PaperGroup],
        homes: PaperHomes,
        ledger: PaperLedger,
        stage: Stage,
        options: ShardOptions,
        num_accumulated: int = 1,
        rounds: Sequence[int] = (),
        steps_flat: bool = True,
    ) -> None:
        self.groups, self.homes, self.ledger, self.stage = groups, homes, ledger, stage
        self.num_accumulated, self.rounds, self.steps_flat = num_accumulated, rounds, steps_flat
        self.buckets = departure_order(groups)
        self.reducer = Reducer(self.buckets, options.overlap, options.reduce_bucket_size, stage.shards_gradients)
        self.reducer.num_accumulated = num_accumulated
        self.order = Order([g.num_elems for g in groups], options.limits)
        self.ring = paper_ring(self.buckets, homes)

    def run(self) -> None:
        """Both iterations, and the rest after them."""
        for micro_step in range(1, 2 * self.num_accumulated + 1):
            is_boundary = micro_step % self.num_accumulated == 0
            self.reducer.sending = self.stage.shards_gradients or is_boundary
            self._forward()
            self._backward()
            if is_boundary:
                self._step()
        self.ledger.begin("rest")
        for bucket in self.buckets:
            bucket.settle()

    def _forward(self) -> None:
        self.ledger.begin("forward")
        self.order.begin("train")
        root = self.groups[0]
        for group in [root, *self._units()]:
            if group.frees:
                self._need(group)
                if group is not root:
                    self._leave_forward(group)
        self._leave_forward(root)

    def _backward(self) -> None:
        self.ledger.begin("backward")
        root = self.groups[0]
        if root.frees:
            self._need(root)
        self._gradients(root, slice(1))  # a final norm or a head comes first, the embedding last: open all the time
        for group in reversed(self._units()):
            if group.frees:
                self._need(group)
            self._gradients(group)
            group.reshard()
            if not all(isinstance(module, nn.Embedding) for module in group.modules):
                self.reducer.leave(group.buckets)  # tokens have no gradient, so nothing tells that backward left them
        self._gradients(root, slice(1, None))
        self.reducer.finish_backward()
        for group in self.groups:
            group.reshard()

    def _step(self) -> None:
        self.ledger.begin("step")
        self.homes.let_go()
        for bucket in self.buckets:
            bucket.land()
        for num_bytes in self.rounds:
            self.ledger.add("communication", num_bytes)
            self.ledger.add("communication", -num_bytes)
        late = [bucket for bucket in reversed(self.buckets) if self._may_be_late(bucket)]
        taken = {id(bucket) for bucket in late}
        now = [bucket for bucket in self.buckets if id(bucket) not in taken]
        for buckets in (now, late):
            for _ in self.ring.stream(tile for bucket in buckets for tile in bucket.tiles):
                pass
        for bucket in late:
            bucket.is_updating = True
        for bucket in now:
            bucket.drop_grad()

    def _may_be_late(self, bucket: PaperBucket) -> bool:
        return self.homes.updates_late and self.steps_flat and bucket.frees and bucket.is_staged

    def _units(self) -> list[PaperGroup]:
        return [g for g in self.groups[1:] if g.frees or any(b.trainable for b in g.buckets)]

    def _live_elems(self) -> int:
        return sum(g.num_elems for g in self.groups if g.whole)

    def _need(self, group: PaperGroup) -> None:
        self.order.need(group.index)
        group.unshard()
        for index in self.order.ahead(self._live_elems()):
            self.groups[index].unshard(ahead=True)
        group.wait()

    def _leave_forward(self, group: PaperGroup) -> None:
        if group.frees and not self.order.keep(group.index, self._live_elems()):
            group.reshard()

    def _gradients(self, group: PaperGroup, some: slice = slice(None)) -> None:
        for bucket in group.buckets:
            for i in range(len(bucket.parameters))[some] if bucket.trainable else ():
                self.reducer.receive(bucket, i, None)
