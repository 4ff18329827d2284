"""A bar on the terminal while a checkpoint is read: on one rank, where somebody looks, and only if it takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LEAST_BYTES = 256 * 2**20  # a tenth of a second from a disk


@contextmanager
def progress(what: str, total_bytes: int, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Draw a bar on stderr, on rank 0 alone, if stderr is a terminal and there is much to read.

    Args:
        what: stands before it: "loading global_step12".
        total_bytes: of all that will be told of.

    Yields:
        what is to be told of bytes as they are read, from any thread.
    """
    if rank != 0 or total_bytes < LEAST_BYTES or not sys.stderr.isatty():
        yield _ignore
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}", markup=False), *columns, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _ignore(num_bytes: int) -> None:
    """Nobody looks."""
