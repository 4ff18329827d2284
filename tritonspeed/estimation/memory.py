"""Bytes per rank before anything runs, from shapes and a config; no GPU, no process group, no memory for the model.

Between two steps, for P elements of a bucket (padding included), N ranks, c = bytes of the compute dtype, 4 for fp32:

    parameters   c·P             stages 0-2; at stage 3 only what is frozen, c·P/N, and what persists, c·P
    optimizer    4·P/N + 8·P/N   stage 0: 12·P; the master, unless the compute dtype is the master's; AdamW's moments
                                    (`state`: bf16 4·P/N, 8bit 2·P/N and 4 bytes for each 256)
                                 (Muon: 4 where a matrix is, so ranks differ: the one with most is told of)

From backward to the step it adds the gradients, 4·P/N (stage 0: 4·P; in the accumulate dtype). The peak adds what is on
its way: at stage 3 the units that are whole, and at every stage one gradient that fills (c·P), one that travels, and
what the peers send of it (c·P·(N-1)/N). It is found by walking one training iteration with the very order and limits
that the run uses, on integers.

    estimate(model, "ds_config.json", world_size=8).total_peak_bytes

Activations are not in it, nor the framework's own memory, nor (on CPU ranks of one host) the 16 MiB window of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritonspeed.config import Config, ModelFacts, load
from tritonspeed.kernels.dynamic_code import MIN_ELEMS, num_blocks
from tritonspeed.optim.muon import NS_DTYPES, hidden_matrices
from tritonspeed.precision import Policy
from tritonspeed.zero.bucket import Ledger
from tritonspeed.zero.layout import runs
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.order import Order
from tritonspeed.zero.plan import BucketPlan, UnitPlan, plan_buckets, plan_units
from tritonspeed.zero.reduce import Reducer, departure_order
from tritonspeed.zero.stages import Stage, stage_of
from tritonspeed.zero.whole import plan_rounds

_MOMENTS = {"sgd": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "adadelta": 2, "asgd": 2, "rprop": 2}
# state tensors per element; those not named have Adam's two


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank by category: parameters, gradients, optimizer, communication.

    Attributes:
        stage, world_size: what it is for.
        num_parameters: elements of the model, without padding.
        rest_bytes: between two steps.
        peak_bytes: by category, at the moment in a step when their sum is highest.
    """

    stage: int
    world_size: int
    num_parameters: int
    rest_bytes: dict[str, int]
    peak_bytes: dict[str, int]

    @property
    def total_rest_bytes(self) -> int:
        return sum(self.rest_bytes.values())

    @property
    def total_peak_bytes(self) -> int:
        return sum(self.peak_bytes.values())

    def __str__(self) -> str:
        mib = {name: f"{n / 2**20:,.1f} MiB" for name, n in self.peak_bytes.items()}
        parts = ", ".join(f"{name} {size}" for name, size in mib.items())
        return (
            f"{self.num_parameters:,} parameters, ZeRO stage {self.stage}, {self.world_size} rank(s): at rest"
            f" {self.total_rest_bytes / 2**20:,.1f} MiB, at its peak {self.total_peak_bytes / 2**20:,.1f} MiB ({parts})"
        )


@dataclass(frozen=True)
class _States:
    """The optimizer's tensors: how many per element, and in which type."""

    num_moments: int
    kind: str

    def slice_bytes(self, num_elems: int) -> int:
        """Of one rank's slice of a bucket, whose parameters are taken to be one optimizer group."""
        if self.kind != "8bit":
            return self.num_moments * num_elems * (2 if self.kind == "bf16" else 4)
        is_small = num_elems < MIN_ELEMS
        return self.num_moments * (4 * num_elems if is_small else num_elems + 4 * num_blocks(0, num_elems))


@dataclass
class _PaperBucket:
    """A bucket whose memory is only counted: what ``Reducer`` needs of one."""

    plan: BucketPlan
    stage: Stage
    ledger: Ledger
    outbox: object | None = None

    def __post_init__(self) -> None:
        self.layout, self.parameters, self.types = self.plan.layout, self.plan.parameters, self.plan.types
        self.trainable = self.plan.trainable
        self.frees = self.stage.shards_parameters and not self.plan.persistent
        self.whole_bytes = self.layout.numel * self.types.compute.itemsize
        self.owned = self.layout.slice_numel if self.stage.shards_optimizer else self.layout.numel
        self._kind, self._outbox_bytes, self._grad_bytes = "communication", 0, 0

    def rest(self, state_bytes: int) -> None:
        """Enter what it holds between two steps; ``state_bytes`` of it are the optimizer's, besides the master."""
        types, aliased = self.types, self.types.compute == self.types.master
        if not self.frees:
            self.ledger.add("parameters", self.whole_bytes)
        elif not self.trainable:
            self.ledger.add("parameters", self.layout.slice_numel * types.compute.itemsize)
        if self.trainable:
            if self.frees or not aliased:
                self.ledger.add("parameters" if aliased else "optimizer", self.owned * types.master.itemsize)
            self.ledger.add("optimizer", state_bytes)

    def receive(self, index: int, gradient: object, accumulating: bool) -> None:
        if self.outbox is None:
            self.outbox = True
            self._kind = "gradients" if accumulating else "communication"
            itemsize = self.types.accumulate.itemsize if accumulating else self.types.compute.itemsize
            self._outbox_bytes = self.layout.numel * itemsize
            self.ledger.add(self._kind, self._outbox_bytes)

    def send(self, accumulating: bool) -> Callable[[], None]:
        self.receive(0, None, accumulating)
        stands_in = self.types.accumulate if accumulating else self.types.compute
        wire = self.types.reduce or stands_in
        extra = self.layout.numel * wire.itemsize if wire != stands_in else 0
        world = self.layout.world
        received = (world - 1) * self.layout.slice_numel * wire.itemsize if world > 1 else 0
        held = [(self._kind, self._outbox_bytes), ("communication", extra + received)]
        self.ledger.add("communication", held[1][1])
        self.outbox = None
        if not self._grad_bytes:
            self._grad_bytes = self.owned * self.types.accumulate.itemsize
            self.ledger.add("gradients", self._grad_bytes)

        def finish() -> None:
            for kind, num_bytes in held:
                self.ledger.add(kind, -num_bytes)

        return finish

    def drop_grad(self) -> None:
        self.ledger.add("gradients", -self._grad_bytes)
        self.outbox, self._grad_bytes = None, 0


class _PaperGroup:
    """One unit: its buckets on paper, and whether they are whole."""

    def __init__(self, index: int, unit: UnitPlan, buckets: list[_PaperBucket], ledger: Ledger) -> None:
        self.index, self.name, self.modules = index, unit.name, unit.modules
        self.buckets, self.ledger = buckets, ledger
        self.num_elems = sum(b.layout.numel for b in buckets if b.frees)
        self.frees = any(b.frees for b in buckets)
        self.whole = False

    def unshard(self) -> None:
        self._set(True)

    def reshard(self) -> None:
        self._set(False)

    def _set(self, whole: bool) -> None:
        if self.frees and whole is not self.whole:
            sign = 1 if whole else -1
            self.ledger.add("communication", sign * sum(b.whole_bytes for b in self.buckets if b.frees))
            self.whole = whole


def estimate(model: nn.Module, config: Any, world_size: int) -> Estimate:
    """What one rank of ``world_size`` will hold when ``model`` is trained under ``config``.

    Args:
        model: shapes are enough: it may stand on the meta device. Its blocks are taken to run in registration order.
        config: as for ``initialize``.
        world_size: ranks.
    """
    resolved = _resolve(model, config, world_size)
    policy = Policy.from_config(resolved)
    options = ShardOptions.from_config(resolved, policy)
    stage, ledger = stage_of(int(resolved.zero_optimization.stage)), Ledger()
    units = plan_units(model, options.leaves, options.param_persistence_threshold, options.model_persistence_threshold)
    groups = []
    for index, unit in enumerate(units):
        plans = plan_buckets(unit, world_size, policy, options.wire)
        groups.append(_PaperGroup(index, unit, [_PaperBucket(p, stage, ledger) for p in plans], ledger))
    if resolved.optimizer is not None and (resolved.optimizer.type or "").lower() == "muon":
        rounds = _enter_muon(model, groups, world_size, (resolved.optimizer.params or {}).get("ns_dtype", "bf16"))
    else:
        rounds, states = [], _States(_num_moments(resolved), _state_kind(resolved))
        for bucket in (bucket for group in groups for bucket in group.buckets):
            num_slices, slice_numel = bucket.owned // bucket.layout.slice_numel, bucket.layout.slice_numel
            bucket.rest(num_slices * states.slice_bytes(slice_numel))
    rest = dict(ledger.bytes_of)
    _walk(groups, stage, options, int(resolved.gradient_accumulation_steps or 1), rounds)
    return Estimate(stage.number, world_size, sum(p.numel() for p in model.parameters()), rest, ledger.peak_of)


def _resolve(model: nn.Module, config: Any, world_size: int) -> Config:
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return load(config).resolve(world_size, ModelFacts(hidden_size=hidden))


def _num_moments(config: Config) -> int:
    if config.optimizer is None or config.optimizer.type is None:
        return 2
    name = config.optimizer.type.lower()
    if name == "sgd" and (config.optimizer.params or {}).get("momentum"):
        return 1
    return _MOMENTS.get(name, 2)


def _enter_muon(model: nn.Module, groups: list[_PaperGroup], world: int, ns_dtype: str) -> list[int]:
    """Enter what the buckets hold between two steps, on the rank with most state; the most that each round holds."""
    hidden, buckets = hidden_matrices(model), departure_order(groups)
    shards = any(bucket.owned != bucket.layout.numel for bucket in buckets)

    def moments(bucket: _PaperBucket, rank: int) -> int:
        lo, hi = bucket.layout.interval(rank) if shards else (0, bucket.layout.numel)
        number = {s.name: 2 - hidden[id(p)] for s, p in zip(bucket.layout.spans, bucket.parameters, strict=True)}
        return sum(num * (end - start) for num, start, end in runs(bucket.layout.spans, number, lo, hi))

    fullest = max(range(world if shards else 1), key=lambda rank: sum(moments(bucket, rank) for bucket in buckets))
    for bucket in (bucket for group in groups for bucket in group.buckets):
        bucket.rest(moments(bucket, fullest) * bucket.types.master.itemsize if bucket.trainable else 0)
    spans = [
        [(s, 0) for s, p in zip(b.layout.spans, b.parameters, strict=True) if s.numel and hidden[id(p)]]
        for b in buckets
    ]
    rounds = plan_rounds(spans, [bucket.layout for bucket in buckets], world)
    itemsize = NS_DTYPES[ns_dtype].itemsize
    return [max(each.held_elems(rank, shards) for rank in range(world)) * itemsize for each in rounds]


def _state_kind(config: Config) -> str:
    params = None if config.optimizer is None else config.optimizer.params
    return (params or {}).get("state") or "fp32"


def _walk(
    groups: list[_PaperGroup], stage: Stage, options: ShardOptions, num_accumulated: int, rounds: list[int]
) -> None:
    """Two iterations over the units, the first to learn their order; enters the peak.

    Args:
        rounds: bytes that each round of the optimizer's step holds, where it needs whole matrices.
    """
    reducer = Reducer(departure_order(groups), options.overlap, options.reduce_bucket_size, stage.shards_gradients)
    reducer.num_accumulated = num_accumulated
    order = Order([g.num_elems for g in groups], options.limits)

    def live() -> int:
        return sum(g.num_elems for g in groups if g.whole)

    def need(group: _PaperGroup) -> None:
        order.need(group.index)
        group.unshard()
        for index in order.ahead(live()):
            groups[index].unshard()

    def leave_forward(group: _PaperGroup) -> None:
        if group.frees and not order.keep(group.index, live()):
            group.reshard()

    def gradients(group: _PaperGroup, some: slice = slice(None)) -> None:
        for bucket in group.buckets:
            for i in range(len(bucket.parameters))[some] if bucket.trainable else ():
                reducer.receive(bucket, i, None)

    root, units = groups[0], [g for g in groups[1:] if g.frees or any(b.trainable for b in g.buckets)]
    for micro_step in range(1, 2 * num_accumulated + 1):
        reducer.sending = stage.shards_gradients or micro_step % num_accumulated == 0
        order.begin("train")
        for group in [root, *units]:
            if group.frees:
                need(group)
                if group is not root:
                    leave_forward(group)
        leave_forward(root)
        if root.frees:
            need(root)
        gradients(root, slice(1))  # a final norm or a head comes first, the embedding last: open all the time
        for group in reversed(units):
            if group.frees:
                need(group)
            gradients(group)
            group.reshard()
            if not all(isinstance(module, nn.Embedding) for module in group.modules):
                reducer.leave(group.buckets)  # tokens have no gradient, so nothing tells that backward left them
        gradients(root, slice(1, None))
        reducer.finish_backward()
        for group in groups:
            group.reshard()
        if micro_step % num_accumulated == 0:
            _step(groups, rounds)


def _step(groups: list[_PaperGroup], rounds: list[int]) -> None:
    for num_bytes in rounds:
        groups[0].ledger.add("communication", num_bytes)
        groups[0].ledger.add("communication", -num_bytes)
    for bucket in (bucket for group in groups for bucket in group.buckets):
        bucket.drop_grad()
