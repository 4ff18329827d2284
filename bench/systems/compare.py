"""Step time and memory of every system at every ZeRO stage, in turns, beside each other.

    python -m bench.systems.compare --peer-python VENV/bin/python [--rounds 3] [--only deepspeed tritonspeed]

VENV is what bench/peers/setup.sh makes. Every round runs every entry once, each round starting with another, each run
waiting first for an idle machine and repeated when others took it meanwhile; the step time is the median over all
undisturbed rounds' steps. Memory comes from one more run per entry, under the storage counter. The table lists first
the shapes and stages where a peer wins.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, device_name, machine
from bench.systems.launch import OURS, QUIET_CORES, RunFailed, python_for, quiet_run, run
from bench.systems.model import SHAPES

MIB = 2**20
GOALS = {"communication-heavy": 0.5, "compute-heavy": 0.7}  # ours ÷ the best peer of the same stage


@dataclass(frozen=True)
class Entry:
    """A system at a stage, with the settings that were fastest for it."""

    system: str
    stage: int
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.system} {self.stage}" + (f" ({self.variant})" if self.variant else "")


ENTRIES = (
    Entry("ddp", 0),
    Entry("ddp", 0, "autocast"),
    Entry("ddp", 1),
    Entry("deepspeed", 1, "small-buckets"),
    Entry("fsdp2", 2),
    Entry("deepspeed", 2, "small-buckets"),
    Entry("fsdp2", 3),
    Entry("deepspeed", 3, "small-buckets"),
    Entry(OURS, 0),
    Entry(OURS, 1),
    Entry(OURS, 2),
    Entry(OURS, 3),
)


@dataclass
class Row:
    """One entry on one shape: bytes of the larger rank, times of the undisturbed runs, if there are any."""

    shape: str
    entry: str
    system: str
    stage: int
    median_s: float
    best_s: float
    disturbed: bool
    steps_s: list[list[float]]
    others_cores: list[float]
    storage_peak_bytes: int
    resident_peak_bytes: int
    losses: list[float]


def arguments_for(entry: Entry, shape: str, steps: int) -> list[str]:
    """run_one's command line for one entry."""
    return [
        "--system",
        entry.system,
        "--stage",
        str(entry.stage),
        "--variant",
        entry.variant,
        "--shape",
        shape,
        "--steps",
        str(steps),
    ]


def measure(
    shape: str, entries: Sequence[Entry], rounds: int, steps: int, peer_python: str | None
) -> tuple[list[Row], list[str]]:
    """Rows of one shape, and what failed; an entry that fails once is left out of the table and named."""
    runs: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in entries}
    failures: dict[Entry, str] = {}
    for round_index in range(rounds + 1):  # the last one counts bytes
        counting = round_index == rounds
        for index in range(len(entries)):
            entry = entries[(round_index + index) % len(entries)]
            if entry in failures:
                continue
            arguments = arguments_for(entry, shape, 3 if counting else steps) + (["--memory"] if counting else [])
            try:
                launch = run if counting else quiet_run
                runs[entry].append(launch(python_for(entry.system, peer_python), arguments))
            except RunFailed as error:
                failures[entry] = str(error)
            else:
                _progress(shape, entry, runs[entry][-1])
    rows = []
    for entry in entries:
        if entry not in failures:
            *timed, counted = runs[entry]
            quiet = [result for result in timed if result["others_cores"] <= QUIET_CORES]
            every = [second for result in quiet or timed for second in result["step_s"]]
            rows.append(
                Row(
                    shape=shape,
                    entry=entry.name,
                    system=entry.system,
                    stage=entry.stage,
                    median_s=statistics.median(every),
                    best_s=min(every),
                    disturbed=not quiet,
                    steps_s=[result["step_s"] for result in timed],
                    others_cores=[result["others_cores"] for result in timed],
                    storage_peak_bytes=counted["storage_peak_bytes"],
                    resident_peak_bytes=max(result["resident_peak_bytes"] for result in timed),
                    losses=timed[0]["losses"],
                )
            )
    crashed = {e: sum(r["exit_status"] != 0 for r in runs[e]) for e in entries}
    notes = [f"{shape}: {e.name}: {n} runs crashed after their result" for e, n in crashed.items() if n]
    return rows, notes + [f"{shape}: {entry.name}: {text}" for entry, text in failures.items()]


def _progress(shape: str, entry: Entry, result: dict[str, Any]) -> None:
    took = "counted" if result["step_s"] is None else f"{statistics.median(result['step_s']):.3f} s/step"
    took += f", others took {result['others_cores']:.2f} cores"
    print(f"{shape} {entry.name}: {took}", file=sys.stderr, flush=True)


def best_peer(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fastest peer of the same shape and stage."""
    peers = [r for r in rows if (r.shape, r.stage) == (row.shape, row.stage) and r.system != OURS]
    return min(peers, key=lambda r: r.median_s, default=None)


def losses(rows: Sequence[Row]) -> list[str]:
    """Every shape and stage where a peer is faster or smaller, the worst first; then where the goal is missed."""
    lost, missed = [], []
    for row in rows:
        if row.system != OURS:
            continue
        for peer in (r for r in rows if (r.shape, r.stage) == (row.shape, row.stage) and r.system != OURS):
            where = f"{row.shape}, stage {row.stage}: {peer.entry}"
            if peer.median_s < row.median_s:
                lost.append((row.median_s / peer.median_s, f"{where} {peer.median_s:.3f} s, ours {row.median_s:.3f} s"))
            if peer.storage_peak_bytes < row.storage_peak_bytes:
                ratio = row.storage_peak_bytes / peer.storage_peak_bytes
                mib = f"{peer.storage_peak_bytes / MIB:.0f} MiB, ours {row.storage_peak_bytes / MIB:.0f} MiB"
                lost.append((ratio, f"{where} {mib}"))
        peer = best_peer(row, rows)
        if peer is not None and row.median_s > GOALS[row.shape] * peer.median_s:
            ratio = row.median_s / peer.median_s
            missed.append(
                f"{row.shape}, stage {row.stage}: goal {GOALS[row.shape]} × {peer.entry}, reached {ratio:.2f}"
            )
    return [text for _, text in sorted(lost, reverse=True)] + missed


def markdown(rows: Sequence[Row], lost: Sequence[str], failures: Sequence[str]) -> str:
    """Losses, failures, then one table per shape: shapes where ours loses come first."""
    lines = ["Where a peer wins, or a goal is missed: " + ("none" if not lost else "")]
    lines += [f"- {text}" for text in lost] + [f"- failed: {text.splitlines()[0]}" for text in failures]
    shapes = sorted(
        dict.fromkeys(row.shape for row in rows), key=lambda shape: not any(t.startswith(shape) for t in lost)
    )
    for shape in shapes:
        lines += ["", f"### {shape}: {SHAPES[shape][0]} × {SHAPES[shape][1]} tokens per rank", ""]
        lines += ["| system, stage | median s/step | best | × best peer | storages MiB/rank | resident MiB/rank |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in sorted((r for r in rows if r.shape == shape), key=lambda r: (r.stage, r.median_s)):
            peer = best_peer(row, rows)
            ratio = f"{row.median_s / peer.median_s:.2f}" if peer else "-"
            memory = f"{row.storage_peak_bytes / MIB:.0f} | {row.resident_peak_bytes / MIB:.0f}"
            busy = " (machine busy)" if row.disturbed else ""
            lines.append(f"| {row.entry}{busy} | {row.median_s:.3f} | {row.best_s:.3f} | {ratio} | {memory} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of the environment that has DeepSpeed; without it, no DeepSpeed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each run")
    parser.add_argument("--only", nargs="+", help="these systems")
    parser.add_argument("--shapes", nargs="+", default=sorted(SHAPES), choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    parser.add_argument("--name", default="systems", help="last part of the file name")
    return parser.parse_args()


def main() -> None:
    args = parse()
    wanted = [e for e in ENTRIES if not args.only or e.system in args.only]
    entries = [e for e in wanted if e.system != "deepspeed" or args.peer_python]
    rows: list[Row] = []
    failures: list[str] = []
    for shape in args.shapes:
        some, failed = measure(shape, entries, args.rounds, args.steps, args.peer_python)
        rows += some
        failures += failed
    lost = losses(rows)
    cpu = torch.device("cpu")
    slug = "-".join("".join(c if c.isalnum() else " " for c in device_name(cpu)).split()).lower()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today().isoformat()}_{slug}_{args.name}.json"
    record = {"machine": machine(cpu), "losses": lost, "failures": failures, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(rows, lost, failures)
    path.with_suffix(".md").write_text(table)
    print(table + f"written: {path}")


if __name__ == "__main__":
    main()
