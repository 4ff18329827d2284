"""What is offloaded and how, as one value: ``ts.Offload``, or the offload blocks of a ds_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritonspeed.offload.tiers import Tier

if TYPE_CHECKING:
    from tritonspeed.config import Config

# 16 MiB of each fp32 tensor: a ring of four takes 192 MiB. From 1 to 8 Mi, a step on disk took the same time, but for
# noise.
TILE_ELEMS = 4 * 2**20
MIN_TILE_ELEMS = 16384  # four pages of bytes: room to end a tile where no chunk is left too small for 8-bit moments


@dataclass(frozen=True)
class Requests:
    """How files are read and written: the larger of depth and threads are under way at once, each in a thread.

    1 GiB cold, MiB/s read and written durably, medians of 9 rounds in turns on a shared virtual disk (2 cores):
    8 MiB × 4 took 4,548 and 10,196, × 1 2,919 and 6,572; fio's best setting, in large pages, 4,112 and 7,111; a map
    2,541 and 1,019. In 25 paired rounds no other setting beat 8 MiB × 4 by more than 7 % read and 1 % written; requests
    of 1 MiB lost a third and more.

    Attributes:
        block_bytes: of one request; a multiple of 4,096.
        depth: requests under way at once.
        threads: that carry them out.
    """

    block_bytes: int = 8 * 2**20
    depth: int = 4
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("block_bytes", "depth", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"Requests: {name} is {getattr(self, name)}, must be at least 1")


@dataclass(frozen=True)
class Offload:
    """Where masters, moments and parameter shards live while they are not in use.

    Attributes:
        optimizer: tier of masters and moments, and so where the optimizer runs: "none", "cpu" or "nvme".
        parameters: tier of the parameter shards of stage 3.
        path: folder of the files, where a tier is "nvme".
        parameters_path: folder of the parameters' files; None is ``path``.
        ratio: fraction of masters and moments that is offloaded, in whole buckets.
        pin_memory: page-lock host memory, where a GPU reads it.
        buffers: tiles of masters and moments in memory at once, where they are on disk. Of what the disk allows, an
            AdamW step reached 72 % with 2, 86 % with 3, 83 to 99 % with 4, and no more with 6.
        parameter_buffers, parameter_buffer_elems: reading ahead holds at most so many buffers of so many elements; one
            unit always may.
        max_in_cpu: parameter elements that stay in host memory, where the rest is on disk.
        tile_elems: elements that are fetched, updated and stored together; a multiple of 4,096, at
            least 16,384.
        overlap: update under the next forward, where parameters are sharded (stage 3); None does so where the
            optimizer's part is on disk, or runs on the host of a GPU.
        requests: sizes and numbers of disk requests.

    Example:
        >>> ts.zero.shard(model, optimizer, stage=3, offload=ts.Offload(optimizer="nvme", path="/nvme"))
    """

    optimizer: str | Tier = Tier.DEVICE
    parameters: str | Tier = Tier.DEVICE
    path: str | Path | None = None
    parameters_path: str | Path | None = None
    ratio: float = 1.0
    pin_memory: bool = True
    buffers: int = 4
    parameter_buffers: int = 5
    parameter_buffer_elems: int = 100_000_000
    max_in_cpu: int = 1_000_000_000
    tile_elems: int = TILE_ELEMS
    overlap: bool | None = None
    requests: Requests = field(default_factory=Requests)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", Tier.of(self.optimizer))
        object.__setattr__(self, "parameters", Tier.of(self.parameters))
        if Tier.DISK in (self.optimizer, self.parameters) and self.path is None and self.parameters_path is None:
            raise ValueError("Offload: a tier is nvme and path is None: name a folder on the disk, path='/nvme'")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"Offload: ratio is {self.ratio}, must be from 0 to 1")
        if self.buffers < 1 or self.parameter_buffers < 1:
            raise ValueError(f"Offload: {self.buffers} and {self.parameter_buffers} buffers, must be at least 1 each")
        if self.tile_elems < MIN_TILE_ELEMS or self.tile_elems % 4096:
            raise ValueError(
                f"Offload: tile_elems is {self.tile_elems}, must be a multiple of 4096, at least {MIN_TILE_ELEMS}"
            )

    @classmethod
    def from_config(cls, config: Config) -> Offload:
        """What a resolved config asks for."""
        optimizer, parameters = config.zero_optimization.offload_optimizer, config.zero_optimization.offload_param
        aio, pins = config.aio, [block.pin_memory for block in (optimizer, parameters) if block.device != "none"]
        return cls(
            optimizer=Tier.of(optimizer.device),
            parameters=Tier.of(parameters.device),
            path=optimizer.nvme_path or parameters.nvme_path,
            parameters_path=parameters.nvme_path or optimizer.nvme_path,
            ratio=optimizer.ratio,
            pin_memory=all(pins),  # who forbids it for one has no locked memory to spare for the other
            buffers=max(1, optimizer.buffer_count),
            parameter_buffers=max(1, parameters.buffer_count),
            parameter_buffer_elems=parameters.buffer_size,
            max_in_cpu=parameters.max_in_cpu,
            requests=Requests(int(aio.block_size), int(aio.queue_depth), int(aio.intra_op_parallelism)),
        )
