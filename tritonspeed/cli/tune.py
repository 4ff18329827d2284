"""`tritonspeed tune`: time the kernels' launch configurations on this GPU and keep the fastest.

    tritonspeed tune --shapes llama8b                 every kernel, at the shapes of a model
    tritonspeed tune --kernel layer_norm --shapes my_config.json --time-limit 120
    tritonspeed tune --list --card sm_90              what would be tuned, anywhere

Killed or out of time, it keeps what it has timed and goes on there. Under `torchrun -m tritonspeed.cli tune ...` rank 0
tunes and the others wait and compare.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tritonspeed import comm, tuning
from tritonspeed.kernels.cards import CARDS, Card
from tritonspeed.kernels.store import default_folder
from tritonspeed.kernels.tuned import TUNABLES, features_key, fields_of
from tritonspeed.tuning import MODELS, Case, Job, Outcome, Search, all_cases, load_shapes
from tritonspeed.tuning.cases import families
from tritonspeed.tuning.planning import OnProgress, import_all_tunables
from tritonspeed.tuning.tuner import DECISIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SHAPES = ("llama8b",)
DEFAULT_CARD = "sm_90"
WIDTH_OF_A_PIPE = 160
STYLES = {"tuned": "green", "heuristic": "cyan", "known": "dim", "rejected": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="families, operations or tunables (default: all)")
    parser.add_argument(
        "--shapes", nargs="+", metavar="MODEL|FILE", default=list(DEFAULT_SHAPES),
        help=f"{', '.join(MODELS)}, a Hugging Face config.json, or sizes in JSON (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default: %(default)s")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after so many seconds with what there is")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: the user's own)")
    parser.add_argument("--again", action="store_true", help="search also what is known already")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that compile (default: one per core)")
    parser.add_argument("--list", action="store_true", help="show what would be tuned, after compiling; needs no GPU")
    parser.add_argument("--card", choices=CARDS, help=f"with --list: for this card (default: {DEFAULT_CARD})")
    parser.add_argument(
        "--deterministic", action="store_true", help="with --list: show what is launched without the user's folder"
    )


def run(args: argparse.Namespace) -> int:
    """Tune, or list. Returns 1 where nothing could be timed or a kernel is wrong, else 0."""
    _check(args)
    cases = _cases(args)
    if args.list:
        return _list(args, cases)
    if not torch.cuda.is_available():
        return _explain_no_gpu(args, cases)
    comm.init_distributed()
    mesh = comm.mesh_of()
    search = Search(time_limit_s=args.time_limit, again=args.again, num_workers=args.workers)
    with _progress(is_hidden=mesh.rank != 0) as tell:
        outcomes = tuning.tune(
            cases, _folder(args), names=_names(args, cases), search=search, mesh=mesh, on_progress=tell
        )
    if mesh.rank == 0:
        _print_outcomes(outcomes, _folder(args))
    return 1 if any(outcome.verdict == "skipped" for outcome in outcomes) else 0


def _check(args: argparse.Namespace) -> None:
    if args.time_limit is not None and args.time_limit <= 0:
        raise ValueError(f"--time-limit {args.time_limit:g} must be more than 0 seconds")
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers {args.workers} must be at least 0, which compiles in this process")
    if (args.card or args.deterministic) and not args.list:
        raise ValueError("--card and --deterministic are for --list: what is timed is this machine's GPU")


def _folder(args: argparse.Namespace) -> Path:
    folder = args.out or comm.tuned_folder() or default_folder()
    if folder is None:
        raise ValueError("this user has no home folder to keep results in: name one with --out DIR")
    return Path(folder)


def _cases(args: argparse.Namespace) -> list[Case]:
    """All cases that may be concerned, those of the named families first narrowed down."""
    models = [load_shapes(name) for name in args.shapes]
    found = [all_cases(models, DTYPES[name]) for name in args.dtype]
    wanted = set(args.kernel or ())
    if wanted:
        import_all_tunables()
        operations = {case.name for by_family in found for cases in by_family.values() for case in cases}
        unknown = wanted - set(families()) - operations - set(TUNABLES)
        if unknown:
            raise ValueError(
                f"--kernel {' '.join(sorted(unknown))}: there is no such kernel; families: {', '.join(families())};"
                f" operations: {', '.join(sorted(operations))}; tunables: {', '.join(sorted(TUNABLES))}"
            )
    by_name = not wanted <= set(families())  # an operation or tunable may be asked for by any family's cases
    chosen = [by_family.items() for by_family in found]
    return [
        case
        for items in chosen
        for family, cases in items
        if by_name or not wanted or family in wanted
        for case in cases
    ]


def _names(args: argparse.Namespace, cases: Sequence[Case]) -> list[str] | None:
    """Operations and tunables to keep to; a family stands for its operations."""
    if not args.kernel:
        return None
    names = set(args.kernel)
    models = [load_shapes(name) for name in args.shapes]
    for dtype in args.dtype:
        of_families = all_cases(models, DTYPES[dtype], names & set(families()))
        names |= {case.name for some in of_families.values() for case in some}
    return sorted(names)


def _list(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    card = CARDS[args.card or DEFAULT_CARD]
    if args.card is None and torch.cuda.is_available():
        from tritonspeed.kernels._triton import card_of

        card = card_of(torch.empty(0, device="cuda"))
    tuning.use(None if args.deterministic else _folder(args), deterministic=args.deterministic)
    with _progress(is_hidden=False) as tell:
        jobs = tuning.plan(cases, card, _names(args, cases))
        deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
        tuning.prune(jobs, card, args.workers, deadline, on_progress=tell)
    _console().print(_jobs_table(jobs, card))
    return 0


def _jobs_table(jobs: Sequence[Job], card: Card) -> Table:
    allowed, all_of_them = (
        sum(len(part(job)) for job in jobs) for part in (lambda j: j.allowed, lambda j: j.candidates)
    )
    title = f"{len(jobs)} decisions on {card.key}: {allowed} of {all_of_them} candidates compile well"
    table = Table("tunable", "features", "timed on", "candidates", "dropped", "launched now", title=title)
    for job in jobs:
        now, heuristic = job.tunable.resolve(card, **job.features), job.candidates[0].launch
        taken = features_key(fields_of(now)) + ("" if now != heuristic else " (heuristic)")  # type: ignore[arg-type]
        dropped = ", ".join(f"{count} {reason}" for reason, count in job.refusals.items())
        counts = f"{len(job.allowed)} of {len(job.candidates)}"
        table.add_row(job.key[0], job.key[1] or "-", job.case.label, counts, escape(dropped), taken)
    return table


def _explain_no_gpu(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    card = CARDS[DEFAULT_CARD]
    jobs = tuning.plan(cases, card, _names(args, cases))
    num_candidates = sum(len(job.candidates) for job in jobs)
    by_name: dict[str, int] = {}
    for job in jobs:
        by_name[job.key[0]] = by_name.get(job.key[0], 0) + 1
    said = ", ".join(f"{name} ({count})" for name, count in sorted(by_name.items()))
    print(
        "There is no GPU here, so there is nothing to time: nothing was tuned, and every kernel takes the configuration"
        f" that its heuristic works out.\nOn an H100 ({DEFAULT_CARD}) these shapes ask for {len(jobs)} decisions among"
        f" {num_candidates} candidates: {said}.\n`tritonspeed tune --list --card {DEFAULT_CARD}` compiles them here and"
        " shows each.",
        file=sys.stderr,
    )
    return 1


def _print_outcomes(outcomes: Sequence[Outcome], folder: Path) -> None:
    console = _console()
    table = Table("tunable", "features", "timed on", "verdict", "faster by", "configuration", "candidates", "notes")
    for outcome in outcomes:
        verdict = f"[{STYLES.get(outcome.verdict, 'red')}]{outcome.verdict}[/]"
        launch = features_key(outcome.launch) if outcome.launch else "-"  # type: ignore[arg-type]
        gain = f"{100 * outcome.gain:.1f} %" if outcome.gain else "-"
        counts = f"{outcome.num_timed} of {outcome.num_candidates}"
        notes = escape("; ".join(outcome.why))
        table.add_row(
            outcome.tunable, features_key(outcome.features) or "-", outcome.case, verdict, gain, launch, counts, notes
        )  # fmt: skip
    console.print(table)
    verdicts = [outcome.verdict for outcome in outcomes]
    counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    console.print(f"{counted or 'nothing to tune'}; kept in {folder}", highlight=False)
    if "out of time" in verdicts:
        console.print("The same command goes on where the time ran out.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE, highlight=False)


@contextmanager
def _progress(is_hidden: bool) -> Iterator[OnProgress]:
    """A live bar of the decisions and one of the work on the current one; on a pipe, a line per decision."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=is_hidden or not console.is_terminal, transient=True) as bars:
        whole, part = bars.add_task(DECISIONS, total=None), bars.add_task("", total=None, visible=False)

        def tell(what: str, done: int, total: int) -> None:
            if what == DECISIONS:
                bars.update(whole, completed=done, total=total)
                if not is_hidden and not console.is_terminal:
                    console.print(f"{done} of {total} {DECISIONS}")
            else:
                bars.update(part, description=what, completed=done, total=total, visible=True)

        yield tell
