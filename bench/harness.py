"""What every bench shares: timing, roofs, the machine's header, the table and the JSON it leaves.

A bench names the bytes or flops an operation must move, hands over all variants at once, and gets medians that were
taken in turns, as the tuner takes them (`tritonspeed/tuning/timing.py`).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tritonspeed.tuning.timing import (
    PEAKS,
    Peak,
    device_name,
    interleaved_ms,
    num_rotations,
    stream_gb_per_s,
    time_call_ms,
)

__all__ = [
    "PEAKS",
    "RESULTS",
    "Peak",
    "Row",
    "device_from",
    "device_name",
    "interleaved_ms",
    "losses",
    "machine",
    "num_rotations",
    "parser",
    "report",
    "rows_of",
    "stream_gb_per_s",
    "time_call_ms",
]

RESULTS = Path(__file__).parent / "results"


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
