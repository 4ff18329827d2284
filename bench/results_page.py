"""A suite's result as a file, and the page made of it: what is lost first, then every row, then the pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.suite import Absent, Ceilings, Row, Suite, lost


def save(path: Path, suite: Suite, machine: dict[str, object]) -> None:
    """Write one JSON: the machine, the ceilings, the rows, what was absent, how many cases were left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine,
        "ceilings": asdict(suite.ceilings),
        "num_left": suite.num_left,
        "absent": [asdict(each) for each in suite.absent],
        "rows": [asdict(row) for row in suite.rows],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], Ceilings, list[Row], list[Absent]]:
    """Read what ``save`` wrote: (the whole record, ceilings, rows, absent variants)."""
    record = json.loads(path.read_text())
    rows = [Row(**row) for row in record["rows"]]
    return record, Ceilings(**record["ceilings"]), rows, [Absent(**each) for each in record["absent"]]


def newest(folder: Path) -> Path:
    """The newest result of the kernel suite.

    Raises:
        SystemExit: there is none.
    """
    found = sorted(folder.glob("*_kernels-*.json"))
    if not found:
        raise SystemExit(f"no *_kernels-*.json in {folder}: measure first with `python -m bench run`")
    return found[-1]


def write_report(path: Path, console: Console) -> Path:
    """Write the page and the pictures beside a result, and print what is lost.

    Returns:
        The page, a Markdown file beside ``path``.
    """
    record, ceilings, rows, absent = load(path)
    page = path.with_suffix(".md")
    lines = _header(path.stem, record, ceilings)
    lines += _losses(rows)
    for op in dict.fromkeys(row.op for row in rows):
        lines += _table(op, [row for row in rows if row.op == op])
    lines += _absences(absent)
    lines += _pictures(path, rows, ceilings)
    page.write_text("\n".join(lines) + "\n")
    console.print("\n".join(_losses(rows)), markup=False)
    console.print(f"written: {page}")
    return page


def _header(title: str, record: dict[str, Any], ceilings: Ceilings) -> list[str]:
    machine = record["machine"]
    left = f" {record['num_left']} cases were not reached before the time limit." if record["num_left"] else ""
    return [
        f"# {title}",
        "",
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']},"
        f" {machine['date']}. Measured ceilings: {ceilings.gb_per_s:.1f} GB/s in place,"
        f" {ceilings.tflop_per_s:.2f} TFLOP/s in a matmul.{left}",
        "",
    ]


def _losses(rows: Sequence[Row]) -> list[str]:
    pairs = lost(rows)
    num_cases = len({row.case for row in rows})
    lines = [f"## Where a peer wins: {len(pairs)} of {num_cases} cases", ""]
    if pairs:
        lines += [
            "| op | direction | shape | type | ours µs | peer | its µs | ours / peer |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for ours, best in pairs:
        lines.append(
            f"| {ours.op} | {ours.direction} | {ours.shape} | {ours.dtype} | {ours.median_us:.1f} | {best.variant} |"
            f" {best.median_us:.1f} | {ours.median_us / best.median_us:.2f} |"
        )
    return [*lines, ""]


def _table(op: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {op}",
        "",
        "| direction | shape | type | variant | kernel µs (p20-p80) | with Python | GB/s | TFLOP/s | % of peak |"
        " % of ceiling | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = "-" if row.percent_of_peak is None else f"{row.percent_of_peak:.0f}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        variant = f"**{row.variant}**" if row.is_ours else row.variant
        lines.append(
            f"| {row.direction} | {row.shape} | {row.dtype} | {variant} |"
            f" {row.median_us:.1f} ({row.p20_us:.1f}-{row.p80_us:.1f}) | {row.with_python_us:.1f} |"
            f" {row.gb_per_s:.1f} | {row.tflop_per_s:.2f} | {peak} | {row.percent_of_ceiling:.0f} | {error} |"
        )
    return [*lines, ""]


def _absences(absent: Sequence[Absent]) -> list[str]:
    if not absent:
        return []
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in absent:
        reasons.setdefault((each.variant, each.reason), []).append(each.case)
    lines = ["## What could not run", ""]
    for (variant, reason), cases in reasons.items():
        lines.append(f"- {variant}: {reason} ({len(cases)} cases, first {cases[0]})")
    return [*lines, ""]


def _pictures(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    try:
        from bench.pictures import draw_lines, draw_roofline
    except ImportError as error:
        return [f"No pictures: {error}."]
    lines, roofline = path.with_name(path.stem + "_lines.png"), path.with_name(path.stem + "_roofline.png")
    draw_lines(rows, lines)
    draw_roofline(rows, ceilings, roofline)
    return [f"![speed over size]({lines.name})", "", f"![roofline]({roofline.name})"]
