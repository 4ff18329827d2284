"""From "pip install is done" to the first trained step, caches empty: tritonspeed beside DeepSpeed.

    python -m bench.systems.first_step --peer-python VENV/bin/python [--rounds 3]

Counted from the launch of torchrun on two ranks to the end of the first optimizer step of the 29 M parameter GPT at
stage 3: imports, process group, engine, whatever is compiled or built on the way (DeepSpeed builds its C++ Adam and
its shared-memory collectives), one step. Every round starts with empty build and kernel caches; a second launch with
the caches that the first one left is timed beside it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from bench.harness import RESULTS, machine
from bench.systems.launch import OURS, python_for, run, wait_until_idle

SYSTEMS = (OURS, "deepspeed")
CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
GOAL = 0.2  # ours ÷ DeepSpeed's
FIRST_STEP = ["--stage", "3", "--steps", "1", "--warmup", "0"]


def seconds_to_first_step(system: str, peer_python: str, caches: Path) -> float:
    """Launch `system` with its caches under `caches`, and return the seconds until its first step was done."""
    directories = {name: str(caches / name.lower()) for name in CACHES}
    start = time.time()
    arguments = ["--system", system, *FIRST_STEP]
    result = run(python_for(system, peer_python), arguments, extra_environment=directories, limit_s=600)
    return result["first_step_at"] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of the environment that has DeepSpeed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {system: {"empty": [], "warm": []} for system in SYSTEMS}
    for _ in range(args.rounds):
        for system in SYSTEMS:
            with tempfile.TemporaryDirectory() as caches:
                for state in ("empty", "warm"):
                    wait_until_idle()
                    times[system][state].append(seconds_to_first_step(system, args.peer_python, Path(caches)))
                    print(f"{system}, caches {state}: {times[system][state][-1]:.1f} s", file=sys.stderr, flush=True)
    medians = {system: {state: statistics.median(t) for state, t in times[system].items()} for system in SYSTEMS}
    ratio = medians[OURS]["empty"] / medians["deepspeed"]["empty"]
    record = {
        "machine": machine(torch.device("cpu")),
        "goal": GOAL,
        "ratio": ratio,
        "median_s": medians,
        "all_s": times,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today().isoformat()}_cpu_first_step.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(medians, indent=1))
    print(f"ours ÷ DeepSpeed's, caches empty: {ratio:.2f} (goal {GOAL}); written: {path}")


if __name__ == "__main__":
    main()
