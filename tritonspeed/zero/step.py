"""The optimizer step over shards: one exchange of facts, then chunk after chunk.

    facts     Σg² of every bucket's own slice (fp64), gathered from all ranks with the hash of what they have issued
    decide    a gradient that is not finite skips the step on every rank; the norm gives the clipping coefficient
    update    per chunk, unscale × clip in one number: master, moments and the low-precision copy in one pass
    publish   stages 1, 2: the updated slices are gathered into place, bucket by bucket under the next bucket's update

Stage 0 walks the chunks of all ranks' slices, so it does the same arithmetic as the others. An optimizer whose update
of an element needs more of its tensor than a slice has says so to ``whole.py``, which talks to the other ranks before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.kernels import sum_of_squares
from tritonspeed.optim import AdamW, check_elementwise
from tritonspeed.precision import LossScaler, ScaleEvent
from tritonspeed.zero.bucket import Bucket, Ledger
from tritonspeed.zero.chunk import Chunk, cut_chunks
from tritonspeed.zero.group import place_of
from tritonspeed.zero.reduce import Reducer
from tritonspeed.zero.whole import needs_whole, whole_step_of

_UNCHECKED = "gradient not finite, first in {!r}: applied all the same, as bf16.check_grad_overflow is false"
PUBLISHED_AT_ONCE = 2  # gathers of updated parameters under way, under the update of the next bucket
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed: keeps a zero norm from dividing


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


class ZeroOptimizer(torch.optim.Optimizer):
    """Any elementwise torch optimizer, or our LAMB or Muon, stepped on shards.

    Its ``param_groups`` and ``state`` are the inner one's own.

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
        ValueError: another optimizer that needs whole tensors, or one whose parameters are not the model's.
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
        if not needs_whole(inner):
            check_elementwise(inner)
        self.inner, self.buckets, self.mesh, self.reducer, self.ledger = inner, buckets, mesh, reducer, ledger
        self.scaler = scaler or LossScaler()
        self.gradient_clipping, self.average, self.check_overflow = gradient_clipping, average, check_overflow
        group_of_name = self._groups_by_name()
        self.chunks = self._take_over(group_of_name, 0 if needs_whole(inner) else sub_group_size)
        self._chunks_in: dict[int, list[Chunk]] = {id(bucket): [] for bucket in buckets}
        for chunk in self.chunks:
            self._chunks_in[id(chunk.bucket)].append(chunk)
        self._place = {id(bucket): place for place, bucket in enumerate(buckets)}
        self.whole = whole_step_of(inner, self._chunks_in, group_of_name, buckets, ledger)
        if any(group.get("stochastic_rounding") for group in inner.param_groups):
            for bucket in buckets:
                bucket.keep_rounded()
        self.last: StepFacts | None = None
        self.overflow = False
        self._state_bytes = 0
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state  # one truth, the inner optimizer's

    def _groups_by_name(self) -> dict[int, dict[str, int]]:
        """Bucket → the parameter's name → its optimizer group, -1 for none."""
        found: dict[int, dict[str, int]] = {id(b): {s.name: -1 for s in b.layout.spans} for b in self.buckets}
        for index, group in enumerate(self.inner.param_groups):
            for p in group["params"]:
                _, bucket, at = place_of(p)
                if bucket.trainable:
                    found[id(bucket)][bucket.layout.spans[at].name] = index
        return found

    def _take_over(self, group_of_name: dict[int, dict[str, int]], sub_group_size: int) -> list[Chunk]:
        """Chunks take the parameters' places in the optimizer."""
        for group in self.inner.param_groups:
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
        for buckets in [self.buckets] if self.whole is None else self.whole.rounds:
            if self.whole is not None:
                self.whole.begin([bucket for bucket in buckets if bucket.has_grad], scale)
            for bucket in buckets:
                for chunk in self._chunks_of(bucket) if bucket.has_grad else ():
                    self._update_chunk(chunk, flat, scale)
                published.append(bucket.publish())
                if len(published) > PUBLISHED_AT_ONCE:
                    published.pop(0).wait()
            if self.whole is not None:
                self.whole.end()
        for pending in published:
            pending.wait()
        for bucket in self.buckets:
            bucket.renew()
        self.inner.__dict__["_opt_called"] = True  # what torch's schedulers ask, to warn of a wrong order of calls
        self._count_state()

    def _update_chunk(self, chunk: Chunk, flat: Callable[..., None] | None, scale: Tensor) -> None:
        copy = chunk.low_precision()
        if self.whole is not None and self.whole.takes(chunk):
            self.whole.update(chunk, copy)
        elif flat is not None:
            place = self._place[id(chunk.bucket)]
            flat(chunk.master, chunk.gradient(), scale, copy, first_element=chunk.start, place=place)
        elif copy is not None:
            copy.copy_(chunk.master)

    def state_views(self, bucket: Bucket, key: str, lo: int, hi: int) -> Iterator[tuple[Tensor, int]]:
        """The optimizer's tensor ``key`` of the bucket's elements [lo, hi), as (values, first element), in order."""
        for chunk, state in self._states_in(bucket, key, lo, hi):
            start, end = max(lo, chunk.start), min(hi, chunk.end)
            yield state[start - chunk.start : end - chunk.start], start

    def set_state(self, bucket: Bucket, key: str, lo: int, values: Tensor) -> None:
        """Set what this rank has of the optimizer's tensor ``key`` of the bucket's elements from ``lo`` on."""
        for chunk, state in self._states_in(bucket, key, lo, lo + values.numel()):
            start, end = max(lo, chunk.start), min(lo + values.numel(), chunk.end)
            part = values[start - lo : end - lo]
            if isinstance(self.inner, AdamW):
                self.inner.set_state_values_(chunk.master, key, chunk.start, start - chunk.start, part)
            else:
                state[start - chunk.start : end - chunk.start].copy_(part)

    def _states_in(self, bucket: Bucket, key: str, lo: int, hi: int) -> Iterator[tuple[Chunk, Tensor]]:
        """The chunks that [lo, hi) meets, with the whole of their state: decoded, where it is in 8 bits."""
        for chunk in self._chunks_of(bucket):
            if max(lo, chunk.start) >= min(hi, chunk.end):
                continue
            if isinstance(self.inner, AdamW):
                state = self.inner.state_values(chunk.master, key, chunk.start)
            else:
                state = self.state.get(chunk.master, {}).get(key)
            if isinstance(state, Tensor) and state.numel() == chunk.end - chunk.start:
                yield chunk, state

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
