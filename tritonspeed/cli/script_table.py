"""The report on a script as a table of one screen: refused names first, what simply works together in a few rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tritonspeed.cli.check_script import ORDER, Row, ScriptReport

STYLES = {"refused": "bold red", "warning": "yellow", "inert": "dim", "honoured": "green"}
MOST_PLACES = 4
WORKS = "as in DeepSpeed"
WIDE = 110  # columns from which the table is drawn with lines


def print_scripts(report: ScriptReport, console: Console) -> None:
    """The table, a line of counts, and how to start the script."""
    title = ", ".join(report.asked[:3]) + (f" and {len(report.asked) - 3} more" if len(report.asked) > 3 else "")
    if report.imported:
        title += f", with {_count(len(report.imported), 'file')} imported from beside it"
    if report.rows:
        console.print(_wide(report, title) if console.width >= WIDE else _narrow(report, title))
    counts = {verdict: sum(row.verdict == verdict for row in report.rows) for verdict in ORDER}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(Text(said or f"nothing of deepspeed in {title or 'it'}"))
    if report.start:
        console.print(Text(report.start, style="bold"))


def _wide(report: ScriptReport, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("name", overflow="fold", ratio=9)
    table.add_column("where", overflow="fold", ratio=5)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what it does here", overflow="fold", ratio=11)
    for row in _grouped(report.rows):
        style = STYLES[row.verdict]
        table.add_row(Text(row.name), Text(_places(row.places)), Text(row.verdict, style=style), Text(row.note))
    return table


def _narrow(report: ScriptReport, title: str) -> Table:
    """For a small window: no lines, the note under its name, and what simply works in one row."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = _grouped(report.rows)
    for row in rows:
        if row.note != WORKS:
            line = Text.assemble((row.name, "bold"), "  ", (_places(row.places), "dim"), "\n", row.note)
            table.add_row(Text(row.verdict, style=STYLES[row.verdict]), line)
    works = [row.name for row in rows if row.note == WORKS]
    if works:
        table.add_row(Text("honoured", style=STYLES["honoured"]), Text("; ".join(works)))
    return table


def script_facts(report: ScriptReport) -> dict[str, Any]:
    """The same for JSON."""
    return {**asdict(report), "fails": report.fails}


def _grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows with nothing to say, one for each module or kind of object; the others as they are."""
    groups: dict[str, Row] = {}
    made = []
    for row in rows:
        if row.verdict != "honoured" or row.note:
            made.append(row)
            continue
        module, _, name = row.name.rpartition(".")
        group = groups.get(module)
        if group is None:
            group = groups[module] = Row(row.name, "honoured", WORKS, [])
            made.append(group)
        else:
            group.name += f", {name}"
        group.places += [place for place in row.places if place not in group.places]
    return made


def _places(places: list[str]) -> str:
    """``a.py:3, 8, 12 b.py:2``, the first few."""
    by_file: dict[str, list[int]] = {}
    for place in places:
        name, _, line = place.rpartition(":")
        by_file.setdefault(name, []).append(int(line))
    parts, left = [], len(places)
    for name, lines in by_file.items():
        shown = sorted(lines)[: max(0, MOST_PLACES - (len(places) - left))]
        if shown:
            parts.append(f"{name}:{', '.join(map(str, shown))}")
            left -= len(shown)
    return "; ".join(parts) + (f" +{left}" if left else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
