"""One rank of a group of systems: saves and loads on request, and says what it took.

    python -m bench.checkpoint.rank GROUP --blocks 8 --width 1024 --folder FOLDER      (torchrun's variables are set)

`bench_checkpoint` starts these, one for each rank, under the interpreter that has the systems. Requests are lines of
JSON, ``{"way": "save" | "load", "system": NAME, "folder": PATH}``; answers are lines of JSON behind a mark.

Peak memory is the process's high-water mark of resident memory (VmHWM, which the kernel starts again on request).
Saving is charged with all beyond what was there before anything was saved, loading with what comes on top of what is
there when it begins. Mapped files count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.checkpoint.state import Size
from bench.systems.launch import MARK

GROUPS = {
    "torch": "bench.checkpoint.systems",
    "deepspeed": "bench.checkpoint.deepspeed_peer",
    "ours": "bench.checkpoint.ours",
    "ours-async": "bench.checkpoint.ours",  # of its own: it keeps the memory of a snapshot for the next one
    "ours-disk": "bench.checkpoint.ours",
}
KIB = 1024


def resident_bytes(what: str) -> int:
    """``VmRSS``, resident now, or ``VmHWM``, the most since it was last asked to start again."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"the kernel does not say {what}")


def give_back() -> None:
    """Freed memory goes to the system, and the high-water mark starts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def sync_files(folder: Path, rank: int, world: int) -> None:
    """Make every file below the folder, and the folders, survive a power cut; the ranks share the work."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_dir())
    for path in [folder, *paths][rank::world]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_pages(folder: Path) -> None:
    """Nothing of the files is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Ranks:
    """This rank's systems and what they are asked to do."""

    def __init__(self, systems: dict[str, Any]) -> None:
        self.systems, self.rank, self.world = systems, dist.get_rank(), dist.get_world_size()
        give_back()
        self.baseline = resident_bytes("VmRSS")

    def save(self, system: Any, folder: Path) -> dict[str, float]:
        start = time.perf_counter()
        system.save(folder)
        stall = time.perf_counter() - start
        system.finish()
        complete = time.perf_counter() - start
        peak = resident_bytes("VmHWM") - self.baseline
        sync = 0.0
        if not system.is_durable:
            dist.barrier()  # the slowest rank's files too
            start = time.perf_counter()
            sync_files(folder, self.rank, self.world)
            sync = time.perf_counter() - start
        return {"stall_s": stall, "complete_s": complete, "sync_s": sync, "peak_bytes": peak}

    def load(self, system: Any, folder: Path) -> dict[str, float]:
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        system.load(folder)
        seconds = time.perf_counter() - start
        return {"load_s": seconds, "load_peak_bytes": resident_bytes("VmHWM") - before}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; the state is of value 3 when it is saved, and again after it was loaded."""
        system, folder = self.systems[request["system"]], Path(request["folder"])
        is_save = request["way"] == "save"
        system.fill(3.0 if is_save else 5.0)
        drop_pages(folder)
        give_back()
        self.baseline = min(self.baseline, resident_bytes("VmRSS"))  # what was left from starting may have gone
        dist.barrier()
        answer = (self.save if is_save else self.load)(system, folder)
        if system.held() != (3.0, 3.0):
            raise RuntimeError(f"{request}: the state holds {system.held()}, 3 was saved")
        return {**answer, "synced": system.synced}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("group", choices=list(GROUPS))
    p.add_argument("--blocks", type=int, required=True)
    p.add_argument("--width", type=int, required=True)
    p.add_argument("--folder", type=Path, required=True, help="for what a system keeps on disk beside checkpoints")
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    module = importlib.import_module(GROUPS[a.group])
    systems = module.make(Size(a.blocks, a.width), a.folder / a.group)
    ranks = Ranks(systems)
    print(MARK + json.dumps({"systems": list(systems), "resident_bytes": ranks.baseline}), flush=True)
    for line in sys.stdin:
        print("\n" + MARK + json.dumps(ranks.answer(json.loads(line))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
