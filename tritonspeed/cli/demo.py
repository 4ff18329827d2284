"""`tritonspeed demo`: train a small language model under ZeRO, and draw its loss and where its bytes are.

Without a GPU two ranks on the CPU; with GPUs one rank on each. The ranks run `tritonspeed.cli.demo_train`; pictures and
the last words are made here, from the files they leave.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tritonspeed import config as configs
from tritonspeed.cli.demo_progress import console, mib, ranks
from tritonspeed.cli.demo_text import load_corpus
from tritonspeed.cli.launch import launch, threads_per_rank
from tritonspeed.cli.plan import Script, plan_single

CONFIG = Path(__file__).with_name("ds_config.json")  # examples/ds_config.json, for an installed package without it
RANKS_ON_A_CPU = 2
SECONDS = 100.0  # of training; the rest of the four minutes is for stages, evaluations, sample and a slower machine
LOSS_PICTURE, BYTES_PICTURE = "loss.png", "bytes.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    parser.add_argument("--config", default=str(CONFIG), help="a ds_config.json (default: the one of examples/)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for what it leaves (%(default)s)")
    parser.add_argument(
        "--data", metavar="PATH", help="a text file, or a folder of them (default: Python's standard library)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="default: one per GPU, or 2 on the CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="train no more steps than should fit into this (default: %(default)g)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="train this many, however long it takes")


def run(args: argparse.Namespace) -> int:
    """Train, draw, report. Returns the exit status of the ranks.

    Raises:
        ValueError: arguments, config or text that cannot be used.
    """
    start = time.perf_counter()
    num_ranks = _num_ranks(args)
    configs.load(args.config)
    load_corpus(args.data)  # a mistake is better told here than by every rank
    args.out.mkdir(parents=True, exist_ok=True)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(num_ranks))
    status = launch(plan_single(_script(args), num_ranks, {}, None).torchrun)
    if status != 0:
        return status
    summary = json.loads((args.out / "summary.json").read_text(encoding="utf-8"))
    _report(summary)
    _draw(args.out)
    console().print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def _num_ranks(args: argparse.Namespace) -> int:
    import torch

    num_gpus = torch.cuda.device_count()
    num_ranks = args.ranks if args.ranks is not None else num_gpus or RANKS_ON_A_CPU
    for name, value in (
        ("ranks", num_ranks),
        ("seconds", args.seconds),
        ("steps", 1 if args.steps is None else args.steps),
    ):
        if not value > 0:
            raise ValueError(f"--{name} {value} must be positive")
    if num_gpus and num_ranks > num_gpus:
        raise ValueError(
            f"--ranks {num_ranks} want a GPU each and {num_gpus} are visible: lower it, or set CUDA_VISIBLE_DEVICES to"
            " nothing for ranks on the CPU"
        )
    return num_ranks


def _script(args: argparse.Namespace) -> Script:
    words = ["--config", args.config, "--out", str(args.out), "--seconds", str(args.seconds)]
    words += ["--data", args.data] if args.data else []
    words += ["--steps", str(args.steps)] if args.steps else []
    return Script("module", "tritonspeed.cli.demo_train", tuple(words), pass_local_rank=False)


def _report(summary: dict[str, Any]) -> None:
    out = console()
    before, after = summary["held_out_loss"]["before"], summary["held_out_loss"]["after"]
    sample = summary["sample"]
    out.print(
        f"\n{summary['steps']} steps, {summary['tokens']:,} bytes read, in"
        f" {summary['training_seconds']:.0f} s: {summary['tokens_per_s']:,.0f} tokens/s on {ranks(summary['ranks'])}\n"
        f"held-out loss {before:.3f} before, {after:.3f} after (nats per byte; guessing is 5.545)\n"
    )
    out.print(Panel(Text(sample["text"]), title=f"what it writes, at temperature {sample['temperature']}"))
    out.print(_stage_table(summary))


def _stage_table(summary: dict[str, Any]) -> Table:
    losses = [row["losses"] for row in summary["stages"]]
    same = "the same to the last bit at every stage" if losses.count(losses[0]) == len(losses) else "NOT the same bits"
    table = Table(title=f"bytes of model state per rank, {ranks(summary['ranks'])}: measured / computed")
    for name in ("ZeRO stage", "between steps", "at the peak of a step", "loss after a few steps"):
        table.add_column(name, justify="right")
    for row in summary["stages"]:
        cells = []
        for when in ("rest_bytes", "peak_bytes"):
            cells.append(" / ".join(mib(sum(row[when][how].values())) for how in ("measured", "computed")))
        table.add_row(str(row["stage"]), *cells, f"{row['losses'][-1]:.6f}")
    table.caption = f"losses of rank 0: {same}"
    return table


def _draw(folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console().print("no pictures: matplotlib is not installed (pip install 'tritonspeed[plots]')")
        found = ""
    else:
        from tritonspeed.cli.demo_plot import draw_bytes, draw_loss

        draw_loss(folder, folder / LOSS_PICTURE)
        draw_bytes(folder, folder / BYTES_PICTURE)
        found = f"{LOSS_PICTURE}, {BYTES_PICTURE}, "
    console().print(f"in {folder}/: {found}metrics.jsonl, summary.json")
