"""What every bench shares: timing, roofs, the machine's header, the table and the JSON it leaves.

A bench names the bytes or flops an operation must move, hands over all variants at once, and gets medians that were
taken in turns: a neighbour's load or a clock change hits each of them alike. On a GPU each call meets buffers that have
left the cache, because they are taken in rotation from more of them than the cache holds, and a spin kernel in front
lets the host run ahead, so that launches are not counted.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

Buffers = TypeVar("Buffers")

RESULTS = Path(__file__).parent / "results"
CACHES_TO_FLUSH = 3  # rotate through this many times the last-level cache
SPIN_CYCLES = 1_000_000  # about half a millisecond: longer than any launch sequence here


@dataclass(frozen=True)
class Peak:
    """A data sheet's figures, dense, without sparsity."""

    memory_gb_per_s: float
    bf16_tflop_per_s: float


PEAKS = {  # the name as the driver gives it → data sheet
    "NVIDIA A100-SXM4-40GB": Peak(1555, 312),
    "NVIDIA A100-SXM4-80GB": Peak(2039, 312),
    "NVIDIA H100 80GB HBM3": Peak(3350, 989),
    "NVIDIA H100 PCIe": Peak(2039, 756),
    "NVIDIA H200": Peak(4800, 989),
    "NVIDIA L40S": Peak(864, 362),
    "NVIDIA GeForce RTX 4090": Peak(1008, 165),
    "AMD Instinct MI300X": Peak(5300, 1307),
}


@dataclass(frozen=True)
class Row:
    """One variant on one shape. The peak is the data sheet's, the stream is ``stream_gb_per_s``, measured."""

    shape: str
    variant: str
    is_ours: bool
    num_elems: int
    bytes_moved: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    ns_per_elem: float
    gb_per_s: float
    percent_of_peak: float | None
    percent_of_stream: float


def device_from(arguments: argparse.Namespace) -> torch.device:
    """The device asked for, or a GPU where there is one."""
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def parser(description: str) -> argparse.ArgumentParser:
    """The options every bench has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    p.add_argument("--rounds", type=int, default=15, help="how often each variant is timed")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="intra-op threads (CPU)")
    return p


def _text_of(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def device_name(device: torch.device) -> str:
    """The card's or the processor's marketing name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _text_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, object]:
    """What must be known to read a figure again next year."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    header: dict[str, object] = {
        "date": date.today().isoformat(),
        "commit": commit,
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        header |= {
            "num_sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "clocks": _nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"),
        }
    return header


def _version_of(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def _nvidia_smi(fields: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def num_rotations(set_bytes: int, device: torch.device) -> int:
    """How many sets of buffers it takes until the first has left the cache; 1 on a CPU: choose shapes above it."""
    if device.type != "cuda":
        return 1
    return 1 + -(-CACHES_TO_FLUSH * torch.cuda.get_device_properties(device).L2_cache_size // set_bytes)


def time_call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: events on a GPU, the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def interleaved_ms(
    variants: dict[str, Callable[[Buffers], object]], sets: Sequence[Buffers], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Every variant once a round, each round starting with another one, after two rounds that warm up and are dropped.

    Args:
        variants: name → what to time; it gets one of ``sets``.
        sets: buffers in rotation, ``num_rotations`` of them.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = 0
    for r in range(-2, rounds):
        for k in range(len(names)):
            name = names[(r + k) % len(names)]
            buffers = sets[calls % len(sets)]
            calls += 1
            elapsed = time_call_ms(lambda name=name, buffers=buffers: variants[name](buffers), device)
            if r >= 0:
                times[name].append(elapsed)
    return times


def stream_gb_per_s(device: torch.device, rounds: int = 7) -> float:
    """The measured roof: read and write one big buffer in place, as an optimizer does."""
    x = torch.zeros(64 * 2**20 if device.type == "cpu" else 256 * 2**20, device=device)
    best = min(time_call_ms(lambda: x.add_(1.0), device) for _ in range(rounds))
    return 2 * x.numel() * x.element_size() / best / 1e6


def rows_of(
    shape: str,
    times: dict[str, list[float]],
    ours: set[str],
    num_elems: int,
    bytes_moved: int,
    device: torch.device,
    stream: float,
) -> list[Row]:
    """The figures of one shape; every variant is charged the bytes that the operation must move, not what it moves."""
    peak = PEAKS.get(device_name(device))
    rows = []
    for variant, values in times.items():
        median = statistics.median(values)
        p20, *_, p80 = statistics.quantiles(values, n=5)
        speed = bytes_moved / median / 1e6
        rows.append(
            Row(
                shape=shape,
                variant=variant,
                is_ours=variant in ours,
                num_elems=num_elems,
                bytes_moved=bytes_moved,
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                ns_per_elem=1e6 * median / num_elems,
                gb_per_s=speed,
                percent_of_peak=100 * speed / peak.memory_gb_per_s if peak else None,
                percent_of_stream=100 * speed / stream,
            )
        )
    return rows


def losses(rows: Sequence[Row]) -> list[str]:
    """Every shape where a peer's median is below our best one."""
    found = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        ours = min((row for row in here if row.is_ours), key=lambda row: row.median_ms)
        found += [
            f"{shape}: {row.variant} {row.median_ms:.3f} ms, ours ({ours.variant}) {ours.median_ms:.3f} ms"
            for row in here
            if not row.is_ours and row.median_ms < ours.median_ms
        ]
    return found


def report(what: str, rows: Sequence[Row], device: torch.device, stream: float, out: Path) -> Path:
    """Print losses, then the table; write both with the machine's header to ``<date>_<device>_<what>.json``."""
    console = Console(width=150)
    lost = losses(rows)
    console.print(
        f"[bold]{what}[/] on {device_name(device)}, stream {stream:.1f} GB/s; a peer wins on:", lost or "none"
    )
    table = Table("shape", "variant", "median ms", "p20", "p80", "ns/element", "GB/s", "% of peak", "% of stream")
    for row in rows:
        peak = "-" if row.percent_of_peak is None else f"{row.percent_of_peak:.1f}"
        table.add_row(
            row.shape, row.variant, f"{row.median_ms:.3f}", f"{row.p20_ms:.3f}", f"{row.p80_ms:.3f}",
            f"{row.ns_per_elem:.3f}", f"{row.gb_per_s:.1f}", peak, f"{row.percent_of_stream:.1f}",
        )  # fmt: skip
    console.print(table)
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(device)).split()).lower()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{date.today().isoformat()}_{name}_{what}.json"
    record = {"machine": machine(device), "stream_gb_per_s": stream, "losses": lost, "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {path}")
    return path
