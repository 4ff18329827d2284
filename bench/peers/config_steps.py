"""Three steps of a small model under each of the fifty configs, by real DeepSpeed and by tritonspeed: the same numbers.

    python -m bench.peers.config_steps --peer PYTHON --out bench/results

PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh). One gloo rank on a CPU, a
micro batch of 2, "auto" filled as the Trainer does, AdamW where a file names no optimizer. Not run: what either
refuses, fp16 (DeepSpeed has none on a CPU), and NVMe (its reader is a C++ extension). Losses and gradient norms are
compared.

Exit status 1 where a figure is not the same to the decimals named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from bench.peers.configs import ROOT, filled

sys.path.insert(0, str(ROOT / "tests"))

from fifty_configs import FILES, for_one_rank, resolved

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}
DECIMALS = {"fp32": 4, "bf16": 2}
STEPS = 3
RUN = r"""
import json, os, sys
import torch
sys.path.insert(0, os.environ["TESTS"])
from models import Net, batch
system = sys.argv[1]
if system == "deepspeed":
    import deepspeed as module
    module.init_distributed("gloo")
else:
    import tritonspeed as module
torch.set_num_threads(1)
jobs = json.load(sys.stdin)
out = {}
for name, config in jobs.items():
    torch.manual_seed(0)
    try:
        engine = module.initialize(model=Net(), config=config)[0]
        rows = []
        for step in range(STEPS):
            loss = engine(*batch(0, step))
            engine.backward(loss)
            engine.step()
            norm = engine.get_global_grad_norm()
            rows.append([float(loss), None if norm is None else float(norm)])
        out[name] = rows
        engine.destroy()
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
print("\n@@@" + json.dumps(out))
""".replace("STEPS", str(STEPS))


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs that both can run on a CPU."""
    found = {}
    for path in FILES:
        config = resolved(path)[0]
        zero = config.zero_optimization
        refused = any(each.verdict == "refused" for each in config.answers())
        if refused or config.fp16.enabled or "nvme" in (zero.offload_optimizer.device, zero.offload_param.device):
            continue
        tree = filled(for_one_rank(path, folder), 1)
        tree.setdefault("optimizer", ADAMW)
        tree["steps_per_print"] = 1000
        for block in ("tensorboard", "csv_monitor", "flops_profiler", "comms_logger"):
            tree.pop(block, None)
        found[path.name] = tree
    return found


def run(python: str, system: str, given: dict[str, Any]) -> dict[str, Any]:
    """[[loss, norm], ...] of each file, or what went wrong."""
    own = {"TESTS": str(ROOT / "tests"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29653"}
    own["PATH"] = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # ninja stands beside the interpreter
    if system == "tritonspeed":
        own["PYTHONPATH"] = str(ROOT)
    command = [python, "-c", RUN, system]
    env = {**os.environ, **own}
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=550, env=env)
    if "@@@" not in done.stdout:
        raise RuntimeError(f"{system} failed: {(done.stdout + done.stderr)[-4000:]}")
    return json.loads(done.stdout.rpartition("@@@")[2])


def compare(peer: str) -> list[dict[str, Any]]:
    """A row for each file."""
    with tempfile.TemporaryDirectory() as folder:
        given = jobs(Path(folder))
        theirs, ours = run(peer, "deepspeed", given), run(sys.executable, "tritonspeed", given)
    rows = []
    for name, config in given.items():
        low = any(config.get(block, {}).get("enabled") for block in ("bf16", "bfloat16", "torch_autocast"))
        kind = "bf16" if low else "fp32"
        row = {"file": name, "precision": kind, "ours": ours[name], "deepspeed": theirs[name]}
        if isinstance(theirs[name], str) or isinstance(ours[name], str):
            row["verdict"] = "not run"
        else:
            pairs = [pair for x, y in zip(ours[name], theirs[name], strict=True) for pair in zip(x, y, strict=True)]
            row["largest"] = max(abs(a - b) for a, b in pairs if a is not None and b is not None)  # no norm at stage 0
            row["verdict"] = "same" if row["largest"] < 0.5 * 10 ** -DECIMALS[kind] else "differs"
        rows.append(row)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    same = sum(row["verdict"] == "same" for row in rows)
    ran = sum(row["verdict"] != "not run" for row in rows)
    lines = [
        "# Three steps under each config, by DeepSpeed and by tritonspeed",
        "",
        f"{same} of {ran} files that both run on a CPU give the same losses and gradient norms: to 4 decimals in fp32,",
        "to 2 in bf16, where an ulp of a master tips a weight's rounding. All figures: in the JSON beside this page.",
        "",
        "| file | precision | largest difference | |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["verdict"]):
        why = next((str(row[who]) for who in ("deepspeed", "ours") if isinstance(row[who], str)), "")
        why = " ".join(why.split())[:100].replace("|", "\\|")
        largest = f"{row['largest']:.1e}" if "largest" in row else ""
        lines.append(f"| {row['file']} | {row['precision']} | {largest} | {row['verdict']} {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 1 where figures differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--out", type=Path, help="folder of the table and its JSON")
    args = parser.parse_args()
    rows = compare(args.peer)
    print(page(rows))
    if args.out:
        header = machine(torch.device("cpu"))
        name = f"{header['date']}_cpu_config-steps"
        (args.out / f"{name}.json").write_text(json.dumps({"machine": header, "files": rows}, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(page(rows))
    return int(any(row["verdict"] == "differs" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
