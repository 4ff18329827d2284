"""The first code of every rank: what stands between torchrun and the user's script.

It adds `--local_rank=N` to the script's arguments, as DeepSpeed's launcher does (torchrun only sets the variable
LOCAL_RANK), binds the rank to its cores, sends its output to a file of its own where asked, and leaves word of how the
rank ended beside torchrun's error file:

    rank.json     process id, rank and world size, written first
    done          an empty file: the script came to its end
    error.json    the exception and its traceback, in the form of torchrun's own records
    fault.txt     the Python stack at a segmentation fault or an abort

It imports nothing but the standard library: a script that needs no torch does not wait for it.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import faulthandler
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tritonspeed.cli.hosts import parse_core_list, split_cores

# Set by tritonspeed.cli.launch for its ranks: it prints the traceback itself, last, so that the rank need not.
LAUNCHER_VARIABLE = "TRITONSPEED_LAUNCHER"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def build_parser() -> argparse.ArgumentParser:
    """The options that `tritonspeed run` writes in front of the script."""
    parser = argparse.ArgumentParser(prog="python -m tritonspeed.cli.rank_entry", allow_abbrev=False)
    parser.add_argument("--kind", choices=("script", "module", "program"), default="script", help="what TARGET is")
    parser.add_argument("--pass-local-rank", action="store_true", help="add --local_rank=N to the target's arguments")
    parser.add_argument("--bind-cores", metavar="all|LIST", help="give each rank an equal part of these cores")
    parser.add_argument("--log-file", metavar="PATH", help="where output goes; {rank} in it is the rank")
    parser.add_argument("target")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the target as this rank.

    Returns:
        The exit status: the target's own; 130 after SIGINT.

    Raises:
        BaseException: nothing of the target's: an exception is recorded and becomes status 1.
    """
    args = build_parser().parse_args(argv)
    _die_with_parent()
    _write_whole_lines()
    record = _Record()
    if args.log_file:
        _redirect_output(args.log_file.format(rank=record.rank))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        if args.bind_cores:
            _bind_cores(args.bind_cores, local_rank)
        arguments = ([f"--local_rank={local_rank}"] if args.pass_local_rank else []) + args.arguments
        status = _run_target(args.kind, args.target, arguments)
    except KeyboardInterrupt as interrupt:
        print(f"rank {record.rank}: interrupted{_where(interrupt.__traceback__)}", file=sys.stderr)
        return 130
    except SystemExit as end:
        status, words = _status_of(end)
        if status != 0:
            # argparse's status: its own message stands on this rank's standard error.
            hint = " (does it know --local_rank? If not, add --no_local_rank)" if args.pass_local_rank else ""
            record.error(
                status, words or f"{args.target} ended with exit status {status}{hint if status == 2 else ''}", ""
            )
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, _from_target(error.__traceback__)))
        record.error(1, _one_line(error), text)
        if args.log_file or LAUNCHER_VARIABLE not in os.environ:
            print(text, file=sys.stderr, end="")
        return 1
    if status == 0:
        record.done()
        _leave_process_group()
    return status


class _Record:
    """How this rank fared, in the folder of the error file that torchrun gave it; without torchrun, nowhere."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._error_file = Path(error_file) if error_file else None
        if self._error_file is not None:
            facts = {"pid": os.getpid(), "rank": self.rank, "world": self.world}
            self._write(self._error_file.with_name("rank.json"), json.dumps(facts))
            # Kept open for the life of the process: the handler writes to the descriptor from inside a signal.
            self._fault_file = open(self._error_file.with_name("fault.txt"), "w")  # noqa: SIM115
            faulthandler.enable(self._fault_file)

    def done(self) -> None:
        if self._error_file is not None:
            self._write(self._error_file.with_name("done"), "")

    def error(self, status: int, message: str, text: str) -> None:
        if self._error_file is None:
            return
        now = time.time()
        extra = {"py_callstack": text, "timestamp": str(int(now))}
        record = {"message": {"message": message, "extraInfo": extra}, "time": now, "status": status}
        self._write(self._error_file, json.dumps(record))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """Write at once: the launcher must never read half a record."""
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(text)
        draft.replace(path)


def _run_target(kind: str, target: str, arguments: list[str]) -> int:
    if kind == "program":
        return _shell_status(subprocess.call([target, *arguments]))
    sys.argv = [target, *arguments]
    if kind == "module":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return 0
    if not getattr(sys.flags, "safe_path", False):  # `python script.py` puts the script's own folder first
        sys.path[0] = os.path.dirname(os.path.abspath(target))
    runpy.run_path(target, run_name="__main__")
    return 0


def _shell_status(code: int) -> int:
    """A negative code of `subprocess` is a signal: a shell says 128 + signal."""
    return 128 - code if code < 0 else code


def _status_of(end: SystemExit) -> tuple[int, str]:
    """The exit status, and the words of `sys.exit("words")`, which mean status 1."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0, ""
    print(end.code, file=sys.stderr)
    return 1, str(end.code)


def _leave_process_group() -> None:
    """Destroy the process group that a script forgot: gloo's threads abort a process that ends while they run."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _die_with_parent() -> None:
    """Ask Linux to end this rank when its launcher is killed: no rank may outlive it and hold a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _write_whole_lines() -> None:
    """torchrun starts Python unbuffered, where print(a, b) is four writes and two ranks' lines run into each other."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _redirect_output(path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def _bind_cores(text: str, local_rank: int) -> None:
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    cores = allowed if text == "all" else parse_core_list(text)
    missing = sorted(set(cores) - set(allowed))
    if missing:
        raise ValueError(f"--bind_core_list {text!r}: this process may not use core {missing[0]}, only {allowed}")
    os.sched_setaffinity(0, split_cores(cores, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _from_target(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this file and of runpy at its start."""
    while trace is not None and _is_ours(trace):
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return name == __file__ or name == "<frozen runpy>" or name == runpy.__file__


def _where(trace: TracebackType | None) -> str:
    """The innermost line of the traceback that is not in an installed package: where the user's own code stood."""
    place = ""
    for frame in traceback.extract_tb(_from_target(trace)):
        if not frame.filename.startswith((sys.prefix, sys.base_prefix, "<")):
            place = f" at {frame.filename}:{frame.lineno} in {frame.name}"
    return place


def _one_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _end_at_once(status: int) -> None:
    """End a rank that has failed. Its exit handlers run; then it goes, without taking libraries apart: gloo and NCCL
    wait there for peers, or abort, and the launcher would see that instead of the failure."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_status = main()
    if exit_status != 0:
        _end_at_once(exit_status)
