"""AdamW out of core: settings of ours, each against the bound of its own bytes, shared maps, and DeepSpeed's NVMe path.

    python -m bench.offload.bench_out_of_core --path FOLDER [--peer-python VENV/bin/python --libaio FOLDER] [--first]

VENV is what bench/peers/setup.sh makes, FOLDER/env.sh what bench/peers/libaio.sh makes. Every pass runs every setting
and peer once, in a process of its own and another order; a process takes its own variants in turns
(bench/offload/out_of_core.py). Achieved is the bound's time over the step's in the same round; the table gives the
median of these ratios, and the best bound over the best step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, device_name, machine
from bench.systems.launch import MARK, ROOT

GOAL = 0.85
LIMIT_S = 240
BOUND = "read ‖ write"
BASE = {"tile_mi": 4.0, "buffers": 4, "block_mi": 8.0, "depth": 4}
SETTINGS = [
    {},
    *({"buffers": n} for n in (2, 3, 6)),
    *({"tile_mi": n} for n in (1.0, 2.0, 8.0)),
    {"tile_mi": 2.0, "buffers": 6},
    {"block_mi": 16.0},
]
PEERS = ("wire", "step", "step --pipelined")
Turns = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Job:
    """A process: what it is called, its command, and the script whose environment it needs."""

    name: str
    command: tuple[str, ...]
    environment: str | None = None


def jobs(a: argparse.Namespace) -> list[Job]:
    """Everything that a pass runs."""
    common = ["--path", str(a.path), "--rounds", str(a.rounds), *(["--first"] if a.first else [])]
    found = []
    for change in SETTINGS:
        setting = BASE | change
        flags = [x for name, value in setting.items() for x in (f"--{name.replace('_', '-')}", str(value))]
        only = ["--only", "step", BOUND] if change else []
        command = (sys.executable, "-m", "bench.offload.out_of_core", *common, *flags, *only)
        found.append(Job(_label(setting), command))
    for peer in PEERS if a.peer_python else ():
        module = ("-m", "bench.peers.nvme", *peer.split(), *common)
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "29771")
        command = (a.peer_python, *(launcher if peer != "wire" else ()), *module)
        found.append(Job(f"deepspeed {peer}", command, str(a.libaio / "env.sh") if a.libaio else None))
    return found


def _label(setting: dict[str, float]) -> str:
    tile, buffers, block, depth = setting.values()
    return f"tile {tile:g} Mi, {buffers} buffers, {block:g} MiB × {depth}"


def run(job: Job) -> dict[str, Any]:
    """The JSON that it prints, or what went wrong, under "failed"."""
    command = list(job.command)
    if job.environment:
        command = ["bash", "-c", 'source "$0" && exec "$@"', job.environment, *command]
    tools = f"{Path(job.command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    threads = str(torch.get_num_threads())  # a launcher would give one
    environment = {**os.environ, "PATH": tools, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT_S} s"}
    lines = [line[len(MARK) :] for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr[-1500:]}


def merged(results: list[dict[str, Any]]) -> Turns:
    """The turns of all passes."""
    found: Turns = {}
    for result in results:
        for name, turns in result.get("turns", {}).items():
            found.setdefault(name, []).extend(turns)
    return found


def seconds(turns: list[dict[str, float]]) -> list[float]:
    """Of every turn."""
    return [turn["seconds"] for turn in turns]


def achieved(turns: Turns) -> tuple[float, float]:
    """(median of bound ÷ step by round, best bound ÷ best step)."""
    step, bound = seconds(turns["step"]), seconds(turns[BOUND])
    return statistics.median(b / s for b, s in zip(bound, step, strict=True)), min(bound) / min(step)


def table(by_job: dict[str, Turns], num_elems: int) -> str:
    """Markdown: what is lost first, then ours by setting, then everything at the default, then DeepSpeed."""
    ours = {name: turns for name, turns in by_job.items() if BOUND in turns}
    default = by_job[_label(BASE)]
    step = statistics.median(seconds(default["step"]))
    lost = [
        f"- {name}: {median:.2f} of the bound (best over best {best:.2f}), goal {GOAL}"
        for name, (median, best) in ((name, achieved(turns)) for name, turns in ours.items())
        if median < GOAL
    ]
    rows = []
    for name, turns in sorted(ours.items(), key=lambda item: statistics.median(seconds(item[1]["step"]))):
        median, best = achieved(turns)
        rows.append(
            f"| {name} | {statistics.median(seconds(turns['step'])):.3f} | {min(seconds(turns['step'])):.3f} | "
            f"{statistics.median(seconds(turns[BOUND])):.3f} | {min(seconds(turns[BOUND])):.3f} | "
            f"{median:.2f} | {best:.2f} |"
        )
    others = []
    for job, turns in by_job.items():
        if job != _label(BASE) and BOUND in turns:
            continue
        for name, values in turns.items():
            took = seconds(values)
            own = statistics.median(turn["own_core_seconds"] for turn in values)
            who = job if job.startswith("deepspeed") else "ours"
            median = statistics.median(took)
            others.append(
                f"| {'naive: shared maps' if name == 'mmap' else who} | {name} | {median:.3f} | {min(took):.3f} | "
                f"{own:.2f} | {median / step:.2f} |"
            )
            is_peer_step = name == "mmap" or (who != "ours" and name == "step")
            if is_peer_step and median < step:
                lost.append(f"- {job} {name}: {median:.3f} s, ours {step:.3f} s")
    return "\n".join(
        [
            "Where a goal is missed, or a peer wins:" + ("" if lost else " nowhere"),
            *lost,
            "",
            f"### The step of {num_elems / 1e6:.0f} M parameters on disk, against the bound of its own bytes",
            "",
            "| setting | step s | best | bound s | best | of the bound | best / best |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"### At {_label(BASE)}, and others",
            "",
            "| who | what | median s | best s | core-seconds | × our step |",
            "|---|---|---|---|---|---|",
            *others,
            "",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", type=Path, required=True, help="folder on the disk; 4 GB are used")
    p.add_argument("--passes", type=int, default=2)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--peer-python", help="DeepSpeed's")
    p.add_argument("--libaio", type=Path)
    p.add_argument("--first", action="store_true", help="turns go before everybody else's work (root)")
    p.add_argument("--note", default="", help="what else a reader must know of the machine")
    p.add_argument("--out", type=Path, default=RESULTS)
    a = p.parse_args()
    results: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs(a)}
    for number in range(a.passes):
        todo = jobs(a)
        random.Random(number).shuffle(todo)
        for job in todo:
            found = run(job)
            results[job.name].append(found)
            medians = {name: round(statistics.median(seconds(turns)), 3) for name, turns in merged([found]).items()}
            print(job.name, medians or found, flush=True)
        if any("turns" in found for found in results[_label(BASE)]):
            write(results, a.note, a.out)


def write(results: dict[str, list[dict[str, Any]]], note: str, out: Path) -> None:
    """The table, printed too, and everything as JSON."""
    by_job = {name: merged(found) for name, found in results.items() if merged(found)}
    setting = next(found[0]["setting"] for found in results.values() if "setting" in found[0])
    text = table(by_job, setting["units"] * setting["unit_mi"] * 2**20)
    device = torch.device("cpu")
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(device)).split()).lower()
    stem = out / f"{date.today().isoformat()}_{name}_offload-disk"
    failed = {
        name: texts for name, found in results.items() if (texts := [r["failed"] for r in found if "failed" in r])
    }
    record = {"machine": machine(device), "note": note, "failed": failed, "results": results}
    stem.with_name(stem.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(f"{note}\n\n{text}" if note else text)
    print(text)


if __name__ == "__main__":
    main()
