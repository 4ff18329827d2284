"""One setting of the disk tier: AdamW whose masters and moments are on disk, and the bound of the same bytes.

    python -m bench.offload.out_of_core --path FOLDER [--tile-mi 4 --buffers 4 --block-mi 8 --depth 4] [--rounds 9]

Everything runs in one process, in turns, each round beginning with another:

    step            ``optimizer.step()`` with everything on disk: norm, update, store, fdatasync, commit
    read, write     the step's bytes alone, in the same files, requests, tiles and buffers; write ends in fdatasync
    read ‖ write    both at once, each with buffers of its own: the I/O bound
    compute         the same step with masters and moments in memory
    mmap            the naive way: shared maps of files updated in place by the same kernel, then fsync; cold

Prints one line of JSON: seconds of every turn, and the cores that others took meanwhile. Gradients are random bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonspeed as ts
from bench.offload.turns import in_turns
from bench.systems.launch import MARK
from tritonspeed import comm
from tritonspeed.kernels import adamw_
from tritonspeed.kernels.host_step import host_step
from tritonspeed.offload.commit_record import read_record
from tritonspeed.offload.direct import DirectFile, Pool, Requested
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import read_header

MI = 2**20
KINDS = ("master", "exp_avg", "exp_avg_sq")
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Setting:
    """What is varied, and the size of the problem.

    Attributes:
        tile_mi, buffers: elements of a tile (Mi), tiles in memory at once.
        block_mi, depth, threads: bytes of a request (MiB), requests under way, threads.
        units, unit_mi: buckets, and elements of each (Mi).
    """

    tile_mi: float = 4.0
    buffers: int = 4
    block_mi: float = 8.0
    depth: int = 4
    threads: int = 2
    units: int = 4
    unit_mi: int = 25

    @property
    def requests(self) -> ts.offload.Requests:
        return ts.offload.Requests(int(self.block_mi * MI), self.depth, self.threads)

    @property
    def tile_elems(self) -> int:
        return int(self.tile_mi * MI)


class Unit(nn.Module):
    """One weight of a bucket's size."""

    def __init__(self, num_elems: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_elems // 1024, 1024))

    def forward(self, x: Tensor) -> Tensor:
        return x


def sharded(setting: Setting, tier: str, path: Path) -> Any:
    """The optimizer of a model of that many units, masters and moments in a tier."""
    model = nn.Sequential(*(Unit(setting.unit_mi * MI) for _ in range(setting.units)))
    offload = ts.Offload(
        optimizer=tier,
        parameters="cpu",
        path=path,
        tile_elems=setting.tile_elems,
        buffers=setting.buffers,
        overlap=False,
        requests=setting.requests,
    )
    adamw = ts.optim.AdamW(model.parameters(), **HYPER)
    _, optimizer = ts.zero.shard(model, adamw, 3, "bf16", offload=offload)
    return optimizer


class Stepped:
    """A sharded optimizer, and gradients for it."""

    def __init__(self, setting: Setting, tier: str, path: Path, gradient: Tensor) -> None:
        self.optimizer, self.gradient = sharded(setting, tier, path), gradient

    def prepare(self) -> None:
        for bucket in self.optimizer.buckets:
            if bucket.layout.numel == self.gradient.numel():
                bucket.grad, bucket.has_grad = self.gradient.clone(), True

    def step(self) -> None:
        self.optimizer.step()


class Wire:
    """The step's bytes without the step: reads what it reads, and writes as much into files as long as it writes."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.pool = setting, Pool(setting.requests)
        record = read_record(folder)
        self.sources = [self._open(folder / flat.file) for flat in record.flats]
        other = [flat.file.replace(f".{flat.slot}.", f".{1 - flat.slot}.") for flat in record.flats]
        self.targets = [self._open(folder / name) for name in other]  # the slots that the next step overwrites
        longest = min(setting.tile_elems, setting.unit_mi * MI)
        self.buffers = [
            [[host_empty(longest, torch.float32).zero_() for _ in KINDS] for _ in range(setting.buffers)]
            for _ in range(2)
        ]

    def _open(self, path: Path) -> DirectFile:
        file, begin = read_header(path)
        return DirectFile(path, self.pool, begin, file.flat_bytes)

    def tiles(self, files: Sequence[DirectFile]) -> list[list[tuple[DirectFile, int, int]]]:
        """(file, first byte, elements) of every tensor of every tile, in the step's order."""
        step, found = self.setting.tile_elems, []
        per_unit = [files[i : i + len(KINDS)] for i in range(0, len(files), len(KINDS))]
        for unit in per_unit:
            numel = unit[0].num_bytes // 4
            for lo in range(0, numel, step):
                found.append([(file, 4 * lo, min(step, numel - lo)) for file in unit])
        return found

    def run(self, reads: bool, writes: bool) -> None:
        """Tile after tile, each way with so many under way as there are buffers; writes end in fdatasync."""
        both = [("read", self.sources, 0, reads), ("write", self.targets, 1, writes)]
        ways = [(way, files, side) for way, files, side, on in both if on]
        queues: list[deque[list[Requested]]] = [deque() for _ in ways]
        tiles = [self.tiles(files) for _, files, _ in ways]
        for number in range(len(tiles[0])):
            for (way, _, side), queue, all_tiles in zip(ways, queues, tiles, strict=True):
                if len(queue) == self.setting.buffers:
                    wait(queue.popleft())
                held = self.buffers[side][number % self.setting.buffers]
                queue.append(
                    [
                        getattr(file, way)(at, place[:numel])
                        for (file, at, numel), place in zip(all_tiles[number], held, strict=True)
                    ]
                )
        for queue in queues:
            for requests in queue:
                wait(requests)
        if writes:
            wait([file.sync() for file in self.targets])

    def close(self) -> None:
        self.pool.close()
        for file in (*self.sources, *self.targets):
            file.close()


def wait(requests: Sequence[Requested]) -> None:
    """For all of them."""
    for request in requests:
        request.wait()


class SharedMaps:
    """What people write first: ``torch.from_file(shared=True)``, updated in place, then fsync."""

    def __init__(self, setting: Setting, folder: Path, gradient: Tensor) -> None:
        folder.mkdir()
        self.setting, self.gradient, self.number = setting, gradient, 0
        self.paths = [[folder / f"{unit}.{kind}" for kind in KINDS] for unit in range(setting.units)]
        zeros = torch.zeros(gradient.numel())
        for paths in self.paths:
            for path in paths:
                zeros.numpy().tofile(path)
        self.prepare()

    def prepare(self) -> None:
        """Out of the page cache: a model larger than memory finds nothing there."""
        for path in (path for paths in self.paths for path in paths):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def step(self) -> None:
        self.number += 1
        n = self.gradient.numel()
        copy, scale = torch.empty(n, dtype=torch.bfloat16), torch.ones(())
        for paths in self.paths:
            master, m, v = (torch.from_file(str(path), shared=True, size=n) for path in paths)
            for lo in range(0, n, MI):
                part = slice(lo, lo + MI)
                adamw_(
                    master[part], m[part], v[part], self.gradient[part], grad_scale=scale, param_out=copy[part],
                    step=self.number, **HYPER,
                )  # fmt: skip
            del master, m, v
        for path in (path for paths in self.paths for path in paths):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def measure(setting: Setting, path: Path, rounds: int, only: Sequence[str] | None, first: bool) -> dict[str, Any]:
    """Every turn's figures by variant."""
    folder = path / "out-of-core"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    gradient = torch.randn(setting.unit_mi * MI).bfloat16()
    on_disk = Stepped(setting, "nvme", folder, gradient)
    for _ in range(2):  # the first makes the moments, and their files
        on_disk.prepare()
        on_disk.step()
    homes = on_disk.optimizer.homes
    here = next(iter(homes.folders)).folder
    turns: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {"step": (on_disk.prepare, on_disk.step)}

    def wired(reads: bool, writes: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        held: list[Wire] = []

        def prepare() -> None:  # slots change with every step
            held[:] = [Wire(setting, here)]

        def run() -> None:
            held[0].run(reads, writes)

        return prepare, run

    turns |= {"read": wired(True, False), "write": wired(False, True), "read ‖ write": wired(True, True)}
    if only is None or "compute" in only:
        resident = Stepped(setting, "cpu", folder, gradient)
        resident.prepare()
        resident.step()
        turns["compute"] = (resident.prepare, resident.step)
    if only is None or "mmap" in only:
        maps = SharedMaps(setting, folder / "maps", gradient)
        turns["mmap"] = (maps.prepare, maps.step)
    asked = {name: turn for name, turn in turns.items() if only is None or name in only}
    return {"setting": vars(setting), "host_step": host_step(), "turns": in_turns(asked, rounds, first)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", type=Path, required=True, help="folder on the disk; needs 40 bytes an element")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--only", nargs="*", help="variants; default: all")
    p.add_argument("--first", action="store_true", help="turns go before everybody else's work (root)")
    for name, default in vars(Setting()).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = p.parse_args()
    setting = Setting(**{name: getattr(arguments, name) for name in vars(Setting())})
    comm.init_distributed()
    arguments.path.mkdir(parents=True, exist_ok=True)
    try:
        print(MARK + json.dumps(measure(setting, arguments.path, arguments.rounds, arguments.only, arguments.first)))
    finally:
        shutil.rmtree(arguments.path / "out-of-core", ignore_errors=True)


if __name__ == "__main__":
    main()
