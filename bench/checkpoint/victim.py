"""Saves over its own last checkpoint until it is killed, again and again; then somebody else tries to load.

    python -m bench.checkpoint.victim GROUP --kills 24 --folder FOLDER

`bench_kills` starts it under the interpreter that has the group's systems. One process imports what is needed; each
victim and each reader is a fork of it: one rank, a state of 3 M parameters, the same folder and name every time. The
state holds one number, which grows from save to save and is told to the parent when a save has returned (when its
background work has ended, too). Prints a line of JSON for each system.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.checkpoint.rank import GROUPS
from bench.checkpoint.state import Size
from bench.systems.launch import MARK

MOST = 250  # numbers that bf16 has exactly
LIMIT_S = 60


def forked(work: Callable[[int], object], said: Path) -> tuple[int, int]:
    """(process id, descriptor to read from): a child that runs ``work(descriptor to write to)`` and ends."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(writing)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
    raise AssertionError("a child that has ended goes no further")


def made(group: str, system: str, size: Size, folder: Path) -> Any:
    """A system in this process, alone in its process group."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return importlib.import_module(GROUPS[group]).make(size, folder / group)[system]


def next_one(descriptor: int) -> bytes:
    """The next byte of a child; nothing where it ended or takes too long."""
    ready, _, _ = select.select([descriptor], [], [], LIMIT_S)
    return os.read(descriptor, 1) if ready else b""


class Trial:
    """One system and its kills."""

    def __init__(self, group: str, system: str, size: Size, folder: Path) -> None:
        self.group, self.system, self.size, self.folder = group, system, size, folder
        self.checkpoint, self.said = folder / "checkpoint", folder / "said.txt"

    def _save_on(self, value: int) -> Callable[[int], None]:
        def work(writing: int) -> None:
            system, number = made(self.group, self.system, self.size, self.folder), value
            while True:
                number = number % MOST + 1
                system.fill(float(number))
                system.save(self.checkpoint)
                system.finish()
                os.write(writing, bytes([number]))

        return work

    def _load(self, writing: int) -> None:
        system = made(self.group, self.system, self.size, self.folder)
        system.fill(0.0)
        system.load(self.checkpoint)
        low, high = system.held()
        os.write(writing, bytes([int(low), int(high)]))

    def kill(self, value: int, moment: float) -> tuple[str, int]:
        """(verdict, the number that is there now): killed at that part of a save."""
        self.checkpoint.mkdir(exist_ok=True)
        child, reading = forked(self._save_on(value), self.said)
        times, acknowledged = [], 0
        for _ in range(3):  # the first one makes up for what the last victim left
            told = next_one(reading)
            if not told:
                raise RuntimeError(f"{self.system} does not save: {self.said.read_text()[-2000:]}")
            acknowledged = told[0]
            times.append(time.monotonic())
        time.sleep(moment * (times[-1] - times[-2]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while told := next_one(reading):
            acknowledged = told[0]
        os.close(reading)
        child, reading = forked(self._load, self.said)
        found = next_one(reading) + next_one(reading)
        os.close(reading)
        os.waitpid(child, 0)
        if len(found) < 2:
            shutil.rmtree(self.checkpoint)
            return "unloadable", acknowledged
        if found[0] != found[1]:
            return "torn", acknowledged
        return ("good" if found[0] in (acknowledged, acknowledged % MOST + 1) else "older"), found[0]


def trials(group: str, system: str, size: Size, folder: Path, kills: int) -> dict[str, Any]:
    """Verdicts over all kills, and what the last failure said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trial, value, dice = Trial(group, system, size, folder), 0, random.Random(0)
    counts, said = {"good": 0, "unloadable": 0, "torn": 0, "older": 0}, ""
    for _ in range(kills):
        verdict, value = trial.kill(value, 1.1 * dice.random())
        counts[verdict] += 1
        if verdict == "unloadable":
            said = trial.said.read_text().strip().splitlines()[-1][:100]
    shutil.rmtree(folder)
    return {"system": system, "kills": kills, **counts, "said": said.replace(str(folder), "FOLDER")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("group", choices=list(GROUPS))
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--kills", type=int, default=24)
    p.add_argument("--blocks", type=int, default=1)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--systems", nargs="+", required=True)
    a = p.parse_args()
    importlib.import_module(GROUPS[a.group])  # once, for all forks
    for system in a.systems:
        row = trials(a.group, system, Size(a.blocks, a.width), a.folder / "kills", a.kills)
        print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
