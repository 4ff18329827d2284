"""Offload beside one GPU: the rate at 7 B, the largest model, DeepSpeed's ZeRO-Offload; each run a process of its own.

    python -m bench.offload.bench_gpu_offload --out DIR [--what rate largest] [--time-limit 450] [--toy --device cpu]

``rate``        fp32 masters, exact clipping, bf16, every block recomputed; tokens per step from `estimate`, so that
                the update hides under the next forward; with and without that overlap; achieved over bound per link
``largest``     the deepest model that `estimate` says fits, then less deep ones until one trains
``deepspeed``   its ZeRO-Offload (stage 2, CPU Adam) on the model and batch of ``rate``, where it can be imported

Results are kept after every part: OUT/gpu_offload.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from bench.offload.gpu_trial import Trial, memory_here
from bench.offload.llama import SIZES, LlamaSize
from bench.systems.launch import MARK, ROOT
from tritonspeed.estimation import machine_of

WHAT = ("rate", "largest", "deepspeed")
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the optimizer's state on the host: the rest stays on the device
TO_BEAT_TFLOP_PER_S = 272  # Qwen2.5-7B on one H100 by MegaTrain, without fp32 masters (arXiv:2604.05091)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run of this bench.

    Attributes:
        rate: the model of ``rate`` and ``deepspeed``.
        widest: whose depth is searched by ``largest``.
        depths: tried.
        trial: what all trials have in common.
    """

    rate: str
    widest: LlamaSize
    depths: range
    trial: Trial


def plan(device: str, toy: bool) -> Plan:
    """The sizes; toys run anywhere in seconds."""
    if toy:
        return Plan("toy", SIZES["toy"], range(1, 4), Trial("toy", device=device, length=32, rows=2, steps=2))
    return Plan("7b", SIZES["13b"], range(12, 81, 2), Trial(device=device, calibrate_s=6.0))


def run_trial(trial: Trial, limit_s: float) -> dict[str, Any]:
    """Its facts, or why there are none."""
    command = [sys.executable, "-m", "bench.offload.gpu_trial", json.dumps(asdict(trial))]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, errors="replace")
        said, status = done.stdout + done.stderr, f"exit status {done.returncode}"
        found = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    except subprocess.TimeoutExpired as late:
        raw = (late.stdout or b"") + (late.stderr or b"")
        said = raw if isinstance(raw, str) else raw.decode(errors="replace")
        status, found = f"not done within {limit_s:.0f} s", None
    if found is not None:
        return {**json.loads(found[len(MARK) :]), "took_s": time.perf_counter() - begun}
    return {"trial": asdict(trial), "failed": f"{status}: {said[-1500:]}", "took_s": time.perf_counter() - begun}


def candidates(given: Plan) -> Iterator[Trial]:
    """Trials that `estimate` says fit, the deepest first; per depth the one with least of it on the device."""
    memory, there = memory_here(given.trial.device, given.trial.path), machine_of("H100", num_devices=1)
    places = [("none", ratio) for ratio in RATIOS] + [("cpu", 1.0)]
    rows = given.trial.rows or 1
    for depth in reversed(given.depths):
        size = replace(given.widest, num_layers=depth)
        # what is certainly too large, since `estimate` takes a second each: 12 bytes of state, 2 of gradient; two slots
        fits = {
            "cpu": 14 * size.num_params < memory["device"] + memory["host"],
            "nvme": 24 * size.num_params < memory["disk"],
        }
        for optimizer in (name for name, may in fits.items() if may):
            for params, ratio in places if optimizer == "cpu" else [("cpu", 1.0)]:
                trial = replace(
                    given.trial, size=asdict(size), optimizer=optimizer, params=params, ratio=ratio, rows=rows,
                    path="" if optimizer == "cpu" else str(Path.cwd() / "offload_files"), calibrate_s=0.0, steps=2,
                )  # fmt: skip
                if not trial.lacks(rows, trial.forecast(rows, there), memory):
                    yield trial
                    break
            else:
                continue
            break


def largest(given: Plan, limit_s: float) -> dict[str, Any]:
    """The deepest model that trained, and those that did not."""
    begun, failed = time.perf_counter(), []
    for trial in candidates(given):
        left = limit_s - (time.perf_counter() - begun)
        if left < 5:
            break
        found = run_trial(trial, left)
        if trial.path:
            shutil.rmtree(trial.path, ignore_errors=True)
        if "failed" not in found:
            return {"largest": found, "failed": failed}
        failed.append(found)
    return {"largest": None, "failed": failed}


def lines(results: dict[str, Any]) -> list[str]:
    """What was found, for a person; what we lose first."""
    said = []
    rate = results.get("rate", {})
    for name in ("overlap", "at once"):
        if name in rate:
            found, bound = rate[name], rate["estimate"]["bound_s" if name == "overlap" else "serial_s"]
            said.append(
                f"{rate['num_params'] / 1e9:.2f} B, {name}: {found['median_s']:.2f} s a step of {rate['tokens']:,}"
                f" tokens, {found['tflop_per_s']:.0f} TFLOP/s ({TO_BEAT_TFLOP_PER_S} to beat), bound {bound:.2f} s"
            )
            said += [
                f"    {link}: {row['bytes_per_s'] / 1e9:.1f} GB/s, {row['share']:.0%} of its bound"
                for link, row in found["links"].items()
            ]
    if "trace" in rate:
        shares = {k: v for k, v in rate["trace"]["share_under_kernels"].items() if v is not None}
        said.append("under kernels: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    peer = results.get("deepspeed", {})
    if "median_s" in peer:
        said.append(f"DeepSpeed ZeRO-Offload: {peer['median_s']:.2f} s, {peer['tflop_per_s']:.0f} TFLOP/s")
        if "overlap" in rate and peer["median_s"] < rate["overlap"]["median_s"]:
            said.insert(0, "LOST: DeepSpeed's ZeRO-Offload takes less time a step")
    top = results.get("largest", {}).get("largest")
    if top is not None:
        said.append(
            f"largest: {top['num_params'] / 1e9:.2f} B, {top['overlap']['median_s']:.2f} s a step,"
            f" host {top['resident_peak_bytes'] / 2**30:.1f} GiB,"
            f" device {top['overlap']['device_peak_bytes'] / 2**30:.1f} GiB"
        )
    for part, found in results.items():
        if isinstance(found, dict) and "failed" in found and isinstance(found["failed"], str):
            said.append(f"{part} failed: {found['failed'][-300:]}")
    return said


def draw_lanes(folder: Path) -> None:
    """The trace's lanes as a picture: kernels, copies each way, the host's update. Needs matplotlib."""
    from bench.pictures import INK, OURS, PEERS, STYLE, plt

    lanes = json.loads((folder / "offload_lanes.json").read_text())
    names = {"kernel": "GPU kernels", "DtoH": "to host", "HtoD": "to device", "update": "update on the host"}
    first = min((spans[0][0] for spans in lanes.values() if spans), default=0.0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 2.4), layout="constrained")
        for place, name in enumerate(names):
            spans = [((a - first) / 1e6, max(b - a, 1.0) / 1e6) for a, b in lanes[name]]
            axes.broken_barh(spans, (-place - 0.35, 0.7), color=[INK, OURS, PEERS[1], PEERS[0]][place])
        axes.set_yticks([-place for place in range(len(names))], list(names.values()))
        axes.set_xlabel("seconds")
        figure.savefig(folder / "offload_timeline.png")
        plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the parts, and keep their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="sizes that run anywhere in seconds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=450.0, help="seconds, all parts together")
    given = parser.parse_args(arguments)
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sizes, begun = plan(given.device, given.toy), time.perf_counter()
    path = out / "gpu_offload.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine(torch.device(given.device))
    for part in given.what:
        left = given.time_limit - (time.perf_counter() - begun)
        if left < 5:
            results[part] = {"failed": "no time was left"}
        elif part == "rate":
            trial = replace(sizes.trial, size=sizes.rate, overlaps=(True, False), trace=str(out))
            results[part] = run_trial(trial, left)
        elif part == "largest":
            results[part] = largest(sizes, left)
        elif find_spec("deepspeed") is None:
            results[part] = {"failed": "DeepSpeed is not installed here"}
        else:
            rows = results.get("rate", {}).get("rows") or sizes.trial.rows or 1
            results[part] = run_trial(replace(sizes.trial, size=sizes.rate, rows=rows, system="deepspeed"), left)
        path.write_text(json.dumps(results, indent=1))
    if "rate" in given.what and (out / "offload_lanes.json").exists() and find_spec("matplotlib") is not None:
        draw_lanes(out)
    print("\n".join(lines(results)))
    return results


if __name__ == "__main__":
    main()
