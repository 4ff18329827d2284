"""One training run beside a GPU, in a process of its own: prints its facts as one line of JSON after ``MARK``.

    python -m bench.offload.gpu_trial '{"size": "7b", "optimizer": "cpu", "steps": 6}'

A step's time is from the end of one ``engine.step()`` to the end of the next: each waits for the gradient norm, so the
GPU has come as far, and updates under the next forward are inside. Model flops leave recomputation out.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import tritonspeed as ts
from bench.offload.llama import SIZES, Llama, LlamaSize, initialise
from bench.systems.launch import MARK
from tritonspeed.estimation import Machine, achieved, calibrate, machine_of
from tritonspeed.kernels.host_step import host_step

WARMUP = 2  # the first step compiles, learns the order of units and makes the optimizer's state
SPARE_BYTES = 6 * 2**30  # of the host, for what is not the model's
DEVICE_SHARE = 0.94  # of a GPU's memory that may be planned for
TRACE_LIMIT_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Trial:
    """What to run.

    Attributes:
        size: of ``SIZES``, or its dimensions.
        optimizer, params, ratio: as the offload blocks of a config.
        rows, length: of a batch; rows None takes what hides the offload by `estimate`, as far as it fits.
        overlaps: each is measured: the update under the next forward, or before ``step`` returns.
        calibrate_s: measure this machine's links for so long; 0 takes the table.
        trace: folder for a trace of one step; None takes none.
        system: "tritonspeed", or "deepspeed" (its ZeRO-Offload, stage 2).
    """

    size: str | dict[str, int] = "7b"
    optimizer: str = "cpu"
    params: str = "none"
    ratio: float = 1.0
    rows: int | None = None
    length: int = 4096
    steps: int = 5
    overlaps: tuple[bool, ...] = (True,)
    device: str = "cuda"
    path: str = ""
    calibrate_s: float = 0.0
    trace: str | None = None
    system: str = "tritonspeed"
    max_rows: int = 16

    @property
    def llama(self) -> LlamaSize:
        return SIZES[self.size] if isinstance(self.size, str) else LlamaSize(**self.size)

    def config(self, rows: int) -> dict[str, Any]:
        """The ds_config.json."""
        zero: dict[str, Any] = {"stage": 3, "overlap_comm": True}
        if self.optimizer != "none":
            zero["offload_optimizer"] = {"device": self.optimizer, "ratio": self.ratio, "nvme_path": self.path}
        if self.params != "none":
            zero["offload_param"] = {"device": self.params, "nvme_path": self.path}
        return {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }

    def on_meta(self) -> Llama:
        with torch.device("meta"):
            return Llama(self.llama)

    def forecast(self, rows: int, machine: Machine) -> Any:
        """What `estimate` says of it."""
        tokens = rows * self.length
        return ts.estimate(
            self.on_meta(), self.config(rows), 1, device=self.device, tokens=tokens, machine=machine, checkpointing=True
        )

    def lacks(self, rows: int, forecast: Any, memory: dict[str, int]) -> list[str]:
        """What is too small for it; empty where it fits.

        Args:
            memory: bytes of "device", "host" and "disk".
        """
        device = forecast.total_peak_bytes + self.llama.activation_bytes(rows * self.length)
        host = forecast.total_host_peak_bytes + SPARE_BYTES
        if self.device == "cpu":
            device, host = 0, host + device
        needs = {"device": device, "host": host, "disk": forecast.disk_bytes}
        return [name for name, need in needs.items() if need > memory[name]]


def memory_here(device: str, path: str) -> dict[str, int]:
    """Bytes that may be planned for."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    there = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    return {
        "device": int(DEVICE_SHARE * there),
        "host": int(fields["MemAvailable"].split()[0]) * 1024,
        "disk": int(0.9 * shutil.disk_usage(path or ".").free),
    }


def _rows(trial: Trial, machine: Machine) -> int:
    """As many as hide the offload, or as fit."""
    if trial.rows is not None:
        return trial.rows
    memory, wanted = memory_here(trial.device, trial.path), 1
    hide = trial.forecast(1, machine).step.tokens_to_hide or 0
    for rows in range(1, trial.max_rows + 1):
        if trial.lacks(rows, trial.forecast(rows, machine), memory):
            break
        wanted = rows
        if rows * trial.length >= 1.25 * hide:  # a link never reaches its bound
            break
    return wanted


def _batch(trial: Trial, rows: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(trial.llama.vocabulary, (rows, 1), generator=generator)
    return ((start + torch.arange(trial.length + 1)) % trial.llama.vocabulary).to(trial.device)


def _resident_peak_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(trial: Trial) -> dict[str, Any]:
    """The facts of a trial."""
    machine = (
        calibrate(trial.path or None, trial.calibrate_s) if trial.calibrate_s else machine_of("H100", num_devices=1)
    )
    rows = _rows(trial, machine)
    size, tokens = trial.llama, rows * trial.length
    facts: dict[str, Any] = {"trial": asdict(trial), "num_params": size.num_params, "rows": rows, "tokens": tokens}
    if trial.system == "deepspeed":
        return facts | _timed(trial, rows, *_deepspeed(trial, rows))
    forecast = trial.forecast(rows, machine)
    facts["estimate"] = {
        "device_bytes": forecast.total_peak_bytes,
        "host_bytes": forecast.total_host_peak_bytes,
        "disk_bytes": forecast.disk_bytes,
        "bound_s": forecast.step.seconds,
        "serial_s": forecast.step.serial_seconds,
        "binding": forecast.step.binding,
        "seconds_of": dict(forecast.step.seconds_of),
        "tokens_to_hide": forecast.step.tokens_to_hide,
    }
    begun = time.perf_counter()
    model = ts.zero.apply_later(trial.on_meta(), initialise)
    engine = ts.initialize(model=model, config=trial.config(rows))[0]
    facts |= {"build_s": time.perf_counter() - begun, "host_step": host_step()}
    homes = engine.sharded.homes
    for overlap in trial.overlaps:
        homes.offload = replace(homes.offload, overlap=overlap)
        found = _timed(trial, rows, engine, lambda: engine.last_step)
        links = found.pop("links")
        found["links"] = {link: asdict(row) for row in achieved(links, machine) for link in [row.link]}
        facts["overlap" if overlap else "at once"] = found
    if trial.trace is not None:
        homes.offload = replace(homes.offload, overlap=trial.overlaps[0])
        facts["trace"] = _trace(trial, rows, engine, Path(trial.trace))
    assert engine.sharded.stepper is not None, "the config has an optimizer"
    engine.sharded.stepper.late.finish()
    facts["host_bytes"] = engine.sharded.ledger.host.total_bytes
    facts["resident_peak_bytes"] = _resident_peak_bytes()
    facts["machine"] = asdict(machine)
    engine.destroy()
    return facts


def _timed(trial: Trial, rows: int, engine: Any, report: Any) -> dict[str, Any]:
    ends, losses, norms = [], [], []
    links: dict[str, tuple[float, float]] = {}
    for step in range(WARMUP + trial.steps):
        engine.backward(engine(_batch(trial, rows, step)))
        engine.step()
        ends.append(time.perf_counter())
        facts = report()
        losses.append(facts.loss)
        norms.append(facts.grad_norm)
        for link, (num_bytes, seconds) in facts.links.items() if step >= WARMUP else ():
            before = links.get(link, (0.0, 0.0))
            links[link] = (before[0] + num_bytes, before[1] + seconds)
    steps = [b - a for a, b in pairwise(ends)][WARMUP - 1 :]
    median = statistics.median(steps)
    flops = trial.llama.train_flops(rows * trial.length, trial.length)
    peak = torch.cuda.max_memory_allocated() if trial.device == "cuda" else 0
    return {
        "steps_s": steps, "median_s": median, "tflop_per_s": flops / median / 1e12,
        "tokens_per_s": rows * trial.length / median, "losses": losses, "norms": norms, "links": links,
        "device_peak_bytes": peak,
    }  # fmt: skip


@dataclass
class _Report:
    loss: float
    grad_norm: float
    links: dict[str, tuple[float, float]]


def _deepspeed(trial: Trial, rows: int) -> tuple[Any, Any]:
    """DeepSpeed's engine on the same model, and what tells of its last step."""
    import deepspeed

    with torch.device(trial.device):
        model = Llama(trial.llama).bfloat16()
        model.apply(initialise)
        model.head.reset_parameters()
    config = trial.config(rows)
    config["zero_optimization"] = {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    last = _Report(0.0, 0.0, {})

    def report() -> _Report:
        norm = engine.get_global_grad_norm()
        last.grad_norm = float(norm) if norm is not None else 0.0
        return last

    return engine, report


def _trace(trial: Trial, rows: int, engine: Any, folder: Path) -> dict[str, Any]:
    """A trace of one step and the next forward, as Chrome reads it, and when the host updated."""
    updates: list[tuple[float, float]] = []
    homes = engine.sharded.homes
    count = homes.count_update

    def counted(num_bytes: int, seconds: float) -> None:
        updates.append((time.time() - seconds, seconds))
        count(num_bytes, seconds)

    homes.count_update = counted
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trial.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for step in range(2):
            engine.backward(engine(_batch(trial, rows, step)))
            engine.step()
    homes.count_update = count
    with tempfile.TemporaryDirectory() as place:
        profiler.export_chrome_trace(f"{place}/trace.json")
        trace = json.loads(Path(f"{place}/trace.json").read_text())
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    spans: dict[str, list[tuple[float, float]]] = {"kernel": [], "DtoH": [], "HtoD": [], "update": []}
    for event in trace["traceEvents"]:
        kind = event.get("cat")
        way = next((w for w in ("DtoH", "HtoD") if kind == "gpu_memcpy" and w in event["name"]), None)
        if kind == "kernel" or way:
            spans[way or "kernel"].append((event["ts"], event["dur"]))
    spans["update"] = [(start * 1e6 - base, seconds * 1e6) for start, seconds in updates]
    folder.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(json.dumps(trace).encode())
    if len(packed) <= TRACE_LIMIT_BYTES:
        (folder / "offload_trace.json.gz").write_bytes(packed)
    lanes = {name: _merged(each) for name, each in spans.items()}
    (folder / "offload_lanes.json").write_text(json.dumps(lanes))
    shares = {name: _covered(lanes[name], lanes["kernel"]) for name in ("DtoH", "HtoD", "update")}
    return {"bytes": len(packed), "share_under_kernels": shares}


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start, end) in microseconds, those that touch as one."""
    found: list[tuple[float, float]] = []
    for start, duration in sorted(spans):
        if found and start <= found[-1][1] + 20:
            found[-1] = (found[-1][0], max(found[-1][1], start + duration))
        else:
            found.append((start, start + duration))
    return found


def _covered(spans: list[tuple[float, float]], by: list[tuple[float, float]]) -> float | None:
    """The share of the spans' time that lies under the others'; None where there are none."""
    total = sum(b - a for a, b in spans)
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in spans for c, d in by) / total if total else None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["overlaps"] = tuple(given.get("overlaps", (True,)))
    print(MARK + json.dumps(run(Trial(**given))), flush=True)
