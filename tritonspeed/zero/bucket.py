"""One flat buffer of parameters over the ranks: its storage, its gradient, and who holds which bytes when.

The parameters of a bucket are views of ``whole``, so an all-gather lands in place with no copy out, and the gradient
of a bucket leaves in one piece. Sizes in elements, N ranks, P = layout.numel:

    whole     W[P]     compute dtype     what the modules compute with; at stage 3 only while in use
    master    M[P/N]   fp32              what the optimizer updates (stage 0: M[P]); trainable buckets only
    shard     S[P/N]   compute dtype     stage 3, frozen buckets and stochastic rounding: ``whole`` is gathered from it
    grad      G[P/N]   accumulate dtype  the sum over the ranks (stage 0: G[P]), from its first reduction to the step
    outbox    g[P]     compute dtype     this rank's gradient, from its first element to its departure

Where the compute dtype is the master's, ``master`` is the own slice of ``whole`` itself (stages 0-2), not a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.comm import Mesh, Pending
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


@dataclass
class Ledger:
    """Bytes this rank holds, by category, and the highest total since ``reset_peak``.

    Every allocation of a bucket passes here, so that the memory equation can be held to what was really allocated.
    """

    bytes_of: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("parameters", "gradients", "optimizer", "communication"), 0)
    )
    peak_bytes: int = 0
    peak_of: dict[str, int] = field(default_factory=dict)

    def add(self, category: str, num_bytes: int) -> None:
        """Enter ``num_bytes`` more (or, negative, fewer) bytes of ``category``."""
        self.bytes_of[category] += num_bytes
        total = self.total_bytes
        if total > self.peak_bytes:
            self.peak_bytes, self.peak_of = total, dict(self.bytes_of)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of.values())

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        self.peak_bytes, self.peak_of = self.total_bytes, dict(self.bytes_of)


class Bucket:
    """See the module's docstring. Made whole; ``reshard`` frees it where the stage shards parameters.

    Args:
        plan: names, places and dtypes; the parameters' present values become the bucket's (rank 0's, on every rank).
        mesh: the ranks that share it.
        stage: what is sharded; a persistent bucket keeps its parameters at stage 3 too.
        ledger: where its bytes are entered.
        trains: False where no optimizer will come: then there are neither masters nor gradients.
    """

    def __init__(self, plan: BucketPlan, mesh: Mesh, stage: Stage, ledger: Ledger, trains: bool = True) -> None:
        self.name, self.layout, self.types = plan.name, plan.layout, plan.types
        self.parameters = list(plan.parameters)
        self.mesh, self.ledger = mesh, ledger
        self.trainable = plan.trainable and trains
        self.frees = stage.shards_parameters and not plan.persistent
        self.own = self.layout.interval(mesh.rank)
        self.owned = self.own if stage.shards_optimizer else (0, self.layout.numel)
        self.state = ShardState.WHOLE
        self.master: Tensor | None = None
        self.shard: Tensor | None = None
        self.grad: Tensor | None = None
        self.has_grad = False
        self.outbox: Tensor | None = None
        self.filled: set[int] = set()  # parameters whose gradient stands in the outbox
        self._outbox_kind = "communication"
        self.stepper: Any = None  # the ZeroOptimizer that updates it
        self._pending: Pending | None = None
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
        compute, master = self.types.compute, self.types.master
        self.whole = values if source_type == compute else values.to(compute)
        self.ledger.add("communication" if self.frees else "parameters", self._whole_bytes)
        lo, hi = self.owned
        if self.trainable:
            if compute == master and not self.frees:
                self.master = self.whole[lo:hi]
            else:
                self.master = values[lo:hi].to(master, copy=True)
                self.ledger.add("parameters" if compute == master else "optimizer", self.master.nbytes)
        elif self.frees:
            self.shard = self.whole[slice(*self.own)].clone()
            self.ledger.add("parameters", self.shard.nbytes)
        self._views = [self.whole[s.offset : s.end].view(s.shape) for s in self.layout.spans]
        self._show(self._views)
        # true shapes without memory: one NaN seen everywhere, so reading is loud and writing in place is an error
        nothing = float("nan") if compute.is_floating_point else 0
        self._blank = torch.full((), nothing, dtype=compute, device=self.mesh.device)
        self._blanks = [self._blank.expand(s.shape) for s in self.layout.spans] if self.frees else []

    @property
    def _whole_bytes(self) -> int:
        return self.layout.numel * self.types.compute.itemsize

    def _show(self, tensors: list[Tensor]) -> None:
        for p, tensor in zip(self.parameters, tensors, strict=True):
            p.data = tensor

    # parameters: unshard / reshard

    def unshard(self) -> None:
        """Start gathering ``whole``; a no-op unless it is sharded. ``wait`` ends it."""
        if self.state is not ShardState.SHARDED:
            return
        self._check_blank()
        self.whole.untyped_storage().resize_(self._whole_bytes)
        self.ledger.add("communication", self._whole_bytes)
        self._fill_own()
        self._pending = comm.all_gather_(self.mesh, self.whole, self.name)
        self.state = ShardState.GATHERING

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

    def _fill_own(self) -> None:
        source = self.shard if self.shard is not None else self.master
        assert source is not None, "a bucket that frees its parameters has something to gather them from"
        self.whole[slice(*self.own)].copy_(source)

    def keep_rounded(self) -> None:
        """Hold the bf16 copy of the own slice, because it is not what rounding the master again would give.

        No other type is rounded at random: there is nothing to hold.
        """
        if self.frees and self.shard is None and self.master is not None and self.types.compute == torch.bfloat16:
            self.shard = self.master.to(self.types.compute)
            self.ledger.add("parameters", self.shard.nbytes)

    def wait(self) -> None:
        """Until the gather has landed; then the parameters are views of ``whole``."""
        if self.state is ShardState.GATHERING:
            assert self._pending is not None, "a gathering bucket has a gather under way"
            self._pending.wait()
            self._pending = None
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
        if self.frees and self.state is not ShardState.SHARDED and self.master is not None:
            self.wait()
            self._fill_own()
            comm.all_gather_(self.mesh, self.whole, self.name).wait()

    def take_back(self, indices: Sequence[int]) -> None:
        """Make parameters changed by hand in ``whole``, equal on every rank, the truth: cut masters and shards anew.

        Args:
            indices: which parameters; the masters of the others keep the bits that ``whole`` does not have.
        """
        truths = [(self.master, self.owned), (self.shard, self.own)]
        for truth, (lo, hi) in truths:
            if truth is None or truth.data_ptr() == self.whole[lo:hi].data_ptr():
                continue
            for span in (self.layout.spans[i] for i in indices):
                start, end = max(lo, span.offset), min(hi, span.end)
                if start < end:
                    truth[start - lo : end - lo].copy_(self.whole[start:end])

    def disown(self, parameters: Iterable[Parameter]) -> None:
        """Others manage these parameters from now on; when none is left, the memory goes."""
        gone = {id(p) for p in parameters}
        kept = [i for i, p in enumerate(self.parameters) if id(p) not in gone]
        self.parameters = [self.parameters[i] for i in kept]
        self._views = [self._views[i] for i in kept]
        self._blanks = [self._blanks[i] for i in kept] if self._blanks else []
        if not kept:
            self.master = self.shard = None
            self.whole.untyped_storage().resize_(0)

    def publish(self) -> Pending:
        """After the optimizer wrote this rank's slice of ``whole``: send it to the others (stages 1, 2)."""
        if self.frees or self.owned == (0, self.layout.numel):
            return Pending(self.mesh, [])
        return comm.all_gather_(self.mesh, self.whole, self.name)

    # gradients: receive / send

    def receive(self, index: int, gradient: Tensor, accumulating: bool) -> None:
        """Take parameter ``index``'s gradient of this backward into the outbox.

        Args:
            accumulating: more is to be added before it leaves, so it stands in the accumulate dtype.
        """
        self._open_outbox(accumulating)
        assert self.outbox is not None, "an open outbox exists"
        span = self.layout.spans[index]
        place = self.outbox[span.offset : span.end].view(span.shape)
        if index in self.filled:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self.filled.add(index)

    def _open_outbox(self, accumulating: bool) -> None:
        if self.outbox is None:
            dtype = self.types.accumulate if accumulating else self.types.compute
            self.outbox = torch.empty(self.layout.numel, dtype=dtype, device=self.mesh.device)
            self._outbox_kind = "gradients" if accumulating else "communication"
            self.ledger.add(self._outbox_kind, self.outbox.nbytes)

    def send(self, accumulating: bool) -> Callable[[], None]:
        """Start the reduction of the outbox into ``grad``; returns what ends it (wait, sum, free).

        Parameters without a gradient, and the padding, leave as zeros.
        """
        self._open_outbox(accumulating)
        assert self.outbox is not None, "an open outbox exists"
        self._zero_gaps(self.outbox)
        outbox, category, self.outbox, self.filled = self.outbox, self._outbox_kind, None, set()
        wire_type = self.types.reduce or outbox.dtype
        wire = outbox if wire_type == outbox.dtype else outbox.to(wire_type)
        held = [(category, outbox.nbytes)] + ([("communication", wire.nbytes)] if wire is not outbox else [])
        if self.mesh.world > 1:
            received_bytes = (self.mesh.world - 1) * self.layout.slice_numel * wire_type.itemsize
            held.append(("communication", received_bytes))
            self.ledger.add("communication", received_bytes + (wire.nbytes if wire is not outbox else 0))
        if self.grad is None:
            self.grad = torch.empty(self.owned[1] - self.owned[0], dtype=self.types.accumulate, device=self.mesh.device)
            self.ledger.add("gradients", self.grad.nbytes)
        target = self.grad if self.owned == self.own else self.grad[slice(*self.own)]
        pending = comm.reduce_scatter(self.mesh, wire, target, self.has_grad, self.name)
        self.has_grad = True

        def finish() -> None:
            pending.wait()
            for kind, num_bytes in held:
                self.ledger.add(kind, -num_bytes)

        return finish

    def complete_grad(self) -> Pending:
        """Stage 0: every rank wants every slice's sum, so the sums are gathered; elsewhere nothing is left to do."""
        if self.grad is None or self.owned == self.own:
            return Pending(self.mesh, [])
        return comm.all_gather_(self.mesh, self.grad, f"{self.name}.grad")

    def _zero_gaps(self, flat: Tensor) -> None:
        """Zero everything in ``flat`` that no gradient of this backward was written to."""
        end = 0
        for i, span in enumerate(self.layout.spans):
            if i in self.filled:
                if span.offset > end:
                    flat[end : span.offset].zero_()
                end = span.end
        if end < flat.numel():
            flat[end:].zero_()

    def own_grad(self) -> Tensor | None:
        """This rank's slice of the summed gradient, (P/N,), or None where there is none yet."""
        if self.grad is None or not self.has_grad:
            return None
        return self.grad if self.owned == self.own else self.grad[slice(*self.own)]

    def drop_grad(self) -> None:
        """Forget what was accumulated, and free it: forward needs the room for activations."""
        if self.grad is not None:
            self.ledger.add("gradients", -self.grad.nbytes)
        self.grad, self.has_grad = None, False
        self.filled.clear()
        if self.outbox is not None:
            self.ledger.add(self._outbox_kind, -self.outbox.nbytes)
            self.outbox = None
