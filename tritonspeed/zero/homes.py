"""Which tier each bucket's masters, moments and parameter shard live in, and the memory and files they live in there.

    masters, moments     the optimizer's tier; ``ratio`` < 1 keeps the first units on the device, whole buckets of them
    parameter shards     the parameters' tier, at stage 3; on disk, the first ``max_in_cpu`` elements stay on the host
    gradients            beside their masters, in memory: on disk they would be written and read once a step for nothing

Where a rank computes on the CPU, device and host are one memory (``shares_memory``): offloading to the host then moves
nothing, and a shard that the master could be rounded to is not kept. Beside a GPU, what crosses is page-locked once and
lent from a pool: the buffers of all gradients stay, and the ledger's host account has them between steps too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tritonspeed.comm import Mesh
from tritonspeed.offload import Offload, Tier
from tritonspeed.offload.crossing import Crossing, Crossings
from tritonspeed.offload.disk import DiskFlat, DiskFolder
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import Piece as FilePiece
from tritonspeed.offload.pool import HostPool
from tritonspeed.offload.tiers import Handle
from tritonspeed.zero.layout import Layout
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.plan import BucketPlan
from tritonspeed.zero.stages import Stage

PAGE_ELEMS = 4096  # whole pages of every dtype, one byte an element too
LEAVING = 1  # sums under way to the host that keep their device memory: each has the next unit's backward to run under


class Homes:
    """The tiers of one sharded model on this rank.

    Args:
        offload: what is to live where.
        mesh: the ranks.
        stage: parameters are offloaded where it shards them.
        ledger: what is entered of them.
        plans: every bucket to come, in unit order.
    """

    def __init__(
        self, offload: Offload, mesh: Mesh, stage: Stage, ledger: Ledger, plans: Iterable[BucketPlan] = ()
    ) -> None:
        self.offload, self.mesh, self.ledger = offload, mesh, ledger
        self.shares_memory = mesh.device.type == "cpu"
        self._folders: dict[str, DiskFolder] = {}
        self._tiers = _choose(offload, stage, mesh.world, plans)
        self._staged_bytes = 0
        self.crossings = Crossings()
        self._pool = HostPool(ledger.host.add)
        self._leaving: deque[tuple[Crossing, Tensor]] = deque()
        self._updates = (0, 0.0)  # (bytes, seconds) of the optimizer in host memory
        self._traffic: dict[str, tuple[int, float]] = {}

    def tiers(self, name: str) -> tuple[Tier, Tier]:
        """(the tier of the master and the moments, the tier of the parameter shard) of a bucket."""
        return self._tiers.get(name, (Tier.DEVICE, Tier.DEVICE))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether any bucket's master is anywhere else than on the device."""
        return any(tier is not Tier.DEVICE for tier, _ in self._tiers.values())

    @property
    def updates_late(self) -> bool:
        """Whether sharded buckets are updated under the next forward."""
        if self.offload.overlap is not None:
            return self.offload.overlap and self.offloads_optimizer
        kinds = {tier for tier, _ in self._tiers.values()}
        return Tier.DISK in kinds or (Tier.HOST in kinds and not self.shares_memory)

    def empty(self, numel: int, dtype: torch.dtype, crosses: bool = False) -> Tensor:
        """(numel,) in host memory that begins on a page.

        Args:
            crosses: it goes to, or comes from, a GPU: page-locked, unless the config forbids.
        """
        return host_empty(numel, dtype, pin=crosses and self.offload.pin_memory and not self.shares_memory)

    def on_disk(
        self, bucket: str, kind: str, dtype: torch.dtype, layout: Layout, owned: tuple[int, int], slots: int = 2
    ) -> DiskFlat:
        """Files for elements [owned) of a bucket.

        Args:
            kind: "master", "parameters", or the optimizer's name of a state.
            slots: 2 keeps what was committed last; 1 is written in place.
        """
        where = self.offload.parameters_path if kind == "parameters" else self.offload.path
        folder = self._folder(str(where or self.offload.path or self.offload.parameters_path))
        pieces = [
            FilePiece.of(p.span.name, p.span.shape, p.in_interval, p.in_span, p.in_span + p.numel)
            for p in layout.pieces(*owned)
        ]
        flat = folder.flat(bucket, kind, dtype, owned[1] - owned[0], pieces, slots)
        self.ledger.disk.add(
            "parameters" if kind == "parameters" else "optimizer", slots * flat.numel * flat.dtype.itemsize
        )
        return flat

    def _folder(self, path: str) -> DiskFolder:
        if path not in self._folders:
            self._folders[path] = DiskFolder(path, self.mesh.rank, self.mesh.world, self.offload.requests)
        return self._folders[path]

    @property
    def folders(self) -> Sequence[DiskFolder]:
        """The folders in use."""
        return list(self._folders.values())

    def may_stage(self, num_bytes: int) -> bool:
        """Whether reading ahead may take so much more host memory."""
        allowed = self.offload.parameter_buffers * self.offload.parameter_buffer_elems
        return not self._staged_bytes or self._staged_bytes + num_bytes <= 2 * allowed  # of 16-bit elements

    def stage(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory that a parameter shard is read into; given back by ``unstage``."""
        staging = self.lend("communication", numel, dtype)
        self._staged_bytes += staging.nbytes
        return staging

    def unstage(self, staging: Tensor, after: Handle | None = None) -> None:
        """The caller lets go of what ``stage`` gave, as soon as ``after`` has ended."""
        self._staged_bytes -= staging.nbytes
        self.take_back("communication", staging, after)

    def lend(self, purpose: str, numel: int, dtype: torch.dtype, crosses: bool = True) -> Tensor:
        """(numel,) in host memory; given back by ``take_back``. Beside a GPU it is page-locked if it ``crosses``, and
        kept for the next time.

        Args:
            purpose: the ledger's category.
        """
        if not self.shares_memory:
            return self._pool.lend(purpose, numel, dtype, lambda: self.empty(numel, dtype, crosses))
        fresh = self.empty(numel, dtype)
        self.ledger.host.add(purpose, fresh.nbytes)
        return fresh

    def take_back(self, purpose: str, buffer: Tensor, after: Handle | None = None) -> None:
        """What ``lend`` gave is free again, as soon as ``after`` has ended."""
        if self.shares_memory:
            self.ledger.host.add(purpose, -buffer.nbytes)
        else:
            self._pool.take_back(purpose, buffer, after)

    def leave(self, source: Tensor, place: Tensor) -> Handle:
        """Start copying a sum from the device to ``place`` on the host; the device's memory is let go of when
        ``LEAVING`` more have started, without anyone waiting but the stream that would use it next."""
        self.ledger.add("communication", source.nbytes)
        crossing = self.crossings.down(source, place)
        self._leaving.append((crossing, source))
        self.let_go(LEAVING)
        return crossing

    def let_go(self, num_kept: int = 0) -> None:
        """Let go of the device's memory of all but the last ``num_kept`` sums on their way."""
        while len(self._leaving) > num_kept:
            crossing, source = self._leaving.popleft()
            crossing.join()
            self.ledger.add("communication", -source.nbytes)

    def count_update(self, num_bytes: int, seconds: float) -> None:
        """The optimizer has worked on so many bytes of host memory."""
        self._updates = (self._updates[0] + num_bytes, self._updates[1] + seconds)

    def traffic(self) -> dict[str, tuple[int, float]]:
        """(bytes, seconds busy) on each link in use since the last call."""
        all_traffic = [folder.traffic for folder in self.folders]
        now = {
            "disk read": (sum(t.read_bytes for t in all_traffic), sum(t.read_seconds for t in all_traffic)),
            "disk write": (sum(t.written_bytes for t in all_traffic), sum(t.write_seconds for t in all_traffic)),
            "host memory": self._updates,
            **self.crossings.traffic(),
        }
        before, self._traffic = self._traffic, now
        since = {
            link: (n - before.get(link, (0, 0.0))[0], t - before.get(link, (0, 0.0))[1]) for link, (n, t) in now.items()
        }
        return {link: moved for link, moved in since.items() if now[link][0]}

    @contextmanager
    def editing(self) -> Iterator[None]:
        """What is edited on disk inside becomes the truth at the end, in one commit."""
        with ExitStack() as open_folders:
            for folder in self.folders:
                open_folders.enter_context(folder.editing())
            yield

    def commit(self, step: int, facts: dict[str, Any]) -> None:
        """Make what was stored on disk since the last time durable, and the truth."""
        for folder in self.folders:
            folder.commit(step, facts)

    def close(self) -> None:
        """Let go of the folders, what is in them stays, and of memory that nobody has."""
        self.let_go()
        self._pool.clear()
        for folder in self.folders:
            folder.close()
        self._folders.clear()


def _choose(offload: Offload, stage: Stage, world: int, plans: Iterable[BucketPlan]) -> dict[str, tuple[Tier, Tier]]:
    """Bucket → its tiers. A function of the plan alone: the same on every rank."""
    optimizer, parameters = Tier.of(offload.optimizer), Tier.of(offload.parameters)
    plans = list(plans)
    trained = sum(plan.layout.numel for plan in plans if plan.trainable)
    to_keep, in_host, chosen = round((1 - offload.ratio) * trained), offload.max_in_cpu, {}
    for plan in plans:
        masters = shard = Tier.DEVICE
        if plan.trainable and optimizer is not Tier.DEVICE:
            if plan.layout.numel <= to_keep:
                to_keep -= plan.layout.numel
            else:
                masters = optimizer
        if stage.shards_parameters and not plan.persistent:
            shard = parameters
            if parameters is Tier.DISK and plan.layout.slice_numel <= in_host:
                in_host -= plan.layout.slice_numel
                shard = Tier.HOST
        chosen[plan.name] = (masters, shard)
    return chosen
