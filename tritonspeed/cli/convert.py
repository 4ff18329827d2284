"""`tritonspeed convert`: one kind of checkpoint made into another.

    tritonspeed convert runs/exp1 weights/ --to huggingface --dtype bf16     the newest checkpoint, as plain weights
    tritonspeed convert deepspeed_runs/exp1 runs/exp2/global_step500         DeepSpeed's, to go on from here
    tritonspeed convert runs/exp1 universal/ --to universal --tag global_step500

What is read is told by the files in it: tritonspeed's, DeepSpeed's of ZeRO stages 1 to 3, its universal checkpoints,
safetensors. Nothing is unpickled but tensors and plain values. Memory is a few parts of a few megabytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `--help` does not wait for torch
    from tritonspeed.checkpoint.convert import Conversion

TARGETS = ("tritonspeed", "universal", "huggingface")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `convert`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = __doc__.split("\n\n", 1)[1] if __doc__ else None
    parser.add_argument(
        "source", metavar="SOURCE", help="a checkpoint, a folder of checkpoints, or a .safetensors file"
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="what to make, and not there yet; of tritonspeed's: SAVE_DIR/TAG, which `latest` will name",
    )
    parser.add_argument("--to", choices=TARGETS, default=TARGETS[0], help="what to make (default: %(default)s)")
    parser.add_argument("-t", "--tag", help="which of a folder of checkpoints (default: the one that `latest` names)")
    parser.add_argument("--dtype", choices=DTYPES, help="of plain weights (default: what modules computed with)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file of plain weights (default: %(default)s)"
    )
    parser.add_argument("--exclude-frozen", action="store_true", help="leave out what is not trained")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done. Returns 0.

    Raises:
        ValueError: something asked for is not there, or the checkpoint is damaged; the text says which and why.
    """
    import torch

    from tritonspeed.checkpoint import CheckpointError
    from tritonspeed.checkpoint.convert import convert
    from tritonspeed.checkpoint.weights_file import parse_shard_size

    try:
        with progress("converted") as tell:
            done = convert(
                args.source,
                args.target,
                to=args.to,
                tag=args.tag,
                dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else None,
                max_shard_bytes=parse_shard_size(args.max_shard_size),
                exclude_frozen=args.exclude_frozen,
                on_progress=tell,
            )
    except (CheckpointError, OSError) as error:
        raise ValueError(str(error)) from error
    _say(done)
    return 0


def _say(done: Conversion) -> None:
    print(f"read     {done.source}: {done.kind}, {done.num_parameters:,} parameters, {done.num_elems:,} values")
    print(f"wrote    {done.target}: {done.num_bytes:,} bytes")
    for what in done.left_out:
        print(f"left out {what}")


@contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere: call it with how much is done and how much there is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bars:
        task = bars.add_task(verb, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
