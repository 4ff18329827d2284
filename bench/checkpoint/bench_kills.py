"""SIGKILL while a checkpoint is saved over the last one of that name: can anything be loaded afterwards?

    python -m bench.checkpoint.bench_kills --path FOLDER --peer-python VENV/bin/python [--kills 24]

One rank, 3 M parameters, 24 kills a system at moments drawn over the length of a save. After each kill a fresh process
loads. Lost are checkpoints that cannot be loaded, that mix two saves, or that are older than the last save that had
returned. VENV is what bench/peers/setup.sh makes. Nothing is timed: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, device_name, machine
from bench.systems.launch import MARK, ROOT, RunFailed, environment

SYSTEMS = {
    "ours": ["ours"],
    "ours-async": ["ours async"],
    "ours-disk": ["ours, disk tier (links)"],
    "torch": ["torch.save", "safetensors save_file", "torch DCP", "torch DCP async"],
    "deepspeed": ["DeepSpeed"],
}


def rows_of(group: str, python: str, path: Path, kills: int, limit_s: float) -> list[dict[str, Any]]:
    """What each system of a group made of its kills."""
    command = [python, "-m", "bench.checkpoint.victim", group, "--folder", str(path), "--kills", str(kills)]
    variables = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [*command, "--systems", *SYSTEMS[group]], cwd=ROOT, capture_output=True, text=True, timeout=limit_s,
        env=environment(python, variables),
    )  # fmt: skip
    rows = [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if len(rows) != len(SYSTEMS[group]):
        raise RunFailed(f"{group}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return rows


def page_of(record: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [f"SIGKILL while saving over the last checkpoint. {record['machine']}", ""]
    lines += ["| system | kills | good | unloadable | torn | older than acknowledged | the last error |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['system']} | {r['kills']} | {r['good']} | {r['unloadable']} | {r['torn']} | {r['older']} | {r['said']} |"
        for r in record["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", type=Path, required=True, help="a folder on the disk")
    p.add_argument("--peer-python", help="python of the environment that has DeepSpeed")
    p.add_argument("--kills", type=int, default=24)
    p.add_argument("--limit-s", type=float, default=900.0, help="for a group of systems")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    a = p.parse_args()
    path = Path(tempfile.mkdtemp(prefix="bench-kills-", dir=a.path))
    rows: list[dict[str, Any]] = []
    try:
        for group in SYSTEMS:
            if group != "deepspeed" or a.peer_python:
                python = a.peer_python if group == "deepspeed" else sys.executable
                rows += rows_of(group, python, path, a.kills, a.limit_s)
                print(*rows[-len(SYSTEMS[group]) :], sep="\n", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    cpu = torch.device("cpu")
    record = {"machine": machine(cpu), "rows": rows}
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(cpu)).split()).lower()
    a.out.mkdir(parents=True, exist_ok=True)
    found = a.out / f"{date.today().isoformat()}_{name}_checkpoint-kills"
    found.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    page = page_of(record)
    found.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
