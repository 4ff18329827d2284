"""The same training under real DeepSpeed and under tritonspeed: losses and gradient norms, step by step.

    python -m bench.peers.parity --peer-python VENV/bin/python       # VENV from bench/peers/setup.sh
    python -m bench.peers.parity --recorded bench/results/FILE.json  # compare with what DeepSpeed did then
    python -m bench.peers.parity --peer-python ... --peer-only       # record DeepSpeed's half alone

Two gloo ranks, the small GPT, one batch of 2 × 128 tokens per rank and step, AdamW, clipping at 1.0 (active), stages
1, 2, 3. The weights start representable in bf16, so that fp32 masters made from a bf16 model are the fp32 model's.
Stage 3 runs with "memory_efficient_linear": false: its default adds a linear's bias after rounding the product to
bf16, and so departs from DeepSpeed's own stages 1 and 2.

A stage passes when every number agrees to 4 decimals. Under bf16 no two correct AdamWs do for long: one ulp of a
master tips a weight's rounding, and every activation after it rounds differently. The yardstick there is printed
beside ours: DeepSpeed against itself with "torch_adam": true, the same mathematics in another order of operations.
`--bf16-noise-factor F` lets a bf16 stage pass when ours is no further from DeepSpeed than F times the yardstick.

Exit status 1 when a stage fails.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, machine
from bench.systems.launch import OURS, RunFailed, python_for, run

STAGES = (1, 2, 3)
PRECISIONS = ("fp32", "bf16")
HALF_OF_FOURTH_DECIMAL = 0.5e-4


@dataclass
class Curve:
    """What one run reported at each step: loss (mean over ranks) and gradient norm before clipping."""

    losses: list[float]
    grad_norms: list[float]

    def distance(self, other: "Curve") -> tuple[float, float]:
        """The largest absolute difference of a loss, and of a norm."""
        pairs = ((self.losses, other.losses), (self.grad_norms, other.grad_norms))
        loss, norm = (max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in pairs)
        return loss, norm


def train(system: str, stage: int, precision: str, variant: str, steps: int, peer_python: str | None) -> Curve:
    """One run of run_one, every step reported."""
    variants = [v for v in (variant, "plain-linear" if stage == 3 else "") if v]
    arguments = ["--system", system, "--stage", str(stage), "--precision", precision, "--variant", ",".join(variants)]
    arguments += ["--size", "small", "--shape", "compute-heavy", "--warmup", "0", "--steps", str(steps)]
    result = run(python_for(system, peer_python), arguments)
    if result["exit_status"]:  # gloo ranks now and then abort at exit, after the last number: docs/log.md
        print(f"{system}, stage {stage}, {precision}: trained, then ended with exit status {result['exit_status']}")
    return Curve(result["losses"], result["grad_norms"])


def peer_curves(precision: str, stage: int, steps: int, peer_python: str) -> dict[str, Curve]:
    """DeepSpeed as it comes, and DeepSpeed with torch's Adam."""
    variants = {"deepspeed": "", "deepspeed torch_adam": "torch-adam"}
    return {name: train("deepspeed", stage, precision, v, steps, peer_python) for name, v in variants.items()}


def table(title: str, curves: dict[str, Curve]) -> str:
    """The curves side by side, one line a step."""
    names = list(curves)
    lines = [title, f"{'step':>4}  loss: {'  '.join(names)}   |   norm: {'  '.join(names)}"]
    for step in range(len(curves[names[0]].losses)):
        losses = "  ".join(f"{curves[name].losses[step]:.5f}" for name in names)
        norms = "  ".join(f"{curves[name].grad_norms[step]:.5f}" for name in names)
        lines.append(f"{step:>4}  {losses}   |   {norms}")
    return "\n".join(lines)


def judge(precision: str, stage: int, curves: dict[str, Curve], noise_factor: float) -> dict[str, Any]:
    """Ours against DeepSpeed: the record that is printed and kept; `passed` is None where there is no run of ours."""
    peer_loss, peer_norm = curves["deepspeed"].distance(curves["deepspeed torch_adam"])
    factor = noise_factor if precision == "bf16" else 0.0
    record: dict[str, Any] = {
        "precision": precision,
        "stage": stage,
        "yardstick_loss": peer_loss,
        "yardstick_norm": peer_norm,
        "allowed_loss": max(HALF_OF_FOURTH_DECIMAL, factor * peer_loss),
        "allowed_norm": max(HALF_OF_FOURTH_DECIMAL, factor * peer_norm),
        "passed": None,
        "curves": {name: asdict(curve) for name, curve in curves.items()},
    }
    if OURS in curves:
        loss, norm = curves[OURS].distance(curves["deepspeed"])
        record |= {"loss_distance": loss, "norm_distance": norm}
        record["passed"] = loss < record["allowed_loss"] and norm < record["allowed_norm"]
    return record


def verdict(record: dict[str, Any]) -> str:
    """One line: how far DeepSpeed is from itself, how far ours is from it, and what that means."""
    text = "largest difference (loss, norm): "
    text += f"DeepSpeed against itself {record['yardstick_loss']:.1e}, {record['yardstick_norm']:.1e}; "
    if record["passed"] is None:
        return text + "no run of ours"
    text += f"ours {record['loss_distance']:.1e}, {record['norm_distance']:.1e}; "
    text += f"allowed {record['allowed_loss']:.1e}, {record['allowed_norm']:.1e}: "
    return text + ("passed" if record["passed"] else "FAILED")


def recorded_curves(path: Path) -> dict[tuple[str, int], dict[str, Curve]]:
    """DeepSpeed's curves out of an earlier result."""
    cases = json.loads(path.read_text())["cases"]
    return {
        (case["precision"], case["stage"]): {n: Curve(**c) for n, c in case["curves"].items() if n != OURS}
        for case in cases
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--peer-python", help="python of the environment that has DeepSpeed")
    source.add_argument("--recorded", type=Path, help="take DeepSpeed's half from this result")
    parser.add_argument("--peer-only", action="store_true", help="record DeepSpeed's half without ours")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--stage", type=int, nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16-noise-factor", type=float, default=0.0, help="0: 4 decimals under bf16 too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    recorded = recorded_curves(args.recorded) if args.recorded else {}
    cases, failed = [], False
    for precision in args.precision:
        for stage in args.stage:
            curves = dict(recorded.get((precision, stage), {}))
            if args.peer_python:
                curves = peer_curves(precision, stage, args.steps, args.peer_python)
            if not args.peer_only:
                try:
                    num_steps = len(curves["deepspeed"].losses)
                    curves[OURS] = train(OURS, stage, precision, "", num_steps, args.peer_python)
                except RunFailed as error:
                    failed = True
                    print(f"{precision}, stage {stage}: {error}", file=sys.stderr)
            record = judge(precision, stage, curves, args.bf16_noise_factor)
            cases.append(record)
            print(table(f"\n{precision}, stage {stage}", curves))
            print(verdict(record), flush=True)
            failed |= record["passed"] is False
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today().isoformat()}_cpu_deepspeed_parity.json"
    path.write_text(json.dumps({"machine": machine(torch.device("cpu")), "cases": cases}, indent=1) + "\n")
    print(f"written: {path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
