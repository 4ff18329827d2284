"""A training state saved and loaded: ours, torch.save, DCP, safetensors and DeepSpeed, against the bare disk.

    python -m bench.checkpoint.bench_checkpoint --path FOLDER --peer-python VENV/bin/python [--rounds 3] [--blocks 8]

FOLDER is on the disk that is measured and needs some 6 GB; VENV is what bench/peers/setup.sh makes (without it
DeepSpeed is left out). It takes 6 minutes and 12 GB of memory. On a busy machine begin with setsid, and give --first
(root). bench/checkpoint/bench_kills.py fills in the column of kills.

The state is AdamW's of a transformer of 100 M parameters by default, 1.3 GiB; every rank has its own part. In each
round every system saves into a new folder, which is then read back with a cold page cache; each round begins with
another system, and nobody has anything to write when a turn starts. Columns:

    stall       seconds for which training is blocked: the call itself
    durable     seconds until the checkpoint survives a power cut: the call, the background work and, unless a system
                has done all that itself, a sync of every file and folder
    of raw      bytes on disk a second until durable, against the bare disk's in the same round
    memory      the most that was resident while saving or loading, beyond the state, over all ranks
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

import torch

from bench.checkpoint.state import Size
from bench.harness import RESULTS, device_name, machine
from bench.offload.turns import first_in_line
from bench.systems.launch import MARK, ROOT, RunFailed, environment, wait_until_idle

GIB, MIB = 2**30, 2**20
GOAL = 85.0  # percent of raw
RAW = "raw"
OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One system at one world size; medians over the rounds.

    Attributes:
        percent_of_raw: of the bare disk's rate, each round against its own.
        memory_bytes, load_memory_bytes: beyond the state, all ranks together.
        synced: what the system does for durability by itself.
    """

    world: int
    system: str
    stall_s: float
    complete_s: float
    durable_s: float
    mib_per_s: float
    percent_of_raw: float
    disk_bytes: int
    memory_bytes: int
    load_s: float
    load_memory_bytes: int
    synced: str

    @property
    def is_ours(self) -> bool:
        return self.system.startswith(OURS)


class Group:
    """The ranks of one group of systems, waiting for requests.

    Args:
        folder: for what they keep on disk beside checkpoints.
        said: gets what they write on stderr.
    """

    def __init__(self, name: str, python: str, world: int, size: Size, folder: Path, said: IO[str]) -> None:
        self.name, self.said = name, said
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [python, "-m", "bench.checkpoint.rank", name, "--folder", str(folder)]
        command += ["--blocks", str(size.blocks), "--width", str(size.width)]
        self.processes = []
        for rank in range(world):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT}
            variables["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // world)
            settings = environment(python, {k: str(v) for k, v in variables.items()})
            process = subprocess.Popen(
                command, env=settings, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
            self.processes.append(process)
        self.systems: list[str] = []

    def wait_until_ready(self) -> None:
        """Until the ranks have made their state."""
        self.systems = self._answers()[0]["systems"]

    def ask(self, way: str, system: str, folder: Path) -> list[dict[str, Any]]:
        """One request to all ranks, and their answers."""
        for process in self.processes:
            print(json.dumps({"way": way, "system": system, "folder": str(folder)}), file=_pipe(process.stdin))
            _pipe(process.stdin).flush()
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        for line in _pipe(process.stdout):
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.said.seek(0)
        raise RunFailed(f"{self.name}: a rank ended with {process.wait()}\n{self.said.read()[-3000:]}")

    def stop(self) -> None:
        """End the ranks: their input ends."""
        for process in self.processes:
            _pipe(process.stdin).close()
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "started with pipes"
    return stream


@contextmanager
def started(pythons: Mapping[str, str], world: int, size: Size, folder: Path) -> Iterator[list[Group]]:
    """Groups, each under its interpreter, that are ready."""
    groups: list[Group] = []
    with ExitStack() as stack:
        for name, python in pythons.items():
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            groups.append(Group(name, python, world, size, folder, said))
            stack.callback(groups[-1].stop)
        for group in groups:
            group.wait_until_ready()
        yield groups


def bytes_below(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def turn(group: Group, system: str, folder: Path) -> dict[str, Any]:
    """One save and one load; the slowest rank's seconds, everybody's memory."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    saved = group.ask("save", system, folder)
    disk_bytes = bytes_below(folder)
    loaded = group.ask("load", system, folder)
    shutil.rmtree(folder)
    return {
        "stall_s": max(a["stall_s"] for a in saved),
        "complete_s": max(a["complete_s"] for a in saved),
        "durable_s": max(a["complete_s"] for a in saved) + max(a["sync_s"] for a in saved),
        "memory_bytes": sum(a["peak_bytes"] for a in saved),
        "load_s": max(a["load_s"] for a in loaded),
        "load_memory_bytes": sum(a["load_peak_bytes"] for a in loaded),
        "disk_bytes": disk_bytes,
        "synced": saved[0]["synced"],
    }


def measured(groups: list[Group], path: Path, rounds: int, limit_s: float) -> dict[str, list[dict[str, Any]]]:
    """System → its turns, in rounds that begin with another one each time; a first round is not counted.

    Args:
        limit_s: no round begins that would end later, judging by the last; one is always counted.
    """
    everyone = [(group, system) for group in groups for system in group.systems]
    taken: dict[str, list[dict[str, Any]]] = {system: [] for _, system in everyone}
    until, took = time.monotonic() + limit_s, 0.0
    for number in range(-1, rounds):
        start = time.monotonic()
        if number > 0 and start + took > until:
            print(f"the time is up: {number} rounds of {rounds}", file=sys.stderr)
            break
        at = number % len(everyone)
        for group, system in everyone[at:] + everyone[:at]:
            found = turn(group, system, path / "checkpoint")
            if number >= 0:
                taken[system].append(found)
        took = time.monotonic() - start
        print(f"{len(groups[0].processes)} ranks: round {number + 1}, {took:.0f} s", file=sys.stderr, flush=True)
    return taken


def rows_of(world: int, taken: Mapping[str, list[dict[str, Any]]]) -> list[Row]:
    """Medians; the share of the raw rate is taken round by round, where both had the same disk."""
    raw = next(system for system in taken if system.startswith(RAW))
    rates = {name: [t["disk_bytes"] / t["durable_s"] for t in turns] for name, turns in taken.items()}
    rows = []
    for name, turns in taken.items():

        def median(key: str, turns: list[dict[str, Any]] = turns) -> Any:
            return statistics.median(t[key] for t in turns)

        shares = [mine / bare for mine, bare in zip(rates[name], rates[raw], strict=True)]
        rows.append(
            Row(
                world=world,
                system=name,
                stall_s=median("stall_s"),
                complete_s=median("complete_s"),
                durable_s=median("durable_s"),
                mib_per_s=statistics.median(rates[name]) / MIB,
                percent_of_raw=100 * statistics.median(shares),
                disk_bytes=int(median("disk_bytes")),
                memory_bytes=int(median("memory_bytes")),
                load_s=median("load_s"),
                load_memory_bytes=int(median("load_memory_bytes")),
                synced=turns[0]["synced"],
            )
        )
    return rows


def misses(rows: list[Row]) -> list[str]:
    """Where a peer is ahead of ours, or the goal is missed.

    Each of ours is held against the peers of its kind: blocking against blocking, async against async.
    """
    found = []
    for mine in (row for row in rows if row.is_ours):
        where = f"{mine.world} ranks, {mine.system}"
        peers = [row for row in rows if row.world == mine.world and not row.is_ours and not row.system.startswith(RAW)]
        kind = [row for row in peers if ("async" in row.system) == ("async" in mine.system)]
        for key, unit in (("stall_s", 1.0), ("durable_s", 1.0), ("load_s", 1.0), ("memory_bytes", MIB)):
            group = kind if key in ("stall_s", "memory_bytes") else peers
            found += [
                f"{where}: {key} {getattr(mine, key) / unit:.2f}, {row.system} {getattr(row, key) / unit:.2f}"
                for row in group
                if getattr(row, key) < getattr(mine, key)
            ]
        if "links" not in mine.system and mine.percent_of_raw < GOAL:
            found.append(f"{where}: {mine.percent_of_raw:.0f} % of raw, goal {GOAL:.0f}")
    return found


def page_of(record: dict[str, Any], rows: list[Row], kills: dict[str, str]) -> str:
    """The result as a page."""
    lost = record["misses"]
    lines = ["Where a peer is ahead of ours, or a goal is missed: " + ("none" if not lost else "")]
    lines += [f"- {line}" for line in lost]
    lines += [
        "",
        f"{record['parameters'] / 1e6:.1f} M parameters, {record['state_bytes'] / GIB:.2f} GiB of state; medians.",
    ]
    lines += [f"{record['machine']}", ""]
    head = ["ranks", "system", "stall s", "durable s", "GiB on disk", "MiB/s", "% of raw", "MiB beyond the state"]
    head += ["load s", "MiB while loading", "syncs by itself", "lost in kills"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        f"| {r.world} | {r.system} | {r.stall_s:.2f} | {r.durable_s:.2f} | {r.disk_bytes / GIB:.2f}"
        f" | {r.mib_per_s:.0f} | {r.percent_of_raw:.0f} | {r.memory_bytes / MIB:.0f} | {r.load_s:.2f}"
        f" | {r.load_memory_bytes / MIB:.0f} | {r.synced} | {kills.get(r.system, '')} |"
        for r in rows
    ]
    lines += ["", "A raw disk that is virtual writes to its host's cache: read the ratios."]
    return "\n".join(lines) + "\n"


def kills_in(folder: Path) -> dict[str, str]:
    """System → "lost of killed", from the newest result of bench_kills.py."""
    found = sorted(folder.glob("*_checkpoint-kills.json"))
    rows = json.loads(found[-1].read_text())["rows"] if found else []
    return {row["system"]: f"{row['unloadable'] + row['torn'] + row['older']} of {row['kills']}" for row in rows}


def report(rows: list[Row], turns: dict[str, Any], size: Size, out: Path) -> Path:
    """JSON and a page."""
    cpu = torch.device("cpu")
    record = {"machine": machine(cpu), "parameters": size.num_parameters, "state_bytes": size.state_bytes}
    record |= {"misses": misses(rows), "rows": [asdict(row) for row in rows], "turns": turns}
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(cpu)).split()).lower()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{date.today().isoformat()}_{name}_checkpoint"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    page = page_of(record, rows, kills_in(out))
    path.with_suffix(".md").write_text(page)
    print(page)
    return path.with_suffix(".json")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", type=Path, required=True, help="a folder on the disk")
    p.add_argument("--peer-python", help="python of the environment that has DeepSpeed")
    p.add_argument("--groups", nargs="+", help="of bench/checkpoint/rank.py; default: all that can be had")
    p.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--limit-s", type=float, default=300.0, help="rounds stop in time; starting is beside")
    p.add_argument("--first", action="store_true", help="go before everybody else's work (root; start it under setsid)")
    p.add_argument("--blocks", type=int, default=8, help="12.6 M parameters each, at the default width")
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    a = p.parse_args()
    size = Size(a.blocks, a.width)
    names = a.groups or ["torch", "ours", "ours-async", "ours-disk", *(["deepspeed"] if a.peer_python else [])]
    path = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=a.path))
    rows: list[Row] = []
    turns = {}
    try:
        for world in a.worlds:
            pythons = {name: a.peer_python if name == "deepspeed" else sys.executable for name in names}
            with first_in_line(a.first), started(pythons, world, size, path) as groups:
                wait_until_idle()
                turns[str(world)] = measured(groups, path, a.rounds, a.limit_s / len(a.worlds))
            rows += rows_of(world, turns[str(world)])
    finally:
        shutil.rmtree(path, ignore_errors=True)
    report(rows, turns, size, a.out)


if __name__ == "__main__":
    main()
