"""`tritonspeed check ds_config.json --script train.py`: what becomes of each key and of each name of deepspeed that the
script uses, before anything runs: without a GPU, without torch, in a second.

What is refused comes first, and makes the exit status 1, as does any mistake in the config.
"""

import argparse
import json
import math
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tritonspeed.cli.check_script import ScriptReport, check_scripts
from tritonspeed.cli.script_table import print_scripts, script_facts
from tritonspeed.config import Answer, Config, ConfigWarning, ModelFacts, load
from tritonspeed.config.keys import AUTO

STYLES = {"refused": "bold red", "mapped": "cyan", "inert": "dim", "honoured": "green"}
WIDTH_OF_A_PIPE = 160  # columns where the output is no terminal: a table folded at 80 cannot be read

FILL_AUTO = {"transformers", "trl"}  # their TrainingArguments take the place of "auto" before the config gets here
LONGEST_KEY = 53  # columns: a note may begin with a key's new name, which is to stand on one line of a pipe's table
MOST_OF_A_VALUE = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `check`."""
    parser.add_argument("config", nargs="?", help="path of a ds_config.json (JSON or hjson), or base64 of one")
    parser.add_argument(
        "--script",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="scripts, notebooks or folders of them: what becomes of the names of deepspeed in them",
    )
    parser.add_argument(
        "--world", type=int, metavar="N", help="data-parallel ranks (default: what the batch sizes imply)"
    )
    parser.add_argument("--hidden-size", type=int, metavar="H", help='hidden size of the model, for "auto" sizes')
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


@dataclass
class _Checked:
    """What is known of the config."""

    name: str | None
    world_size: int
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Print the tables. Returns 1 if a key or a name is refused, or there is a mistake in what was read, else 0."""
    if args.config is None and not args.script:
        raise ValueError("name a ds_config.json, a script with --script, or both")
    if args.world is not None and args.world < 1:
        raise ValueError(f"--world {args.world} must be at least 1")
    scripts = check_scripts(Path(path) for path in args.script) if args.script else None
    config = _check_config(args)
    if scripts is not None and FILL_AUTO & {row.name for row in scripts.rows}:
        config.answers = [_filled_before(each) for each in config.answers]
    if args.json:
        _print_json(config, scripts)
    else:
        _print(config, scripts)
    fails = bool(config.errors) or any(each.verdict == "refused" for each in config.answers)
    return 1 if fails or (scripts is not None and scripts.fails) else 0


def _check_config(args: argparse.Namespace) -> _Checked:
    checked = _Checked(args.config, args.world or 1)
    if args.config is None:
        return checked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)  # the table says the same of unknown keys
            config = load(args.config)
        checked.world_size = args.world or config.implied_world_size or 1
        checked.answers, checked.errors = _answers(config, checked.world_size, args.hidden_size)
    except ValueError as error:
        checked.errors.append(str(error))
    return checked


def _answers(config: Config, world_size: int, hidden_size: int | None) -> tuple[list[Answer], list[str]]:
    """The rows, refused ones first; where the config cannot be resolved, those of the config as it stands."""
    errors = []
    try:
        config = config.resolve(world_size, ModelFacts(hidden_size=hidden_size), allow_refused=True)
    except ValueError as error:
        errors.append(str(error))
    return sorted(config.answers(), key=lambda each: each.verdict != "refused"), errors


def _filled_before(each: Answer) -> Answer:
    """The row of a key that Hugging Face fills in: what it would be without is of no interest."""
    if each.given != AUTO or each.verdict == "refused":
        return each
    return replace(each, resolved=AUTO, note="Hugging Face fills it in, from TrainingArguments and the model")


def _print(config: _Checked, scripts: ScriptReport | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    if config.answers:
        _print_table(config, console)
    if config.answers and scripts is not None:
        console.print()
    if scripts is not None:
        print_scripts(scripts, console)
    complain = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    for error in [*config.errors, *(scripts.errors if scripts else [])]:
        complain.print(Text("error: ", style="bold red") + Text(error))


def _print_table(config: _Checked, console: Console) -> None:
    ranks = f"{config.world_size} rank{'s' if config.world_size > 1 else ''}"
    table = Table(title=f"{_cut(config.name or '')} on {ranks}", title_justify="left")
    table.add_column("key", overflow="fold", max_width=LONGEST_KEY)
    table.add_column("given", overflow="fold", max_width=MOST_OF_A_VALUE)
    table.add_column("resolved", overflow="fold", max_width=MOST_OF_A_VALUE)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what it does here", overflow="fold")
    for each in config.answers:
        values = [Text(_cut(_show(value), 24)) for value in (each.given, each.resolved)]
        table.add_row(Text(each.key), *values, Text(each.verdict, style=STYLES[each.verdict]), Text(each.note))
    console.print(table)
    console.print(_summary(config.answers))


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _summary(answers: list[Answer]) -> str:
    counts = {verdict: sum(each.verdict == verdict for each in answers) for verdict in STYLES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _print_json(config: _Checked, scripts: ScriptReport | None) -> None:
    rows = [{field: _plain(value) for field, value in vars(each).items()} for each in config.answers]
    report: dict[str, Any] = {
        "config": config.name,
        "world_size": config.world_size,
        "answers": rows,
        "errors": config.errors,
    }
    if scripts is not None:
        report["scripts"] = script_facts(scripts)
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")


def _plain(value: Any) -> Any:
    """JSON knows no infinity."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value == sys.maxsize:
        return "no limit"
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    return json.dumps(value, default=str) if isinstance(value, dict | list | tuple) else str(value)
