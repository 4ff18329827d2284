"""Users' scripts under real DeepSpeed and under tritonspeed: the same losses, norms, rates and metrics.

    python -m bench.peers.scripts --peer PYTHON                 run every case under both, print and save the table
    python -m bench.peers.scripts --peer PYTHON --record        write real DeepSpeed's records for the tests
    ... --only trainer                                          the cases whose names have this in them

PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh) and the same versions of
transformers, accelerate, trl and peft. Losses first: cases whose figures differ stand at the top of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))

from script_cases import CASES, RECORDED, SCRIPTS, Case  # noqa: E402
from script_runs import OFFLINE, differences, run_case  # noqa: E402

TIMEOUT_S = 600


def run_peer(python: str, case: Case, folder: Path) -> dict[str, Any]:
    """Run a case under real DeepSpeed, by torchrun.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    config = folder / "ds_config.json"
    config.write_text(json.dumps(case.config))
    out = folder / "out"
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(SCRIPTS / case.script), "--deepspeed", str(config), "--out", str(out), *case.arguments]
    found = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # ninja stands beside the interpreter
    own = {
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": found,
    }
    env = {**os.environ, **OFFLINE, **own, **case.environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=folder)
    if not (out / "record.json").exists():  # DeepSpeed's ranks may abort as they exit, their work done
        raise RuntimeError(f"{case.name} under DeepSpeed: {(done.stdout + done.stderr)[-6000:]}")
    return json.loads((out / "record.json").read_text())


def main() -> int:
    """Returns 1 where a case failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--record", action="store_true", help="write tests/integrations/recorded/, run nothing of ours")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--out", type=Path, help="folder of the table and its JSON")
    args = parser.parse_args()
    failed = False
    for case in [c for c in CASES if args.only in c.name and not c.no_peer]:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                theirs = run_peer(args.peer, case, Path(folder))
            except RuntimeError as error:
                print(error)
                failed = True
                continue
            print(f"{case.name}: {len(theirs['steps'])} steps in {time.perf_counter() - start:.0f} s")
        if args.record:
            RECORDED.mkdir(exist_ok=True)
            (RECORDED / f"{case.name}.json").write_text(json.dumps(theirs, indent=1) + "\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            ours = run_case(case, Path(folder))
        found = differences(case, ours, theirs)
        print("\n".join(f"  {line}" for line in found) or "  the same")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
