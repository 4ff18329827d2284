"""`tritonspeed check ds_config.json`: what became of each key, without a GPU, without torch, in a second.

Refused keys come first, and make the exit status 1, as does any mistake in the config.
"""

import argparse
import json
import math
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tritonspeed.config import Answer, Config, ConfigWarning, ModelFacts, load

STYLES = {"refused": "bold red", "mapped": "cyan", "inert": "dim", "honoured": "green"}
WIDTH_OF_A_PIPE = 160  # columns where the output is no terminal: a table folded at 80 cannot be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `check`."""
    parser.add_argument("config", help="path of a ds_config.json (JSON or hjson), or base64 of one")
    parser.add_argument(
        "--world", type=int, metavar="N", help="data-parallel ranks (default: what the batch sizes imply)"
    )
    parser.add_argument("--hidden-size", type=int, metavar="H", help='hidden size of the model, for "auto" sizes')
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table of answers. Returns 1 if a key is refused or the config has a mistake, else 0."""
    if args.world is not None and args.world < 1:
        raise ValueError(f"--world {args.world} must be at least 1")
    answers: list[Answer] = []
    errors: list[str] = []
    world_size = args.world or 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigWarning)  # the table says the same of unknown keys
            config = load(args.config)
        world_size = args.world or config.implied_world_size or 1
        answers, errors = _answers(config, world_size, args.hidden_size)
    except ValueError as error:
        errors.append(str(error))
    if args.json:
        _print_json(args.config, world_size, answers, errors)
    else:
        _print_table(args.config, world_size, answers, errors)
    return 1 if errors or any(each.verdict == "refused" for each in answers) else 0


def _answers(config: Config, world_size: int, hidden_size: int | None) -> tuple[list[Answer], list[str]]:
    """The rows, refused ones first; where the config cannot be resolved, those of the config as it stands."""
    errors = []
    try:
        config = config.resolve(world_size, ModelFacts(hidden_size=hidden_size), allow_refused=True)
    except ValueError as error:
        errors.append(str(error))
    return sorted(config.answers(), key=lambda each: each.verdict != "refused"), errors


def _print_table(name: str, world_size: int, answers: list[Answer], errors: list[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    if answers:
        table = Table(title=f"{_cut(name)} on {world_size} rank{'s' if world_size > 1 else ''}", title_justify="left")
        table.add_column("key", no_wrap=console.width >= 120, overflow="fold")
        table.add_column("given", overflow="fold")
        table.add_column("resolved", overflow="fold")
        table.add_column("verdict", no_wrap=True)
        table.add_column("what it does here")
        for each in answers:
            values = [Text(_cut(_show(value), 24)) for value in (each.given, each.resolved)]
            table.add_row(Text(each.key), *values, Text(each.verdict, style=STYLES[each.verdict]), Text(each.note))
        console.print(table)
        console.print(_summary(answers))
    complain = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    for error in errors:
        complain.print(Text("error: ", style="bold red") + Text(error))


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _summary(answers: list[Answer]) -> str:
    counts = {verdict: sum(each.verdict == verdict for each in answers) for verdict in STYLES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _print_json(name: str, world_size: int, answers: list[Answer], errors: list[str]) -> None:
    rows = [{field: _plain(value) for field, value in vars(each).items()} for each in answers]
    report = {"config": name, "world_size": world_size, "answers": rows, "errors": errors}
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
