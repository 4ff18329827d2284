"""The fifty configs of tests/config/fifty/ read by real DeepSpeed and by tritonspeed: what each makes of them.

    python -m bench.peers.configs --peer PYTHON --out bench/results

PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh). DeepSpeed reads each file
twice with its DeepSpeedConfig: as it stands, and with every "auto" filled by the Trainer's rules (micro batch 1,
accumulation 1, bf16, hidden size 64). What it resolves then is compared: stage, batch sizes, clipping, precision,
optimizer, schedule, offload, buckets. It runs no step here; bench/peers/scripts.py and parity.py do.

Exit status 1 where the two differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "config"))

from fifty_configs import FACTS, FILES, resolved  # noqa: E402

from tritonspeed.config import Config  # noqa: E402
from tritonspeed.config.read import read  # noqa: E402

HIDDEN = FACTS.hidden_size or 64
LENGTH = 10
SIZES = {
    "reduce_bucket_size": HIDDEN * HIDDEN,
    "stage3_prefetch_bucket_size": int(0.9 * HIDDEN * HIDDEN),
    "stage3_param_persistence_threshold": 10 * HIDDEN,
}
PEER = r"""
import json, logging, sys
import deepspeed
from deepspeed.runtime import config as module
logging.disable(logging.CRITICAL)
version = deepspeed.__version__

def facts(source, world):
    module.dist.get_rank = lambda *_: 0
    module.dist.get_world_size = lambda *_: world
    try:
        c = module.DeepSpeedConfig(source)
    except Exception as error:
        return {"refused": type(error).__name__ + ": " + str(error)}
    zero = c.zero_config
    off = lambda block: str(getattr(block.device, "value", block.device)) if block else "none"
    return {
        "stage": int(zero.stage), "train_batch_size": c.train_batch_size,
        "micro": c.train_micro_batch_size_per_gpu, "accumulation": c.gradient_accumulation_steps,
        "gradient_clipping": c.gradient_clipping, "fp16": bool(c.float16_config.enabled),
        "bf16": bool(c.bfloat16_config.enabled), "autocast": bool(c.torch_autocast_enabled),
        "optimizer": c.optimizer_name, "scheduler": c.scheduler_name,
        "offload_optimizer": off(zero.offload_optimizer), "offload_param": off(zero.offload_param),
        "reduce_bucket_size": int(zero.reduce_bucket_size), "overlap_comm": bool(zero.overlap_comm),
        "param_persistence_threshold": int(zero.param_persistence_threshold),
        "prefetch_bucket_size": int(zero.prefetch_bucket_size), "sub_group_size": int(zero.sub_group_size),
        "steps_per_print": c.steps_per_print,
    }

jobs = json.load(sys.stdin)
out = {name: {"as_it_stands": facts(job["path"], job["world"]), "filled": facts(job["filled"], job["world"])}
       for name, job in jobs.items()}
print("\n@@@" + json.dumps({"version": version, "files": out}))
"""


def filled(tree: dict[str, Any], world: int) -> dict[str, Any]:
    """A config as the Trainer passes it on: its "auto" values replaced, what it does not know of left to defaults."""
    tree = copy.deepcopy(tree)
    accumulation = tree.get("gradient_accumulation_steps")
    accumulation = accumulation if isinstance(accumulation, int) else 1
    top = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": accumulation * world,
        "gradient_clipping": 1.0,
    }
    for name, value in top.items():
        if tree.get(name) == "auto":
            tree[name] = value
    for name, on in (("bf16", True), ("fp16", False)):
        if isinstance(tree.get(name), dict) and tree[name].get("enabled") == "auto":
            tree[name]["enabled"] = on and tree.get("fp16", {}).get("enabled") is not True
    zero = tree.get("zero_optimization")
    if isinstance(zero, dict):
        for name in [name for name, value in zero.items() if value == "auto"]:
            if name in SIZES:
                zero[name] = SIZES[name]
            else:
                del zero[name]
    for block in ("optimizer", "scheduler"):
        params = tree.get(block, {}).get("params", {})
        for name in [name for name, value in params.items() if value == "auto"]:
            del params[name]
            if name == "total_num_steps":
                params[name] = LENGTH
    return tree


def ours(config: Config) -> dict[str, Any]:
    """The same facts of our resolved config."""
    zero = config.zero_optimization
    return {
        "stage": zero.stage,
        "train_batch_size": config.train_batch_size,
        "micro": config.train_micro_batch_size_per_gpu,
        "accumulation": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "fp16": config.fp16.enabled,
        "bf16": config.bf16.enabled,
        "autocast": config.torch_autocast.enabled,
        "optimizer": config.optimizer.type if config.optimizer else None,
        "scheduler": config.scheduler.type if config.scheduler else None,
        "offload_optimizer": zero.offload_optimizer.device,
        "offload_param": zero.offload_param.device,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "overlap_comm": zero.overlap_comm,
        "param_persistence_threshold": zero.param_persistence_threshold,
        "prefetch_bucket_size": zero.prefetch_bucket_size,
        "sub_group_size": zero.sub_group_size,
        "steps_per_print": config.steps_per_print,
    }


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[Any]]:
    """Facts that are not the same. DeepSpeed lowers some optimizers' names."""
    pairs = {name: [mine[name], value] for name, value in theirs.items()}
    return {
        name: pair
        for name, pair in pairs.items()
        if (str(pair[0]).lower() != str(pair[1]).lower() if name == "optimizer" else pair[0] != pair[1])
    }


def compare(peer: str) -> dict[str, Any]:
    """Every file under both."""
    jobs, mine = {}, {}
    for path in FILES:
        config, world = resolved(path)
        mine[path.name] = config
        jobs[path.name] = {"path": str(path), "world": world, "filled": filled(read(path), world)}
    done = subprocess.run([peer, "-c", PEER], input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
    if "@@@" not in done.stdout:
        raise RuntimeError(f"DeepSpeed's side failed: {(done.stdout + done.stderr)[-4000:]}")
    answer = json.loads(done.stdout.rpartition("@@@")[2])
    rows = []
    for name, theirs in answer["files"].items():
        refused = [each.key for each in mine[name].answers() if each.verdict == "refused"]
        facts = theirs["filled"]
        differences = {} if "refused" in facts else differing(ours(mine[name]), facts)
        stands = theirs["as_it_stands"].get("refused", "")
        rows.append(
            {
                "file": name,
                "world": jobs[name]["world"],
                "deepspeed_as_it_stands": stands or "loads",
                "deepspeed_filled": facts.get("refused", "loads"),
                "ours_refuses": refused,
                "differences": differences,
                "deepspeed": facts,
            }
        )
    return {"deepspeed_version": answer["version"], "files": rows}


def page(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = results["files"]
    version = results["deepspeed_version"]
    loaded = [each for each in rows if each["deepspeed_filled"] == "loads"]
    alone = [each for each in rows if each["deepspeed_filled"] != "loads" and not each["ours_refuses"]]
    stands = sum(each["deepspeed_as_it_stands"] == "loads" for each in rows)
    runs = sum(not each["ours_refuses"] for each in rows)
    lines = [
        f"# Fifty configs under DeepSpeed {version} and under tritonspeed",
        "",
        'What either makes of the files of `tests/config/fifty/`. "Filled" is with every "auto" replaced as the',
        "Trainer does. Compared: stage, batch sizes, clipping, precision, optimizer, schedule, offload, buckets.",
        "",
        "| | DeepSpeed | tritonspeed |",
        "|---|---|---|",
        f"| loads as it stands | {stands} | {len(rows)} |",
        f"| loads once filled | {len(loaded)} | {len(rows)} |",
        f"| asks for nothing that is refused | {len(loaded)} | {runs} |",
        f"| resolved to the same by both | {sum(not each['differences'] for each in loaded)} of {len(loaded)} | |",
        "",
        f"{len(alone)} files that DeepSpeed {version} does not read run here: {', '.join(e['file'] for e in alone)}.",
        "",
        "| file | DeepSpeed, as it stands | DeepSpeed, filled | refused here | differs |",
        "|---|---|---|---|---|",
    ]
    for each in rows:
        cells = [_short(each["deepspeed_as_it_stands"]), _short(each["deepspeed_filled"])]
        differs = "; ".join(f"{k}: {a} here, {b} there" for k, (a, b) in each["differences"].items())
        lines.append(f"| {each['file']} | {' | '.join(cells)} | {', '.join(each['ours_refuses'])} | {differs} |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 110 else line[:109] + "…"


def main() -> int:
    """Returns 1 where the two resolve a file differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--out", type=Path, help="folder of the table and its JSON")
    args = parser.parse_args()
    results = compare(args.peer)
    print(page(results))
    if args.out:
        header = machine(torch.device("cpu"))
        name = f"{header['date']}_cpu_configs"
        (args.out / f"{name}.json").write_text(json.dumps({"machine": header, **results}, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(page(results))
    return int(any(each["differences"] for each in results["files"]))


if __name__ == "__main__":
    sys.exit(main())
