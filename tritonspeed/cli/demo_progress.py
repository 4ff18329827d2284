"""The demo's progress: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tritonspeed.engine import StepReport

NUM_LINES = 20  # where there is no terminal
WIDTH_OF_A_PIPE = 140  # columns
WIDE = 130  # columns from which every fact has room


def console() -> Console:
    """Standard output; a pipe is given a width at which no line folds."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE, highlight=False, markup=False)


def mib(num_bytes: float) -> str:
    """``num_bytes`` in MiB, with the unit."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def ranks(num_ranks: int) -> str:
    """``num_ranks`` in words."""
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"


class Progress:
    """Context manager around the training loop.

    Args:
        num_steps: how many the bar is long.
        peak_bytes: what the estimate says one rank holds at most.
        measured: the word for a measured peak.
        hidden: show nothing, as all ranks but the first.
    """

    def __init__(self, num_steps: int, peak_bytes: int, measured: str, hidden: bool) -> None:
        self.num_steps, self.peak_bytes, self.measured = num_steps, peak_bytes, measured
        is_live = sys.stdout.isatty()
        self._line_every = 0 if hidden or is_live else max(1, num_steps // NUM_LINES)
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console(),
            refresh_per_second=4,
            expand=True,
            disable=hidden or not is_live,
        )
        self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, report: StepReport, held_out_loss: float, tokens_per_s: float, left_s: float) -> None:
        """The facts of one step; ``left_s`` is the time left, in seconds."""
        grad = f"|grad| {report.grad_norm:.2f}"
        if self._bar.console.width < WIDE:
            facts = f"loss {report.loss:.2f} · {grad} · {tokens_per_s:,.0f} tok/s ·"
            facts += f" {report.peak_bytes / 2**20:,.0f} of {self.peak_bytes / 2**20:,.0f} MiB"
        else:
            facts = f"loss {report.loss:.3f} · held out {held_out_loss:.3f} · {grad} · {tokens_per_s:,.0f} tokens/s ·"
            facts += f" {mib(report.peak_bytes)} {self.measured}, {mib(self.peak_bytes)} computed"
        self._bar.update(self._task, completed=report.step, description=facts)
        if self._line_every and report.step % self._line_every == 0:
            self._bar.console.print(f"step {report.step}/{self.num_steps} · {facts} · {left_s:.0f} s left")
