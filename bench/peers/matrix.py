"""Older and newer versions of Hugging Face and Lightning: an environment each, and users' scripts run in it.

    python -m bench.peers.matrix --folder VENVS --make          make the environments that are not there
    python -m bench.peers.matrix --folder VENVS --out FOLDER    run the scripts in all of them, write the table
    ... --only accelerate --cases lora                          environments and cases that have this in their names
    python -m bench.peers.matrix --record                       write the records of Lightning's DDP for the tests

Each environment has this checkout, torch and numpy as constraints.txt pins them, and the versions below. A case's
figures are held against the record of real DeepSpeed with the pinned versions, and Lightning's against its own DDP in
the same environment. Where another version does other arithmetic (weights drawn in another order, a loss normalised
otherwise), some are held against the same script at stage 0 there; of the rest the table says what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integrations"))

from script_cases import CASES, LIGHTNING, RECORDED, Case  # noqa: E402
from script_runs import differences, run_case  # noqa: E402

TIMEOUT_S = 3600
PINNED = ("torch", "triton", "numpy")

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "transformers-5": {
        "transformers": "5.23.0",
        "accelerate": "1.15.0",
        "trl": "1.16.0",
        "peft": "0.21.2",
        "datasets": "5.2.0",
        "lightning": "2.6.6",
        "pytorch-lightning": "2.6.6",
    },
    "transformers-5-first": {
        "transformers": "5.0.0",
        "accelerate": "1.12.0",
        "trl": "0.28.0",
        "peft": "0.18.1",
        "lightning": "2.6.0",
        "pytorch-lightning": "2.6.0",
    },
    "transformers-4": {
        "transformers": "4.57.6",
        "accelerate": "1.12.0",
        "trl": "0.29.1",
        "peft": "0.18.1",
        "lightning": "2.5.6",
        "pytorch-lightning": "2.5.6",
    },
    "transformers-4-first": {
        "transformers": "4.57.1",
        "accelerate": "1.10.0",
        "trl": "0.24.0",
        "peft": "0.17.0",
        "lightning": "2.5.0",
        "pytorch-lightning": "2.5.0",
    },
    "accelerate-0": {
        "transformers": "4.51.3",
        "accelerate": "0.34.2",
        "trl": "0.17.0",
        "peft": "0.15.2",
        "lightning": "2.0.9",
        "pytorch-lightning": "2.0.9",
    },
    "lightning-1": {"pytorch-lightning": "1.9.5"},  # the one named `lightning` does not find its cloud's library
}
"""The last two majors: the newest and the oldest of each that is tried."""


def make(folder: Path, name: str) -> Path:
    """The environment's interpreter; the environment is made where it is not there."""
    python = folder / name / "bin" / "python"
    done = folder / name / "made"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if line.partition("==")[0] in PINNED) + "\n")
    wanted = [f"{package}=={version}" for package, version in ENVIRONMENTS[name].items()]
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
    subprocess.run([*install, "-e", str(ROOT), "tensorboard", "requests", "setuptools<81", *wanted], check=True)
    done.touch()
    return python


CHOSEN: dict[str, tuple[str, ...]] = {
    "": ("raw_gpt-stage3",),
    "transformers": (
        *("trainer_stage3-linear", "trainer_stage2-decay", "trainer_stage3-gpt2", "trainer_seq2seq-t5"),
        *("trainer_save-stage3", "trainer_pretrained-gpt2", "trainer_stage3-mixtral"),
    ),
    "accelerate": ("accelerate_loop-stage3", "accelerate_models-3-0-3"),
    "peft": ("peft_lora-stage3",),
    "trl": ("trl_sft", "trl_dpo", "trl_grpo"),
    "lightning": ("lightning_",),
    "pytorch-lightning": ("lightning_fit-stage3",),
}
"""Package → beginnings of the names of the cases that are tried with it: of each kind of script one or two."""


OUTCOMES = ("equal", "equal to stage 0", "other figures", "failed")
WITH_REFERENCE = ("trainer_stage3-linear", "accelerate_loop-stage3", "peft_lora-stage3", "trl_")
"""Cases that are run at stage 0 too where they differ from the record."""


def cases_of(name: str, text: str) -> list[Case]:
    """What is run in an environment."""
    wanted = [start for package, starts in CHOSEN.items() if package in ("", *ENVIRONMENTS[name]) for start in starts]
    found = [case for case in CASES if case.name.startswith(tuple(wanted)) and text in case.name]
    if "0.34" not in ENVIRONMENTS[name].get("accelerate", ""):
        return found
    return [replace(case, arguments=without_cpu(case)) for case in found]


def without_cpu(case: Case) -> tuple[str, ...]:
    """Accelerate 0.34 takes a word on the CPU for DDP, whatever else is asked: DeepSpeed is for GPUs there."""
    kept = tuple(each for each in case.arguments if each != "--cpu")
    return (*kept, "--use_cpu=False") if case.name.startswith(("trainer_", "peft_lora")) else kept


def ddp_of(case: Case) -> Case:
    """The same training under Lightning's DDP; cases of one script have one."""
    return replace(case, name=case.script.removesuffix(".py") + "-ddp", arguments=(*case.arguments, "--ddp"))


def in_folder(case: Case) -> dict[str, Any]:
    """The record of a run here."""
    with tempfile.TemporaryDirectory() as folder:
        record = run_case(case, Path(folder))
    return {key: record[key] for key in ("steps", "metrics")}


def at_stage_0(case: Case) -> Case:
    """The same script with everything whole on every rank."""
    return replace(case, config={**case.config, "zero_optimization": {"stage": 0}})


def differs(case: Case, record: dict[str, Any], known: dict[str, Any]) -> tuple[str, list[str]]:
    """What a run is equal to, or "other figures"; and what is not the same.

    Args:
        case: that was run.
        record: of the run.
        known: records of references so far, by name.
    """
    if case in LIGHTNING:
        reference = ddp_of(case)
        known[reference.name] = expected = known.get(reference.name) or in_folder(reference)
        found = differences(case, record, expected)
        return ("other figures", found[:3]) if found else (OUTCOMES[0], [])
    recorded = RECORDED / f"{case.name}.json"
    found = differences(case, record, json.loads(recorded.read_text())) if recorded.exists() else ["it has no record"]
    if not found:
        return OUTCOMES[0], []
    if case.name.startswith(WITH_REFERENCE):
        reference_found = differences(case, record, in_folder(at_stage_0(case)))
        return ("other figures", reference_found[:3]) if reference_found else (OUTCOMES[1], found[:2])
    return OUTCOMES[2], found[:2]


def outcome_of(case: Case, known: dict[str, Any]) -> dict[str, Any]:
    """How a case ended here, one of ``OUTCOMES``, and what was different or wrong.

    Args:
        case: to be run.
        known: records of references so far, by name.
    """
    start = time.perf_counter()
    try:
        outcome, says = differs(case, in_folder(case), known)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        lines = [line for line in str(error).splitlines() if "Error" in line] or str(error).splitlines()[-1:]
        outcome, says = "failed", [line.strip()[:300] for line in lines[-2:]]
    return {"outcome": outcome, "says": says, "seconds": round(time.perf_counter() - start, 1)}


def inside(name: str, text: str, out: Path) -> None:
    """Run the cases with this interpreter; the outcomes, by case, as JSON."""
    known: dict[str, Any] = {}
    outcomes = {}
    for case in cases_of(name, text):
        outcomes[case.name] = outcome_of(case, known)
        print(name, case.name, outcomes[case.name]["outcome"], *outcomes[case.name]["says"], sep="  ", flush=True)
    out.write_text(json.dumps(outcomes))


def run_in(python: Path, name: str, text: str) -> dict[str, Any]:
    """The outcomes in an environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        command = [str(python), "-m", "bench.peers.matrix", "--inside", name, "--cases", text, "--out", str(out)]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        return json.loads(out.read_text())


def page(results: dict[str, Any], date: str) -> str:
    """The table as markdown: what failed first."""
    lines = [
        "# Scripts with older and newer versions",
        "",
        f"{date}, two gloo ranks on a CPU, torch and numpy as constraints.txt pins them. *Equal*: the figures of real",
        "DeepSpeed with the pinned versions, to the case's decimals; of Lightning, those of its own DDP in the same",
        "environment. *Equal to stage 0*: the version's own arithmetic differs from the pinned one's, and the figures",
        "are those of the same script in the same environment at stage 0. *Other figures*: it ran to its end, differs",
        "from the pinned version's figures, and was held against nothing else.",
        "",
        f"| environment | versions | {' | '.join(OUTCOMES)} |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        counts = [sum(c["outcome"] == kind for c in result["cases"].values()) for kind in OUTCOMES]
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        lines.append(f"| {name} | {versions} | {' | '.join(map(str, counts))} |")
    for kind in reversed(OUTCOMES[1:]):
        rows = [
            f"- {name}, {case}: {'; '.join(found['says'])}"
            for name, result in results.items()
            for case, found in result["cases"].items()
            if found["outcome"] == kind
        ]
        lines += ["", f"## {kind.capitalize()}", "", *rows] if rows else []
    return "\n".join(lines) + "\n"


def save(folder: Path, name: str, outcomes: dict[str, Any]) -> None:
    """Add an environment's outcomes to what was saved today, and write the table anew."""
    folder.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    path = folder / f"{date}_cpu_versions.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    kept = known.get(name, {}).get("cases", {})
    known[name] = {"versions": ENVIRONMENTS[name], "cases": {**kept, **outcomes}}
    results = {each: known[each] for each in ENVIRONMENTS if each in known}
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results, date))


def record_ddp() -> None:
    """What ``tests/integrations/test_lightning.py`` holds its runs against."""
    for name, reference in {ddp_of(case).name: ddp_of(case) for case in LIGHTNING}.items():
        (RECORDED / f"{name}.json").write_text(json.dumps(in_folder(reference), indent=1) + "\n")
        print(name)


def main() -> int:
    """Returns 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environments are, or are made")
    parser.add_argument("--make", action="store_true", help="make them, run nothing")
    parser.add_argument("--record", action="store_true", help="write Lightning's DDP records, run nothing else")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--cases", default="", metavar="TEXT")
    parser.add_argument("--inside", metavar="NAME", help="this interpreter is that environment's: run there")
    parser.add_argument("--out", type=Path, help="folder of the table and its JSON")
    args = parser.parse_args()
    if args.record:
        record_ddp()
        return 0
    if args.inside:
        inside(args.inside, args.cases, args.out)
        return 0
    if args.folder is None:
        parser.error("--folder says where the environments are")
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in [args.only] if args.only in ENVIRONMENTS else [name for name in ENVIRONMENTS if args.only in name]:
        python = make(args.folder, name)
        if not args.make:
            outcomes = run_in(python, name, args.cases)
            failed = failed or any(each["outcome"] == "failed" for each in outcomes.values())
            if args.out:
                save(args.out, name, outcomes)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
