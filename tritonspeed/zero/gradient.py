"""The gradient of one bucket: it fills an outbox, travels, and waits beside the masters for the step.

    outbox → reduce-scatter → grad       what is added to an earlier micro-step's is added in the accumulate dtype
    outbox = grad                        where one rank is alone: there is nothing to add

Where the masters are in the memory of a GPU's host, the sum crosses to it in the dtype in which it was reduced, under
the backward of the next unit. Its squares are added up on the device before: the norm reads no host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonspeed import comm
from tritonspeed.comm import Mesh, Pending
from tritonspeed.comm.spans import REDUCE_SEND, REDUCE_WAIT
from tritonspeed.kernels import sum_of_squares
from tritonspeed.offload import Tier
from tritonspeed.offload.tiers import Handle
from tritonspeed.zero.layout import Layout
from tritonspeed.zero.ledger import Account, Ledger

if TYPE_CHECKING:
    from tritonspeed.zero.homes import Homes
    from tritonspeed.zero.plan import BucketTypes


class Gradient:
    """The half of a ``Bucket`` that takes gradients. See there for sizes; the other half gives the attributes below."""

    name: str
    layout: Layout
    types: BucketTypes
    mesh: Mesh
    ledger: Ledger
    homes: Homes | None
    tier: Tier
    own: tuple[int, int]
    owned: tuple[int, int]
    is_updating: bool

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.has_grad = False
        self.outbox: Tensor | None = None
        self.filled: set[int] = set()  # parameters whose gradient stands in the outbox
        self._outbox_kind = "communication"
        self._landing: tuple[Handle, Tensor] | None = None  # a sum on its way to the host, and its place there
        self._squares: Tensor | None = None  # Σg², where it was worked out on the device

    def settle(self, committed: bool = False) -> None:
        """See ``Bucket``."""
        raise NotImplementedError(f"{type(self).__name__} has no settle")

    # receive

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

    # send

    def send(self, accumulating: bool) -> Callable[[], None]:
        """Start the reduction of the outbox into ``grad``; returns what ends it (wait, sum, free).

        Parameters without a gradient, and the padding, leave as zeros.
        """
        with self.mesh.spans.span(REDUCE_SEND, self.name):
            finish = self._start_reduction(accumulating)

        def ended() -> None:
            with self.mesh.spans.span(REDUCE_WAIT, self.name):
                finish()

        return ended

    def _start_reduction(self, accumulating: bool) -> Callable[[], None]:
        self.settle()
        self._open_outbox(accumulating)
        assert self.outbox is not None, "an open outbox exists"
        self._zero_gaps(self.outbox)
        outbox, category, self.outbox, self.filled = self.outbox, self._outbox_kind, None, set()
        wire_type = self.types.reduce or outbox.dtype
        if self.mesh.world == 1 and wire_type == outbox.dtype:
            self.ledger.add(category, -outbox.nbytes)
            self._keep(outbox)
            return lambda: None
        wire = outbox if wire_type == outbox.dtype else outbox.to(wire_type)
        held = [(category, outbox.nbytes)] + ([("communication", wire.nbytes)] if wire is not outbox else [])
        if self.mesh.world > 1:
            received_bytes = (self.mesh.world - 1) * self.layout.slice_numel * wire_type.itemsize
            held.append(("communication", received_bytes))
            self.ledger.add("communication", received_bytes + (wire.nbytes if wire is not outbox else 0))
        target = self._target()
        if self._crosses:
            held.append(("communication", target.nbytes))
        pending = comm.reduce_scatter(self.mesh, wire, target, self.has_grad and not self._crosses, self.name)
        self.has_grad = True

        def finish() -> None:
            pending.wait()
            if self._crosses and (self.mesh.world == 1 or self.mesh.backend == "nccl"):  # the sum has the wire's dtype
                self._to_host(target.to(wire_type))
            elif self._crosses:
                self.ledger.add("communication", -held.pop()[1])  # it leaves as it is, and counts until it is let go of
                self._to_host(target)
            for kind, num_bytes in held:
                self.ledger.add(kind, -num_bytes)

        return finish

    def _keep(self, outbox: Tensor) -> None:
        """One rank: the outbox is the sum, in its own dtype until something is added to it."""
        if self._crosses:
            self._to_host(outbox)
        elif self.grad is None:
            self.grad = outbox
            self._account.add("gradients", outbox.nbytes)
        else:
            self._add(outbox)
        self.has_grad = True

    def _add(self, more: Tensor) -> None:
        assert self.grad is not None, "it is added to an earlier one"
        self._squares = None
        if self.grad.dtype != self.types.accumulate:
            narrow, self.grad = self.grad, self._widened(self.grad)
            self._free_sum(narrow)
        self.grad.add_(more)

    def _widened(self, narrow: Tensor) -> Tensor:
        wide = self.types.accumulate
        if self._crosses:
            return self.home.lend("gradients", narrow.numel(), wide, crosses=False).copy_(narrow)
        self._account.add("gradients", narrow.numel() * wide.itemsize)
        return narrow.to(wide)

    def _free_sum(self, total: Tensor) -> None:
        """``total`` was a ``grad``, or was added to it."""
        if self._crosses:
            self.home.take_back("gradients", total)
        else:
            self._account.add("gradients", -total.nbytes)

    def _target(self) -> Tensor:
        """Where the sum over the ranks goes: this rank's slice of ``grad``, or device memory that it crosses from."""
        if self._crosses:
            target = torch.empty(self.layout.slice_numel, dtype=self.types.accumulate, device=self.mesh.device)
            self.ledger.add("communication", target.nbytes)
            return target
        if self.grad is None:
            self.grad = torch.empty(self.owned[1] - self.owned[0], dtype=self.types.accumulate, device=self.mesh.device)
            self._account.add("gradients", self.grad.nbytes)
        return self.grad if self.owned == self.own else self.grad[slice(*self.own)]

    @property
    def _account(self) -> Account:
        on_device = self.tier is Tier.DEVICE or not (self._crosses or self.mesh.device.type == "cpu")
        return self.ledger if on_device else self.ledger.host

    @property
    def _crosses(self) -> bool:
        """Whether sums leave the device at once. At stage 0 they are gathered first, and cross as they are used."""
        return self.is_apart and self.owned == self.own

    @property
    def is_apart(self) -> bool:
        """Whether masters are in memory that is not the device's: what goes to them and comes from them is copied."""
        return self.homes is not None and not self.homes.shares_memory and self.tier is not Tier.DEVICE

    @property
    def home(self) -> Homes:
        """``homes``, of a bucket of which something lives elsewhere than on the device."""
        assert self.homes is not None, "another tier than the device has homes"
        return self.homes

    def _to_host(self, total: Tensor) -> None:
        """Start ``total``, a sum over the ranks, on its way."""
        self.land()
        self._squares = sum_of_squares(total) if self.grad is None else None
        place = self.home.lend("gradients", total.numel(), total.dtype)
        self._landing = (self.home.leave(total, place), place)

    def land(self) -> None:
        """Until the sum is where it is added to an earlier one, or used; nothing where none is under way."""
        if self._landing is None:
            return
        (handle, place), self._landing = self._landing, None
        handle.wait()
        if self.grad is None:
            self.grad = place
        else:
            self._add(place)
            self._free_sum(place)

    # between micro-steps, for checkpoints

    def held_back(self) -> tuple[Tensor, list[int]] | None:
        """(this rank's own gradients in accumulation, (P,), zero where there are none; which parameters have one)."""
        if self.outbox is None:
            return None
        self._zero_gaps(self.outbox)
        return self.outbox, sorted(self.filled)

    def hold_back(self, values: Tensor, indices: Iterable[int]) -> None:
        """Take back what ``held_back`` gave, or (P,) of other ranks that adds up to the same."""
        self._open_outbox(True)
        assert self.outbox is not None, "an open outbox exists"
        self.outbox.copy_(values)
        self.filled = set(indices)

    def take_sum(self, values: Tensor) -> None:
        """This rank's slice of gradients that were summed over the ranks, (P/N,): more is to be added to it."""
        self.drop_grad()
        wide = self.types.accumulate
        if self._crosses:
            self.grad = self.home.lend("gradients", values.numel(), wide, crosses=False).copy_(values)
        else:
            self.grad = values.to(self.mesh.device, wide, copy=True)
            self._account.add("gradients", self.grad.nbytes)
        self.has_grad = True

    # the step

    def complete_grad(self) -> Pending:
        """Stage 0: every rank wants every slice's sum, so the sums are gathered; elsewhere nothing is left to do."""
        if self.grad is None or self.owned == self.own:
            return Pending(self.mesh, [])
        return comm.all_gather_(self.mesh, self.grad, f"{self.name}.grad")

    def squares(self) -> Tensor | None:
        """Σg² of this rank's slice, () fp64 where the sum was made; None where there is none yet."""
        if self._squares is not None and not self.is_updating:
            return self._squares
        grad = self.own_grad()
        return None if grad is None else sum_of_squares(grad)

    def own_grad(self) -> Tensor | None:
        """This rank's slice of the summed gradient, (P/N,), to read; None where there is none yet."""
        if self.is_updating:
            return None
        self.land()
        if self.grad is None or not self.has_grad:
            return None
        return self.grad if self.owned == self.own else self.grad[slice(*self.own)]

    def write_grad(self, lo: int, values: Tensor) -> None:
        """Set this rank's sum from the bucket's element ``lo`` on, within ``own``. There is one: see ``own_grad``."""
        total = self.own_grad()
        assert self.grad is not None and total is not None, f"{self.name} has no gradient to write to"
        self._squares = None
        if self.grad.dtype != self.types.accumulate:
            narrow, self.grad = self.grad, self._widened(self.grad)
            self._free_sum(narrow)
            total = self.own_grad()
            assert total is not None, "it is wider, and there"
        at = lo - self.own[0]
        total[at : at + values.numel()].copy_(values)

    def drop_grad(self) -> None:
        """Forget what was accumulated, and free it: forward needs the room for activations."""
        if self.is_updating:
            return  # the stepper drops it
        self.land()
        if self.grad is not None:
            self._free_sum(self.grad)
        self.grad, self._squares, self.has_grad = None, None, False
        self.filled.clear()
        if self.outbox is not None:
            self.ledger.add(self._outbox_kind, -self.outbox.nbytes)
            self.outbox = None
