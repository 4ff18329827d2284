"""The optimizer step over shards: one exchange of facts, then chunk after chunk.

    facts     Σg² of every bucket's own slice (fp64), gathered from all ranks with the hash of what they have issued
    decide    a gradient that is not finite skips the step on every rank; the norm gives the clipping coefficient
    update    per chunk, unscale × clip in one number: master, moments and the low-precision copy in one pass
    publish   stages 1, 2: the updated slices are gathered into place, bucket by bucket under the next bucket's update

What is not resident comes and goes tile by tile (``tile.py``), and may do so under the next forward (``late.py``).
Stage 0 walks the chunks of all ranks' slices, so it does the same arithmetic as the others. An optimizer whose update
of an element needs more of its tensor than a slice has says so to ``whole.py``, which talks to the other ranks before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspeed.comm import Mesh, Pending
from tritonspeed.comm.spans import NORM, PUBLISH, UPDATE_WAIT, UPDATED
from tritonspeed.kernels.flat_update import COPY_DTYPES
from tritonspeed.offload import Tier
from tritonspeed.offload.stream import Buffer, Ring
from tritonspeed.optim import check_elementwise
from tritonspeed.precision import LossScaler, ScaleEvent
from tritonspeed.zero.bucket import Bucket, ShardState
from tritonspeed.zero.chunk import Chunk
from tritonspeed.zero.group import place_of
from tritonspeed.zero.homes import PAGE_ELEMS, Homes
from tritonspeed.zero.late import LateUpdates
from tritonspeed.zero.layout import round_up
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.measure import measure
from tritonspeed.zero.reduce import Reducer
from tritonspeed.zero.states import ShardedStates
from tritonspeed.zero.tile import Tile, cut_tiles, is_staged
from tritonspeed.zero.whole import needs_whole, whole_step_of

if TYPE_CHECKING:
    from tritonspeed.zero.parameter_offload import ParameterOffload

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
        homes: the tiers; None is the device.

    Raises:
        ValueError: another optimizer that needs whole tensors, or one of ours that does although its state is to be
            offloaded, or one whose parameters are not the model's.
    """

    parameter_offload: ParameterOffload  # there only where parameters are sharded: programs ask by hasattr

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
        homes: Homes | None = None,
    ) -> None:
        if not needs_whole(inner):
            check_elementwise(inner)
        elif homes is not None and homes.offloads_optimizer:
            raise ValueError(
                f"{type(inner).__name__} needs whole tensors, and its state is to be offloaded: a step then sees tiles."
                " Set offload_optimizer.device to none, or use AdamW, Lion or Adagrad"
            )
        self.inner, self.buckets, self.mesh, self.reducer, self.ledger = inner, buckets, mesh, reducer, ledger
        self.scaler = scaler or LossScaler()
        self.gradient_clipping, self.average, self.check_overflow = gradient_clipping, average, check_overflow
        self._group_of_name = group_of_name = self._groups_by_name()
        self.homes, self.late, self.num_steps = homes, LateUpdates(), 0
        self._tiles_in: dict[int, list[Tile]] = {}
        self.states = ShardedStates(inner, self._tiles_in, self.late, homes)
        self._group_of: dict[int, int] = {}
        self.chunks = self._take_over(group_of_name, 0 if needs_whole(inner) else sub_group_size)
        self._chunks_in: dict[int, list[Chunk]] = {id(bucket): [] for bucket in buckets}
        for chunk in self.chunks:
            self._chunks_in[id(chunk.bucket)].append(chunk)
        self._ring: Ring[Tile] = Ring(homes.offload.buffers if homes else 1, self._new_buffer)
        self._place = {id(bucket): place for place, bucket in enumerate(buckets)}
        self.whole = whole_step_of(inner, self._chunks_in, group_of_name, buckets, ledger)
        if any(group.get("stochastic_rounding") for group in inner.param_groups):
            for bucket in buckets:
                bucket.keep_rounded()
        self.last: StepFacts | None = None
        self.overflow = self.retired = False
        self.instead: Callable[[], bool] | None = None  # an engine's: makes the step that its caller asks for
        self._state_bytes: dict[int, int] = {}  # as entered in the ledger, by bucket
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
            found, self._tiles_in[id(bucket)] = cut_tiles(
                bucket, group_of_name[id(bucket)], sub_group_size, self.inner.state, self.homes
            )
            for index, chunk in found:
                self.inner.param_groups[index]["params"].append(chunk.master)
                self._group_of[id(chunk)] = index
                chunks.append(chunk)
        return chunks

    def _new_buffer(self) -> Buffer:
        """Memory for one tile of the ring; it is kept."""
        homes = self.homes
        assert homes is not None, "what needs a buffer has a home"

        def empty(numel: int, dtype: torch.dtype) -> Tensor:
            made = homes.empty(numel, dtype, crosses=True)
            homes.ledger.host.add("communication", made.nbytes)
            return made

        longest = max(t.hi - t.lo for tiles in self._tiles_in.values() for t in tiles if t.needs_buffer)
        return Buffer(round_up(longest, PAGE_ELEMS), empty)

    def retire(self) -> None:
        """Drop the states: the model is sharded anew by another. Updates under way are ended first."""
        self.late.finish()
        self.retired = True
        for group in self.inner.param_groups:
            group["params"] = []
        for held in (self.inner.state, self.chunks, self._tiles_in, self._chunks_in, self._group_of):
            held.clear()

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
        if self.retired:
            raise ValueError("step() of an optimizer whose model was sharded again: step the later one's optimizer")
        if self.instead is not None and self.instead():
            return None
        spans = self.mesh.spans
        with spans.span(UPDATE_WAIT, "", on_host=True):
            self.late.finish()
        self._fetch_ahead()
        try:
            with spans.span(NORM, ""):
                norm, not_finite = measure(self.buckets, self.mesh, self.reducer, self.divisor)
        except BaseException:
            self._ring.forget()
            raise
        if self.homes is not None:
            self.homes.let_go()
        if not_finite is not None and self.check_overflow:
            self._ring.forget()
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

    def _update(self, coefficient: float) -> None:
        self.num_steps += 1
        for bucket in self.buckets:
            bucket.land()
        with self.mesh.spans.span(PUBLISH, "sums"):
            for done in [b.complete_grad() for b in self.buckets if b.has_grad]:
                done.wait()
        now, late = self._now_and_late()
        scale = self._scale_on(coefficient)
        if self.whole is not None:
            self._update_whole(scale)
        else:
            self._publish_each(self._updated([bucket for bucket in now if bucket.has_grad], scale, None))
        for bucket in now:
            bucket.renew()
        self.inner.__dict__["_opt_called"] = True  # what torch's schedulers ask, to warn of a wrong order of calls
        if late:
            # what the caller and the schedules change from here on is the next step's
            groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in self.inner.param_groups]
            self.late.start(late, lambda: self._updated(late, scale, groups), self._end_update)
        else:
            self._end_update()

    def _fetch_ahead(self) -> None:
        """Read the first tiles from disk while the norm is measured: that is 4 % of a step on disk."""
        if self.homes is not None:
            now, late = self._now_and_late()
            order = [bucket for bucket in (*now, *late) if bucket.has_grad and bucket.tier is Tier.DISK]
            self._ring.fetch_ahead(tile for bucket in order for tile in self._tiles_in[id(bucket)])

    def _now_and_late(self) -> tuple[list[Bucket], list[Bucket]]:
        """The buckets that a step updates at once, and those under the next forward, in its order."""
        late = [bucket for bucket in reversed(self.buckets) if self._may_be_late(bucket)]
        taken = {id(bucket) for bucket in late}
        return [bucket for bucket in self.buckets if id(bucket) not in taken], late

    def _may_be_late(self, bucket: Bucket) -> bool:
        """Whether the bucket can be updated under the next forward: nobody reads it without fetching it."""
        if self.homes is None or not self.homes.updates_late or not hasattr(self.inner, "step_flat_"):
            return False
        away = bucket.frees and bucket.state is ShardState.SHARDED and bucket.has_grad
        return away and is_staged(bucket, self.homes)

    def _scale_on(self, coefficient: float) -> dict[torch.device, Tensor]:
        """The factor of every gradient, where masters are."""
        devices = {chunk.master.device for chunk in self.chunks}
        return {device: torch.full((), coefficient, dtype=torch.float32, device=device) for device in devices}

    def _updated(
        self, buckets: list[Bucket], scale: dict[torch.device, Tensor], groups: list[dict[str, Any]] | None
    ) -> Iterator[Bucket]:
        """Update tile after tile, and give each bucket as soon as all of it is back where it lives.

        Args:
            scale: by device, the factor of every gradient.
            groups: the optimizer's settings; None takes those it has now.
        """
        resident = [bucket for bucket in buckets if not is_staged(bucket, self.homes)]
        if not hasattr(self.inner, "step_flat_"):
            chunks = [chunk for bucket in resident if bucket.has_grad for chunk in self.chunks_of(bucket)]
            with self.mesh.spans.span(UPDATED, "all"):
                self._step_generic([(chunk, chunk.gradient()) for chunk in chunks], scale)
        tiles = [tile for bucket in buckets for tile in self._tiles_in[id(bucket)]]
        for tile in tiles:
            tile.has_left = False
        left = deque(buckets)
        for tile in self._ring.stream(tiles):
            for chunk in tile.chunks:
                with self.mesh.spans.span(UPDATED, tile.bucket.name, on_host=chunk.master.device.type == "cpu"):
                    self._update_chunk(tile, chunk, scale[chunk.master.device], groups)
            while left and self._has_left(left[0]):
                yield left.popleft()
        yield from left

    def _has_left(self, bucket: Bucket) -> bool:
        """Whether all of it is back: tiles leave in order."""
        tiles = self._tiles_in[id(bucket)]
        return not tiles or tiles[-1].has_left

    def _update_chunk(self, tile: Tile, chunk: Chunk, scale: Tensor, groups: list[dict[str, Any]] | None) -> None:
        is_away = self.homes is not None and chunk.bucket.tier is not Tier.DEVICE
        begun = time.perf_counter() if is_away else 0.0
        copy, gradient = tile.copy_of(chunk), tile.gradient_of(chunk)
        flat = getattr(self.inner, "step_flat_", None)
        fused = copy if copy is None or copy.dtype in COPY_DTYPES else None
        if flat is not None:
            place = self._place[id(chunk.bucket)]
            group = None if groups is None else groups[self._group_of[id(chunk)]]
            flat(chunk.master, gradient, scale, fused, first_element=chunk.start, place=place, group=group)
        elif is_staged(chunk.bucket, self.homes):
            self._step_generic([(chunk, gradient)], {chunk.master.device: scale})
        if copy is not None and (flat is None or fused is None):
            copy.copy_(chunk.master)
        if is_away:
            assert self.homes is not None, "another tier than the device has homes"
            states = [s for s in self.state.get(chunk.master, {}).values() if isinstance(s, Tensor)]
            num_bytes = gradient.nbytes + (0 if copy is None else copy.nbytes)
            num_bytes += sum(2 * t.nbytes for t in (chunk.master, *states))
            self.homes.count_update(num_bytes, time.perf_counter() - begun)

    def _update_whole(self, scale: dict[torch.device, Tensor]) -> None:
        """LAMB and Muon, round by round; all of it is on the device."""
        assert self.whole is not None, "an optimizer that needs whole tensors"
        for buckets in self.whole.rounds:
            with self.mesh.spans.span(UPDATED, "whole tensors"):
                self.whole.begin([bucket for bucket in buckets if bucket.has_grad], scale[self.mesh.device])
            self._publish_each(self._updated_whole(buckets, scale[self.mesh.device]))
            with self.mesh.spans.span(UPDATED, "whole tensors"):
                self.whole.end()

    def _updated_whole(self, buckets: list[Bucket], scale: Tensor) -> Iterator[Bucket]:
        assert self.whole is not None, "an optimizer that needs whole tensors"
        for bucket in buckets:
            with self.mesh.spans.span(UPDATED, bucket.name):
                for tile in self._tiles_in[id(bucket)] if bucket.has_grad else ():
                    for chunk in tile.chunks:
                        if self.whole.takes(chunk):
                            self.whole.update(chunk, tile.copy_of(chunk))
                        else:
                            self._update_chunk(tile, chunk, scale, None)
            yield bucket

    def _publish_each(self, updated: Iterable[Bucket]) -> None:
        published: list[Pending] = []
        spans = self.mesh.spans
        for bucket in updated:
            with spans.span(PUBLISH, bucket.name):
                published.append(bucket.publish())
                if len(published) > PUBLISHED_AT_ONCE:
                    published.pop(0).wait()
        with spans.span(PUBLISH, "rest"):
            for pending in published:
                pending.wait()

    def _end_update(self) -> None:
        """Everything has been updated: what is on disk becomes the truth."""
        self._ring.forget()
        if not any(self._state_bytes.values()):  # they are made in the first step, and keep their size
            self.states_changed()
        if self.homes is not None:
            self.homes.commit(self.num_steps, {})

    def settle(self, bucket: Bucket) -> None:
        """Until ``bucket`` has been updated."""
        self.late.wait_for(bucket)

    def _step_generic(self, chunks: list[tuple[Chunk, Tensor]], scale: dict[torch.device, Tensor]) -> None:
        """Any other torch optimizer: hand it fp32 gradients, one call for all of these chunks."""
        for chunk, gradient in chunks:
            chunk.master.grad = gradient.to(chunk.master.dtype, copy=True).mul_(scale[chunk.master.device])
        self.inner.step()
        for chunk, _ in chunks:
            chunk.master.grad = None

    def states_changed(self) -> None:
        """States were made anew, outside a step: count them."""
        for bucket in self.buckets:
            num_bytes = self.states.bytes_of(bucket)
            more = num_bytes - self._state_bytes.get(id(bucket), 0)
            self._state_bytes[id(bucket)] = num_bytes
            self.ledger.of(Tier.DEVICE if bucket.tier is Tier.DEVICE else Tier.HOST).add("optimizer", more)

    def settings_of(self, chunk: Chunk) -> dict[str, Any]:
        """The optimizer's group of a chunk: lr, betas, ..."""
        return self.inner.param_groups[self._group_of[id(chunk)]]

    def names_in(self, group: int) -> list[str]:
        """The parameters of an optimizer group, on whichever rank they are."""
        return [name for names in self._group_of_name.values() for name, index in names.items() if index == group]

    def chunks_of(self, bucket: Bucket) -> list[Chunk]:
        """What the optimizer updates of a bucket."""
        return self._chunks_in[id(bucket)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients accumulated since the last step."""
        for bucket in self.buckets:
            bucket.drop_grad()

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the optimizer's state, and the loss scaler's. What is on disk is read into memory."""
        return {"optimizer": self.states.save(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank, at the same world size and stage."""
        self.states.load(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.states_changed()


def _copied(setting: Any) -> Any:
    return setting.clone() if isinstance(setting, Tensor) else setting
