"""The kernel suite from the command line.

    python -m bench run [--out DIR] [--models gpt2 llama8b ...] [--ops layer_norm ...] [--time-limit SECONDS]
    python -m bench report [FILE ...]        tables and pictures from what `run` left; default: the newest result

`run` works from the source tree with whatever torch and triton the machine has; on a CPU it compares the references
with eager PyTorch on small shapes. It stops at the time limit with what it has, and says how many cases are left.
"""

import argparse
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.harness import RESULTS, device_name, machine
from bench.results_page import newest, save, write_report
from bench.suite import Suite, in_turns
from tritonspeed.tuning.cases import all_cases, families
from tritonspeed.tuning.shapes import MODELS, load_shapes

MAX_BYTES = {"cuda": 2**34, "cpu": 2**26}  # a case on a CPU is a smoke of the code, not a measurement of memory


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON, tables and pictures")
    run.add_argument("--models", nargs="+", default=["gpt2", "llama8b"], help=f"{', '.join(MODELS)}, or a JSON file")
    run.add_argument("--ops", nargs="+", help=f"case families: {', '.join(families())}; default all")
    run.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    run.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    run.add_argument("--rounds", type=int, default=10, help="how often each variant is timed")
    run.add_argument("--time-limit", type=float, default=3600.0, help="seconds")
    run.add_argument("--skip", nargs="+", default=[], help="peers to leave out, by a part of their name")
    run.add_argument("--what", default="kernels", help="what the result's file is called")
    run.add_argument("--max-bytes", type=float, help="leave out cases that move more")
    report = commands.add_parser("report", help="tables and pictures")
    report.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        _run(arguments)
    else:
        for file in arguments.files or [newest(RESULTS)]:
            write_report(file, Console(width=150))


def _run(arguments: argparse.Namespace) -> None:
    until = time.monotonic() + arguments.time_limit
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype)
    by_label = {
        case.label: (model, case)
        for model in arguments.models
        for case in in_turns(all_cases([load_shapes(model)], dtype, arguments.ops).values())
    }
    unique = list(by_label.values())
    console = Console(width=150)
    suite = Suite.on(device)
    suite.skipped = tuple(arguments.skip)
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(device)).split()).lower()
    path = arguments.out / f"{date.today().isoformat()}_{name}_{arguments.what}-{arguments.dtype}.json"
    header = machine(device)
    columns = TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(unique))
        for case in suite.run(unique, arguments.rounds, until, int(arguments.max_bytes or MAX_BYTES[device.type])):
            progress.update(task, advance=1, description=case.label)
            save(path, suite, header)  # after every case: a kill loses one
    save(path, suite, header)
    write_report(path, console)
    if suite.num_left:
        console.print(f"the time was up: {suite.num_left} cases were not measured")


if __name__ == "__main__":
    main()
