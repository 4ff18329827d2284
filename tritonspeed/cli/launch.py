"""torchrun in this process: the same arguments, but no rank outlives a failure, and the failure's words come last.

    python -m tritonspeed.cli.launch [--controlled] TORCHRUN ARGUMENTS

torchrun itself gives a rank 30 seconds after it asked it to end, and ends with a summary that holds no traceback.
Here a watcher thread looks after the ranks: GRACE_S seconds after the first one failed, or after Ctrl-C, it kills what
is left (a rank that is blocked inside a collective does not hear a polite signal). A second Ctrl-C kills at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tritonspeed.cli import failures
from tritonspeed.cli.rank_entry import LAUNCHER_VARIABLE

GRACE_S = 5.0
"""From the first failure, or Ctrl-C, to the kill: enough for a KeyboardInterrupt handler, short for who waits."""

TERMINATION_GRACE_S = 30.0
"""From SIGTERM to the kill: schedulers send it ahead of time, so that a script can save; torchrun's own number."""

_POLL_S = 0.1


class Watcher(threading.Thread):
    """Kills the ranks that are left some seconds after one of them failed or a signal came.

    Args:
        root: torchrun's log folder, where ranks leave word.
        signals: the reading end of a pipe to which `signal.set_wakeup_fd` writes each signal that this process gets.
    """

    def __init__(self, root: Path, signals: int) -> None:
        super().__init__(daemon=True)
        self.killed: set[int] = set()
        self._root = root
        self._signals = signals
        self._ended = threading.Event()
        self._deadline: float | None = None

    def run(self) -> None:
        """Until ``end``: a signal, or a failed rank, sets the moment at which the others are killed."""
        while not self._ended.is_set():
            readable, _, _ = select.select([self._signals], [], [], _POLL_S)
            for number in os.read(self._signals, 64) if readable else b"":
                self._bring_forward(0.0 if self._deadline else _grace_s(number))
            if self._deadline is None and any(_has_failed(rank) for rank in failures.started_ranks(self._root)):
                self._bring_forward(GRACE_S)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self.kill()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def kill(self) -> None:
        """Kill every rank that has not come to its end, with the processes it started."""
        for rank in failures.started_ranks(self._root):
            if _is_alive(rank.pid) and not rank.done:
                self.killed.add(rank.pid)
                _kill_group(rank.pid)

    def _bring_forward(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)


def launch(arguments: Sequence[str], *, log_level: str = "critical", controlled: bool = False) -> int:
    """Run torchrun with `arguments` and wait for it.

    Args:
        arguments: torchrun's, ending with the script and its arguments.
        log_level: of torchrun's own log, which has nothing that is not said here at the end.
        controlled: another host's launcher started this one and holds its standard input: hand failures over as one
            line of JSON on standard error, and end the ranks when the input closes.

    Returns:
        0; the status of the rank that failed first, as a shell counts it (128 + n for signal n); 130 after Ctrl-C.
    """
    import torch.distributed  # seconds to import, and `--dry-run` needs none of it

    if not torch.distributed.is_available():
        raise ValueError("this build of torch has no torch.distributed: start the script with python itself")
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _quiet(log_level)
    os.environ[LAUNCHER_VARIABLE] = "1"
    with tempfile.TemporaryDirectory(prefix="tritonspeed-", ignore_cleanup_errors=True) as folder:
        options = run.parse_args(["--log-dir", folder, *arguments])
        if options.nproc_per_node.isdigit():
            os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(int(options.nproc_per_node))))
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        watcher = Watcher(Path(folder), reader)
        watcher.start()
        if controlled:
            threading.Thread(target=_end_with_input, daemon=True).start()
        status = 1
        try:
            run.run(options)
            status = 0
        except ChildFailedError as error:
            found = failures.collect(error.failures, Path(folder), frozenset(watcher.killed))
            print(failures.to_line(found) if controlled else failures.describe(found), file=sys.stderr, flush=True)
            status = found[0].status
        except (SignalException, KeyboardInterrupt) as interrupt:
            number = interrupt.sigval if isinstance(interrupt, SignalException) else signal.SIGINT
            status = 128 + number
            print(f"{signal.Signals(number).name}: every rank has been ended", file=sys.stderr, flush=True)
        except DistError as error:
            print(_no_meeting(options, error), file=sys.stderr, flush=True)
        finally:
            if status != 0:
                watcher.kill()
            watcher.end()
            signal.set_wakeup_fd(-1)
    return status


def threads_per_rank(num_procs: int) -> int:
    """OMP_NUM_THREADS where the user set none: the cores this process may use, shared out among the ranks."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_procs)


def _quiet(log_level: str) -> None:
    """torchrun's loggers each set their own level on import: set it again, here, after the import."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(log_level.upper())


def _no_meeting(options: argparse.Namespace, error: Exception) -> str:
    place = f"{options.master_addr}:{options.master_port}"
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return f"tritonspeed run: {place} is in use on this machine: choose another --master_port [{error}]"
    return f"tritonspeed run: the nodes did not meet at {place}: is node 0 up, and reachable there? [{error}]"


def _grace_s(number: int) -> float:
    return TERMINATION_GRACE_S if number == signal.SIGTERM else GRACE_S


def _has_failed(rank: failures.Rank) -> bool:
    return not rank.done and (rank.recorded_error or not _is_alive(rank.pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # torchrun starts each rank in a session, hence in a group, of its own


def _end_with_input() -> None:
    """Wait until the controlling host lets go of our standard input, then end as if it had sent a signal."""
    while os.read(0, 4096):  # not through sys.stdin: its lock, held by a daemon thread, would abort the exit
        continue
    os.kill(os.getpid(), signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """The module as a command: what `tritonspeed run` starts on other hosts."""
    words = list(sys.argv[1:] if argv is None else argv)
    controlled = words[:1] == ["--controlled"]
    return launch(words[1:] if controlled else words, controlled=controlled)


if __name__ == "__main__":
    sys.exit(main())
