"""Runs in processes of their own that are killed at a moment of one's choice."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Train = Callable[[str, Callable[[int], Any], "int | None"], None]


def die_at(last_call: int | None, names: Iterable[str]) -> None:
    """From now on, system calls of these names are counted, and this one is not returned from."""
    numbers = itertools.count(1)

    def counted(name: str) -> Any:
        really = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == last_call:
                if name == "pwritev":  # half of it arrives
                    really(args[0], [args[1][0][:4096]], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*args, **kwargs)

        return call

    if last_call is not None:
        for name in names:
            setattr(os, name, counted(name))


def nursery(pipe: Any, train: Train, prepare: Callable[[], Any]) -> None:
    """Fork and kill on request: everything is imported once, so a kill costs milliseconds."""
    torch.set_num_threads(1)
    prepare()
    write = os.write
    while (request := pipe.recv()) is not None:
        path, last_call, delay_s, num_told = request
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # one that hangs ends by another signal than the one that is waited for
            try:
                train(path, lambda step, to=writing: write(to, step.to_bytes(8, "little")), last_call)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        acknowledged = os.read(reading, 8)
        if last_call is None:
            for _ in range(1, num_told):
                acknowledged = os.read(reading, 8) or acknowledged
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        while more := os.read(reading, 8):
            acknowledged = more
        os.close(reading)
        _, status = os.waitpid(child, 0)
        pipe.send((int.from_bytes(acknowledged, "little"), status))


@contextmanager
def killing(train: Train, prepare: Callable[[], Any] = int) -> Iterator[Callable[..., int]]:
    """``kill(path, last_call, delay_s, num_told)`` trains in another process until it is killed; the last acknowledged
    number.

    Args:
        train: of a module; called with (path, acknowledge, last_call). Where ``last_call`` is None it is killed, so
            many seconds after it has acknowledged ``num_told`` numbers, else it kills itself.
        prepare: of a module; called once, before any run: what takes long, and leaves no threads.
    """
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=nursery, args=(there, train, prepare), daemon=True)
    process.start()

    def kill(path: Path, last_call: int | None, delay_s: float = 0.0, num_told: int = 1) -> int:
        here.send((str(path), last_call, delay_s, num_told))
        assert here.poll(100), "the run was not killed"
        acknowledged, status = here.recv()
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        return acknowledged

    yield kill
    here.send(None)
    process.join(60)
