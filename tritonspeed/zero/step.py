"""The optimizer step over shards: one exchange of facts, then chunk after chunk.

    facts     Σg² of every bucket's own slice (fp64), gathered from all ranks with the hash of what they have issued
    decide    a gradient that is not finite skips the step on every rank; the norm gives the clipping coefficient
    update    per chunk, unscale × clip in one number: master, moments and the low-precision copy in one pass
    publish   stages 1, 2: the updated slices are gathered into place, bucket by bucket under the next bucket's update

A chunk is a contiguous run of one rank slice whose parameters share an optimizer group. Stage 0 walks the slices of all
ranks, so it does the same arithmetic as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.kernels import sum_of_squares
from tritonspeed.optim import check_elementwise
from tritonspeed.precision import LossScaler, ScaleEvent
from tritonspeed.zero.bucket import Bucket, Ledger
from tritonspeed.zero.group import place_of
from tritonspeed.zero.layout import runs
from tritonspeed.zero.reduce import Reducer

_UNCHECKED = "gradient not finite, first in {!r}: applied all the same, as bf16.check_grad_overflow is false"
PUBLISHED_AT_ONCE = 2  # gathers of updated parameters under way, under the update of the next bucket
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed: keeps a zero norm from dividing


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, end) of a bucket, updated as one flat fp32 parameter of the optimizer."""

    bucket: Bucket
    start: int
    end: int
    master: Parameter

    def gradient(self) -> Tensor:
        """The summed gradient of these elements, not yet unscaled."""
        grad = self.bucket.grad
        assert grad is not None, "a step follows a reduction"
        return grad[self.start - self.bucket.owned[0] : self.end - self.bucket.owned[0]]

    def low_precision(self) -> Tensor | None:
        """Where the compute-dtype copy is written; None where the master is the parameter, or stage 3 casts later."""
        bucket = self.bucket
        if bucket.frees and bucket.shard is not None:
            return bucket.shard[self.start - bucket.own[0] : self.end - bucket.own[0]]
        if bucket.frees or bucket.types.compute == bucket.types.master:
            return None
        return bucket.whole[self.start : self.end]


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one call of ``ZeroOptimizer.step`` did.

    Attributes:
        grad_norm: global norm of the averaged, unscaled gradient before clipping; not finite on an overflow.
        skipped: nothing was updated.
        reason: why, in words, with the first parameter whose gradient is not finite; there too when the step was
            applied all the same, because nobody checks.
        scale: what the loss scaler made of it.
    """

    grad_norm: float
    skipped: bool
    reason: str | None
    scale: ScaleEvent


def cut_chunks(bucket: Bucket, group_of_name: dict[str, int], max_elems: int) -> list[tuple[int, Chunk]]:
    """The optimizer's chunks of one bucket, each with the index of its optimizer group (-1: in none, left out).

    Args:
        max_elems: longest chunk (``sub_group_size``); 0 is no bound.
    """
    assert bucket.master is not None, "only trainable buckets are cut into chunks"
    found = []
    for lo, hi in bucket.slices:
        for group, start, end in runs(bucket.layout.spans, group_of_name, lo, hi):
            step = max_elems or (end - start)
            for at in range(start, end, step) if group >= 0 else ():
                to = min(at + step, end)
                view = bucket.master[at - bucket.owned[0] : to - bucket.owned[0]]
                found.append((group, Chunk(bucket, at, to, Parameter(view))))
    return found


class ZeroOptimizer(torch.optim.Optimizer):
    """Any elementwise torch optimizer, stepped on shards. Its ``param_groups`` and ``state`` are the inner one's own.

    Args:
        inner: the optimizer; the model parameters in its groups are replaced by flat fp32 chunks.
        buckets: the trainable buckets, in departure order.
        mesh: the ranks.
        reducer: where gradients wait.
        scaler: loss scale; a fixed 1 for bf16 and fp32.
        gradient_clipping: bound on the global norm; 0 is off.
        average: divide the sum over ranks by their number.
        sub_group_size: longest chunk in elements; 0 is no bound.
        check_overflow: look for gradients that are not finite, and skip the step.
        ledger: where the optimizer's state is entered.

    Raises:
        ValueError: an optimizer that needs whole tensors, or one whose parameters are not the model's.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        buckets: list[Bucket],
        mesh: Mesh,
        reducer: Reducer[Bucket],
        ledger: Ledger,
        scaler: LossScaler | None = None,
        gradient_clipping: float = 0.0,
        average: bool = True,
        sub_group_size: int = 0,
        check_overflow: bool = True,
    ) -> None:
        check_elementwise(inner)
        self.inner, self.buckets, self.mesh, self.reducer, self.ledger = inner, buckets, mesh, reducer, ledger
        self.scaler = scaler or LossScaler()
        self.gradient_clipping, self.average, self.check_overflow = gradient_clipping, average, check_overflow
        self.chunks = self._take_over(sub_group_size)
        self._chunks_in: dict[int, list[Chunk]] = {id(bucket): [] for bucket in buckets}
        for chunk in self.chunks:
            self._chunks_in[id(chunk.bucket)].append(chunk)
        if any(group.get("stochastic_rounding") for group in inner.param_groups):
            for bucket in buckets:
                bucket.keep_rounded()
        self.last: StepFacts | None = None
        self.overflow = False
        self._state_bytes = 0
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state  # one truth, the inner optimizer's

    def _take_over(self, sub_group_size: int) -> list[Chunk]:
        group_of_name: dict[int, dict[str, int]] = {id(b): {s.name: -1 for s in b.layout.spans} for b in self.buckets}
        for index, group in enumerate(self.inner.param_groups):
            for p in group["params"]:
                _, bucket, at = place_of(p)
                if bucket.trainable:
                    group_of_name[id(bucket)][bucket.layout.spans[at].name] = index
            group["params"] = []
        self.inner.state.clear()
        chunks = []
        for bucket in self.buckets:
            bucket.stepper = self
            for index, chunk in cut_chunks(bucket, group_of_name[id(bucket)], sub_group_size):
                self.inner.param_groups[index]["params"].append(chunk.master)
                chunks.append(chunk)
        return chunks

    @property
    def loss_scale(self) -> float:
        """What the next loss is to be multiplied with."""
        return self.scaler.scale

    @property
    def divisor(self) -> float:
        """What the sum in a bucket's ``grad`` is to be divided by to be the gradient of the unscaled, averaged loss."""
        return self.scaler.scale * (self.mesh.world if self.average else 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter from the gradients of the backwards since the last step.

        Raises:
            ValueError: a closure was given; sharded gradients cannot be recomputed inside a step.
        """
        if closure is not None:
            raise ValueError("a closure cannot be re-evaluated inside a sharded step: call backward, then step()")
        norm, not_finite = self._measure()
        if not_finite is not None and self.check_overflow:
            event = self.scaler.update(True)
            self.last = StepFacts(norm, True, event.describe(not_finite), event)
        else:
            coefficient = 1.0 / self.divisor
            if self.gradient_clipping > 0 and norm > self.gradient_clipping:
                coefficient *= self.gradient_clipping / (norm + CLIP_EPS)
            self._update(coefficient)
            self.last = StepFacts(norm, False, not_finite and _UNCHECKED.format(not_finite), self.scaler.update(False))
        self.overflow = self.last.skipped
        self.zero_grad()
        return None

    def _measure(self) -> tuple[float, str | None]:
        """(global norm of the averaged unscaled gradient, first parameter that is not finite or None)."""
        rows = self._gather_facts()
        if any(row[-1] for row in rows):  # some rank got gradients after their bucket had left: all ranks send again
            self.reducer.flush()
            rows = self._gather_facts()
        squares = [row[:-1] for row in rows]
        finite = all(math.isfinite(x) for row in squares for x in row)
        total = math.fsum(x for row in squares for x in row) if finite else math.inf
        norm = math.sqrt(total) / self.divisor
        return norm, None if math.isfinite(norm) else self._first_not_finite(squares[self.mesh.rank])

    def _gather_facts(self) -> list[list[float]]:
        """One row per rank: Σg² of its slice of every bucket, then how many of its buckets still hold gradients."""
        device = self.mesh.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        squares = [zero if (grad := b.own_grad()) is None else sum_of_squares(grad) for b in self.buckets]
        unsent = torch.full((), float(self.reducer.num_unsent), dtype=torch.float64, device=device)
        table = comm.exchange(self.mesh, torch.stack([*squares, unsent]))
        values = comm.read_scalars(self.mesh, table.flatten())  # the step's one host sync
        width = len(self.buckets) + 1
        return [values[i : i + width] for i in range(0, len(values), width)]

    def _first_not_finite(self, squares: list[float]) -> str:
        """The first parameter, in departure order, whose gradient is not finite on the rank that owns the place."""
        number, names = math.inf, [s.name for b in self.buckets for s in b.layout.spans]
        for bucket, square in zip(self.buckets, squares, strict=True):
            grad = bucket.own_grad()
            if grad is None or math.isfinite(square):
                continue
            for piece in bucket.layout.pieces(*bucket.own):
                if not grad[piece.in_interval : piece.in_interval + piece.numel].isfinite().all():
                    number = min(number, names.index(piece.span.name))
        mine = torch.tensor([number], dtype=torch.float64, device=self.mesh.device)
        found = min(comm.read_scalars(self.mesh, comm.exchange(self.mesh, mine).flatten()))
        return names[int(found)] if math.isfinite(found) else "the sum of squares of all of them"

    def _update(self, coefficient: float) -> None:
        scale = torch.full((), coefficient, dtype=torch.float32, device=self.mesh.device)
        for done in [b.complete_grad() for b in self.buckets if b.has_grad]:
            done.wait()
        flat = getattr(self.inner, "step_flat_", None)
        if flat is None:
            self._step_generic(scale)
        published = []
        for place, bucket in enumerate(self.buckets):
            for chunk in self._chunks_of(bucket) if bucket.has_grad else ():
                copy = chunk.low_precision()
                if flat is not None:
                    gradient = chunk.gradient()
                    flat(chunk.master, gradient, scale, copy, first_element=chunk.start, place=place)
                elif copy is not None:
                    copy.copy_(chunk.master)
            published.append(bucket.publish())
            if len(published) > PUBLISHED_AT_ONCE:
                published.pop(0).wait()
        for pending in published:
            pending.wait()
        for bucket in self.buckets:
            bucket.renew()
        self.inner.__dict__["_opt_called"] = True  # what torch's schedulers ask, to warn of a wrong order of calls
        self._count_state()

    def state_views(self, bucket: Bucket, key: str, lo: int, hi: int) -> Iterator[tuple[Tensor, int]]:
        """The optimizer's tensor ``key`` of the bucket's elements [lo, hi), as (view, first element), in order."""
        for chunk in self._chunks_of(bucket):
            start, end = max(lo, chunk.start), min(hi, chunk.end)
            state = self.state.get(chunk.master, {}).get(key)
            if start < end and isinstance(state, Tensor) and state.numel() == chunk.end - chunk.start:
                yield state[start - chunk.start : end - chunk.start], start

    def _chunks_of(self, bucket: Bucket) -> list[Chunk]:
        return self._chunks_in[id(bucket)]

    def _step_generic(self, scale: Tensor) -> None:
        """Any other torch optimizer: hand it fp32 gradients, one call for all chunks."""
        for chunk in self.chunks:
            if chunk.bucket.has_grad:
                chunk.master.grad = chunk.gradient().to(chunk.master.dtype).mul_(scale)
        self.inner.step()
        for chunk in self.chunks:
            chunk.master.grad = None

    def _count_state(self) -> None:
        if not self._state_bytes:  # states are made in the first step, and keep their size
            self._state_bytes = sum(self.state_bytes_of(bucket) for bucket in self.buckets)
            self.ledger.add("optimizer", self._state_bytes)

    def state_bytes_of(self, bucket: Bucket) -> int:
        """Bytes of the optimizer's tensors for one bucket on this rank."""
        states = [self.state.get(chunk.master, {}) for chunk in self._chunks_of(bucket)]
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last step."""
        for bucket in self.buckets:
            bucket.drop_grad()

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the optimizer's state, and the loss scaler's."""
        return {"optimizer": self.inner.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank, at the same world size and stage."""
        self.inner.load_state_dict(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
