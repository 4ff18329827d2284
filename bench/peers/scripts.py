"""Users' scripts under real DeepSpeed and under tritonspeed: the same losses, norms, rates and metrics.

    python -m bench.peers.scripts --peer PYTHON --out bench/results     every case under both: table and figures
    python -m bench.peers.scripts --peer PYTHON --record                real DeepSpeed's records, for the tests
    ... --only trainer                                                  the cases whose names have this in them

PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh) and the same versions of
transformers, accelerate, trl, peft and lightning. Cases whose figures differ stand at the top of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))

from script_cases import CASES, RECORDED, SCRIPTS, Case  # noqa: E402
from script_runs import OFFLINE, differences, run_case  # noqa: E402

TIMEOUT_S = 600
VERSIONS = """
import importlib.metadata as m, json
names = ("deepspeed", "torch", "transformers", "accelerate", "trl", "peft", "lightning")
print(json.dumps({n: m.version(n) for n in names if list(m.distributions(name=n))}))
"""


def run_peer(python: str, case: Case, folder: Path) -> dict[str, Any]:
    """Run a case under real DeepSpeed, by torchrun.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    config = folder / "ds_config.json"
    config.write_text(json.dumps(case.config))
    out = folder / "out"
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(SCRIPTS / case.script), *case.flags, str(config), "--out", str(out), *case.arguments]
    found = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # ninja stands beside the interpreter
    own = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own["PATH"] = found
    env = {**os.environ, **OFFLINE, **own, **case.environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=folder)
    if not (out / "record.json").exists():  # DeepSpeed's ranks may abort as they exit, their work done
        raise RuntimeError(f"{case.name} under DeepSpeed: {(done.stdout + done.stderr)[-6000:]}")
    return json.loads((out / "record.json").read_text())


def compare(python: str, case: Case) -> dict[str, Any]:
    """A case under both: their figures, the differences in words, and the largest of each kind."""
    theirs, theirs_s = _timed(lambda folder: run_peer(python, case, folder))
    ours, ours_s = _timed(lambda folder: run_case(case, folder))
    kept = {key: ours[key] for key in ("steps", "metrics")}
    return {
        "case": case.name,
        "decimals": case.close,
        "why_not_four": case.why,
        "differences": differences(case, ours, theirs),
        "largest": largest(kept, theirs),
        "ours": kept,
        "deepspeed": theirs,
        "process_s": {"ours": round(ours_s, 2), "deepspeed": round(theirs_s, 2)},
    }


def _timed(run: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        record = run(Path(folder))
        return record, time.perf_counter() - start


def largest(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The largest absolute difference of each step figure, and of all metrics together."""
    found: dict[str, float] = {}
    rows = [("", a, b) for a, b in zip(ours["steps"], theirs["steps"], strict=False)]
    for kind, a, b in [*rows, ("metrics", ours["metrics"], theirs["metrics"])]:
        for key in a.keys() & b.keys():
            if isinstance(b[key], int | float) and isinstance(a[key], int | float):
                name = kind or (key if key in ("loss", "grad_norm", "learning_rate") else "metrics")
                found[name] = max(found.get(name, 0.0), abs(a[key] - b[key]))
    return found


def page(results: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The table as markdown, differing cases first."""
    lines = [
        "# Scripts under DeepSpeed and under tritonspeed",
        "",
        f"Two gloo ranks on a CPU, {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "Largest absolute differences over all steps; a case differs where a figure is not the same to the decimals",
        "named (of a figure above 1: relative to it). Figures of both, step by step, are in the JSON beside this page.",
        "",
        "| case | steps | loss | gradient norm | learning rate | metrics | the same to | seconds, ours / DeepSpeed's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in sorted(results, key=lambda r: not r["differences"]):
        named = [each["largest"].get(key) for key in ("loss", "grad_norm", "learning_rate", "metrics")]
        cells = ["–" if value is None else f"{value:.1e}" for value in named]
        verdict = "**differs**" if each["differences"] else f"{each['decimals']} decimals"
        seconds = f"{each['process_s']['ours']:.1f} / {each['process_s']['deepspeed']:.1f}"
        lines.append(
            f"| {each['case']} | {len(each['deepspeed']['steps'])} | {' | '.join(cells)} | {verdict} | {seconds} |"
        )
    reasons = [f"- {each['case']}: {each['why_not_four']}" for each in results if each["why_not_four"]]
    alone = [f"- {case.name}: {case.no_peer}" for case in CASES if case.no_peer]
    seconds = (
        "Seconds are of one whole process each, imports and all, on a shared machine: an impression, not a benchmark."
    )
    lines += ["", seconds]
    lines += ["", "Fewer than four decimals, and why:", "", *reasons] if reasons else []
    lines += ["", "Not run under DeepSpeed, and why:", "", *alone] if alone else []
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 1 where a case failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--record", action="store_true", help="write tests/integrations/recorded/, run nothing of ours")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--out", type=Path, help="folder of the table and its JSON")
    args = parser.parse_args()
    results, failed = [], False
    for case in [c for c in CASES if args.only in c.name and not c.no_peer]:
        try:
            if args.record:
                record, seconds = _timed(lambda folder, case=case: run_peer(args.peer, case, folder))
                RECORDED.mkdir(exist_ok=True)
                (RECORDED / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
                print(f"{case.name}: {len(record['steps'])} steps in {seconds:.0f} s", flush=True)
                continue
            results.append(compare(args.peer, case))
        except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
            print(f"{case.name} failed: {error}", flush=True)
            failed = True
            continue
        found = results[-1]["differences"]
        print(case.name, *(found or ["the same"]), sep="\n  ", flush=True)
        failed = failed or bool(found)
    if args.out and results:
        _save(args, results)
    return int(failed)


def _save(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    versions = json.loads(subprocess.check_output([args.peer, "-c", VERSIONS], text=True))
    header = machine(torch.device("cpu"))
    name = f"{header['date']}_cpu_scripts"
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": header, "versions": versions, "cases": results}
    (args.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(page(results, versions))


if __name__ == "__main__":
    sys.exit(main())
