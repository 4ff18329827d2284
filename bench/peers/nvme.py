"""DeepSpeed's NVMe path on this machine: its asynchronous I/O alone, and ZeRO-3's optimizer step out of core.

    VENV/bin/python -m bench.peers.nvme wire --path FOLDER [--mib 1200]           VENV from bench/peers/setup.sh,
    VENV/bin/torchrun --nproc-per-node 1 -m bench.peers.nvme step --path FOLDER   libaio from bench/peers/libaio.sh

``wire`` reads and writes one file through ``aio_handle``, the fastest of its settings being what counts; reads go
around the page cache, and writes end in fdatasync, which DeepSpeed itself never calls. ``step`` is ``engine.step()`` of
a ZeRO-3 bf16 engine with offload_optimizer on nvme, four weights of 25 Mi elements as in bench/offload/out_of_core.py.
Its gradients are written to disk as fp32 during backward, which is not in the step's time and is given beside it.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from bench.offload.turns import in_turns
from bench.systems.launch import MARK

MI = 2**20
# block bytes, queue depth, threads: the defaults of 0.19, its documented tuned ones, and ours
WIRES = [(MI, 8, 1), (MI, 32, 1), (8 * MI, 8, 1), (8 * MI, 4, 2), (8 * MI, 4, 4), (MI, 32, 4)]
STEP_WIRE = (MI, 32, 4)


def wire(path: Path, mib: int, rounds: int, first: bool) -> dict[str, Any]:
    """MiB/s of one file of `mib` MiB each way, by setting."""
    aio = get_accelerator().create_op_builder("AsyncIOBuilder").load()
    file = path / "wire"
    turns: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for block, depth, threads in WIRES:
        handle = aio.aio_handle(block, depth, False, True, threads)
        buffer = handle.new_cpu_locked_tensor(mib * MI // 4, torch.empty(0)).fill_(1.0)
        if not file.exists():
            handle.sync_pwrite(buffer, str(file), 0)
        name = f"block {block // MI} MiB, depth {depth}, threads {threads}"
        turns[f"read: {name}"] = (_nothing, lambda h=handle, b=buffer: h.sync_pread(b, str(file), 0))
        turns[f"write: {name}"] = (_nothing, lambda h=handle, b=buffer: _write(h, b, file))
    return {"mib": mib, "turns": in_turns(turns, rounds, first)}


def _nothing() -> None:
    pass


def _write(handle: Any, buffer: Tensor, file: Path) -> None:
    handle.sync_pwrite(buffer, str(file), 0)
    descriptor = os.open(file, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.close(descriptor)


class Unit(nn.Module):
    """One weight of 25 Mi elements, and a gradient for all of it."""

    def __init__(self, num_elems: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_elems // 1024, 1024))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.linear(x, self.weight).mean()


def engine(path: Path, units: int, unit_mi: int, pipelined: bool) -> Any:
    """A ZeRO-3 engine whose optimizer lives on disk."""
    block, depth, threads = STEP_WIRE
    offload = {
        "device": "nvme",
        "nvme_path": str(path),
        "buffer_count": 16,
        "pin_memory": True,
    }  # 5 failed an assertion when pipelined
    offload |= {"pipeline_read": pipelined, "pipeline_write": pipelined}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "sub_group_size": unit_mi * MI, "offload_optimizer": offload},
        "aio": {
            "block_size": block, "queue_depth": depth, "intra_op_parallelism": threads, "single_submit": False,
            "overlap_events": True,
        },
    }  # fmt: skip
    model = nn.Sequential(*(Unit(unit_mi * MI) for _ in range(units)))
    made, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return made


def step(path: Path, rounds: int, first: bool, units: int, unit_mi: int, pipelined: bool) -> dict[str, Any]:
    """Seconds of ``engine.step()``, and of the backward that writes the gradients."""
    made = engine(path, units, unit_mi, pipelined)
    x = torch.randn(1, 1024).bfloat16()
    held: list[Tensor] = []

    def forward() -> None:
        held[:] = [made(x).float().pow(2).mean()]

    turns = {"backward": (forward, lambda: made.backward(held[0])), "step": (_nothing, made.step)}
    for _ in range(2):
        in_turns(turns, 1, False)
    ordered = {"backward": [], "step": []}
    for _ in range(rounds):  # one follows from the other: always in this order
        for name, values in in_turns(turns, 1, first).items():
            ordered[name] += values
    return {"units": units, "unit_mi": unit_mi, "pipelined": pipelined, "turns": ordered}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("wire", "step"))
    p.add_argument("--path", type=Path, required=True)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--mib", type=int, default=1200)
    p.add_argument("--units", type=int, default=4)
    p.add_argument("--unit-mi", type=int, default=25)
    p.add_argument("--pipelined", action="store_true", help="read and write under the update, as documented")
    p.add_argument("--first", action="store_true", help="turns go before everybody else's work (root)")
    a = p.parse_args()
    folder = a.path / "deepspeed-nvme"
    folder.mkdir(parents=True)
    try:
        if a.what == "wire":
            found = wire(folder, a.mib, a.rounds, a.first)
        else:
            found = step(folder, a.rounds, a.first, a.units, a.unit_mi, a.pipelined)
        print(MARK + json.dumps({"deepspeed": deepspeed.__version__, **found}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
