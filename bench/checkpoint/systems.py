"""Peers that need torch and safetensors alone, and the roof: what the disk takes of as many bytes.

A system saves into a folder that is new, or overwrites what it wrote there before. `save` returns when training may go
on, `finish` when nothing is left to do in the background.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.checkpoint.state import Size, local_state

MI = 2**20
RAW, RAW_BLOCK_BYTES, RAW_DEPTH = "raw: O_DIRECT 8 MiB × 4, fdatasync", 8 * MI, 4


class System(Protocol):
    """One way to save and load.

    Attributes:
        synced: what it does by itself so that a power cut does not undo a save that has returned.
        is_durable: that is enough.
    """

    synced: str
    is_durable: bool

    def save(self, folder: Path) -> None: ...

    def finish(self) -> None: ...

    def load(self, folder: Path) -> None: ...

    def fill(self, value: float) -> None:
        """Put that number everywhere; whole numbers up to 256, which bf16 has exactly."""
        ...

    def held(self) -> tuple[float, float]:
        """Least and greatest number that is anywhere."""
        ...


class Held:
    """A system on a state of its own."""

    synced, is_durable = "no", False

    def __init__(self, state: dict[str, dict[str, Tensor]], rank: int) -> None:
        self.state, self.rank = state, rank

    def finish(self) -> None: ...

    def tensors(self) -> Iterator[Tensor]:
        for tensors in self.state.values():
            yield from tensors.values()

    def fill(self, value: float) -> None:
        for tensor in self.tensors():
            tensor.fill_(value)

    def held(self) -> tuple[float, float]:
        bounds = [tensor.aminmax() for tensor in self.tensors()]
        return min(low.item() for low, _ in bounds), max(high.item() for _, high in bounds)

    def take(self, loaded: dict[str, dict[str, Tensor]]) -> None:
        """Copy what was read into the state that training uses."""
        for kind, tensors in self.state.items():
            for name, tensor in tensors.items():
                tensor.copy_(loaded[kind][name])


class TorchSave(Held):
    """One pickle for each rank."""

    def save(self, folder: Path) -> None:
        torch.save(self.state, folder / f"rank{self.rank}.pt")

    def load(self, folder: Path) -> None:
        self.take(torch.load(folder / f"rank{self.rank}.pt", weights_only=True))


class Safetensors(Held):
    """One safetensors file for each rank."""

    def save(self, folder: Path) -> None:
        named = {f"{kind}.{name}": tensor for kind, tensors in self.state.items() for name, tensor in tensors.items()}
        save_file(named, folder / f"rank{self.rank}.safetensors")

    def load(self, folder: Path) -> None:
        loaded = load_file(folder / f"rank{self.rank}.safetensors")
        self.take({kind: {n: loaded[f"{kind}.{n}"] for n in tensors} for kind, tensors in self.state.items()})


class Dcp(Held):
    """torch's distributed checkpoint, of sharded tensors."""

    synced = "files, before the stream's last bytes; no folder"

    def __init__(self, state: dict[str, dict[str, Tensor]], rank: int, world: int) -> None:
        super().__init__(state, rank)
        mesh = init_device_mesh("cpu", (world,))
        self.sharded: dict[str, Any] = {
            kind: {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
            for kind, tensors in state.items()
        }

    def save(self, folder: Path) -> None:
        dcp.save(self.sharded, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        dcp.load(self.sharded, checkpoint_id=folder)


class DcpAsync(Dcp):
    """The same behind training's back: the state is copied, then written by a thread."""

    future: Any = None

    def save(self, folder: Path) -> None:
        self.future = dcp.async_save(self.sharded, checkpoint_id=folder)

    def finish(self) -> None:
        self.future.result()


class Raw:
    """As many bytes to one new file for each rank, and back: reserved, around the page cache, in large requests."""

    synced, is_durable = "fdatasync", True

    def __init__(self, num_bytes: int, rank: int) -> None:
        num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.values, self.rank = torch.frombuffer(memory, dtype=torch.uint8).fill_(1), rank
        self.view = memoryview(memory)
        self.threads = ThreadPoolExecutor(RAW_DEPTH)

    def save(self, folder: Path) -> None:
        descriptor = os.open(folder / f"rank{self.rank}", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
        os.posix_fallocate(descriptor, 0, len(self.view))
        self._move(os.pwritev, descriptor)
        os.fdatasync(descriptor)
        os.close(descriptor)

    def finish(self) -> None: ...

    def load(self, folder: Path) -> None:
        descriptor = os.open(folder / f"rank{self.rank}", os.O_RDONLY | os.O_DIRECT)
        self._move(os.preadv, descriptor)
        os.close(descriptor)

    def _move(self, call: Any, descriptor: int) -> None:
        def block(lo: int) -> None:
            hi = min(lo + RAW_BLOCK_BYTES, len(self.view))
            while lo < hi:
                lo += call(descriptor, [self.view[lo:hi]], lo)

        started: list[Future[None]] = [
            self.threads.submit(block, lo) for lo in range(0, len(self.view), RAW_BLOCK_BYTES)
        ]
        for future in started:
            future.result()

    def fill(self, value: float) -> None:
        self.values.fill_(int(value))

    def held(self) -> tuple[float, float]:
        low, high = self.values.aminmax()
        return low.item(), high.item()


def make(size: Size, folder: Path) -> dict[str, System]:
    """Name → system, for this rank of the process group that stands; all save the same state."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state = local_state(size, rank, world)
    return {
        RAW: Raw(size.state_bytes // world, rank),
        "torch.save": TorchSave(state, rank),
        "safetensors save_file": Safetensors(state, rank),
        "torch DCP": Dcp(state, rank, world),
        "torch DCP async": DcpAsync(state, rank, world),
    }
