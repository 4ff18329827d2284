"""Killed at any moment, one rank or all: what was acknowledged is there, all that is visible is whole, and it goes on.

Kills at random times of one and two ranks, at once and in the background; a kill at each system call of a save in turn.
Ranks are forked from one process that has imported everything, and meet over a socket instead of torch.distributed.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import pickle
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import checked, job, mesh_of_one

from tritonspeed.checkpoint import saver as saver_module
from tritonspeed.checkpoint.errors import SaveFailed
from tritonspeed.checkpoint.folder import committed, find, latest_tag
from tritonspeed.checkpoint.saver import Saver
from tritonspeed.checkpoint.stored import verify

KILLS_EACH = 26  # of eight ways: 208
AT_ONCE = 6  # runs, each in a folder of its own: most of the time goes by waiting
FAILED = 2**32  # what a rank says where a save has failed
CALLS = ("pwritev", "pwrite", "fdatasync", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
PATIENCE_S = 0.2  # how long the other rank is waited for


@dataclass(frozen=True)
class Run:
    """A run of savers and how it ends.

    Attributes:
        victims: the ranks that are killed.
        delay_s: when, and whether counted from the first acknowledgement on; or
        last_call: the number of the system call, of the saves after the first, that the victim does not return from.
        tag: of every save; None gives each its own, and keeps two.
    """

    path: str
    world: int
    background: bool
    victims: tuple[int, ...]
    delay_s: float = 0.0
    after_first: bool = False
    last_call: int | None = None
    tag: str | None = None


class Wire:
    """The little that a save asks of torch.distributed, between two processes."""

    def __init__(self, end: socket.socket) -> None:
        self._stream = end.makefile("rwb")

    def _pass(self, mesh: Any, text: str | None, source: int) -> str:
        if mesh.world == 1:
            return text or ""
        if mesh.rank == source:
            self._stream.write((text or "").encode().replace(b"\n", b" ") + b"\n")
            self._stream.flush()
            return text or ""
        line = self._stream.readline()
        if not line:
            raise EOFError("the other rank is gone")
        return line[:-1].decode()

    def broadcast_text(self, mesh: Any, text: str | None, source: int, unit: str) -> str:
        return self._pass(mesh, text, source)

    def gather_texts(self, mesh: Any, text: str, unit: str) -> list[str]:
        return [self._pass(mesh, text, rank) for rank in range(mesh.world)]

    def exchange(self, mesh: Any, numbers: torch.Tensor) -> torch.Tensor:
        return torch.tensor([float(n) for n in self.gather_texts(mesh, str(numbers.item()), "")])


def saves(run: Run, rank: int, wire: Wire, acknowledge: Callable[[int], Any]) -> None:
    """Save checkpoint after checkpoint until killed."""
    for name in ("broadcast_text", "gather_texts", "exchange"):
        setattr(saver_module, name, getattr(wire, name))
    saver = Saver(mesh_of_one(rank, run.world, PATIENCE_S))
    changes = {"tag": run.tag} if run.tag else {"keep_last": 2}
    started = 0
    for step in itertools.count(1):
        wanted = job(Path(run.path), step, rank, run.world, **changes)
        try:
            if run.background:
                saver.start(wanted)
                if started:  # it has waited for that one
                    acknowledge(started)
                started = step
            else:
                saver.save(wanted)
                acknowledge(step)
        except SaveFailed:
            acknowledge(FAILED)
            started = 0
        if step == 1 and run.last_call is not None and rank in run.victims:
            die_at(run.last_call)


def die_at(last_call: int) -> None:
    numbers = itertools.count(1)

    def counted(name: str) -> Any:
        really = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == last_call:
                if name == "write":  # half of it arrives
                    really(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))


def child_of(run: Run, rank: int, end: socket.socket, other: socket.socket, writing: int) -> int:
    """The process of a rank."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # one that hangs ends by another signal than the one that is waited for
        other.close()
        write = os.write
        try:
            saves(run, rank, Wire(end), lambda said: write(writing, said.to_bytes(8, "little")))
        except (EOFError, OSError):  # the other rank is gone
            pass
        finally:
            os._exit(0)
    return child


def one_run(run: Run) -> tuple[list[int], list[int]]:
    """(what the ranks said, how every rank ended)."""
    reading, writing = os.pipe()
    ends = socket.socketpair()
    children = [child_of(run, rank, ends[rank], ends[1 - rank], writing) for rank in range(run.world)]
    os.close(writing)
    for end in ends:
        end.close()
    said = [int.from_bytes(os.read(reading, 8), "little")] if run.after_first else []
    if run.last_call is None:
        time.sleep(run.delay_s)
        for rank in run.victims:
            os.kill(children[rank], signal.SIGKILL)
    while more := os.read(reading, 8):
        said.append(int.from_bytes(more, "little"))
    os.close(reading)
    return said, [os.waitpid(child, 0)[1] for child in children]


def nursery(pipe: Any) -> None:
    """Fork and kill on request: everything is imported once, so a kill costs milliseconds."""
    torch.set_num_threads(1)
    while (runs := pipe.recv()) is not None:
        keepers = []
        for run in runs:
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.close(reading)
                os.write(writing, pickle.dumps(one_run(run)))
                os._exit(0)
            os.close(writing)
            keepers.append(os.fdopen(reading, "rb"))
        pipe.send([pickle.load(keeper) for keeper in keepers])
        for keeper in keepers:
            keeper.close()
            os.wait()


@contextmanager
def killing() -> Iterator[Callable[[list[Run]], list[tuple[int, bool]]]]:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=nursery, args=(there,), daemon=True)
    process.start()

    def kill(runs: list[Run]) -> list[tuple[int, bool]]:
        """Of every run, the last acknowledged step, and whether a save failed."""
        here.send(runs)
        assert here.poll(100), f"not killed: {runs}"
        results = []
        for run, (said, ends) in zip(runs, here.recv(), strict=True):
            for rank, status in enumerate(ends):
                if rank in run.victims:
                    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{run}: {ends}"
                else:
                    assert os.WIFEXITED(status), f"rank {rank} hung: {run}: {ends}"
            results.append((max((step for step in said if step < FAILED), default=0), FAILED in said))
        return results

    yield kill
    here.send(None)
    process.join(60)


@pytest.fixture(scope="module")
def killed():
    """``killed(runs)`` saves in other processes until they are killed."""
    with killing() as kill:
        yield kill


def check(run: Run, acknowledged: int) -> tuple[int, bool]:
    """(the newest committed step, whether the kill left something unfinished); the folder is as it was promised."""
    folder = Path(run.path)
    found = committed(folder)
    visible = {path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert visible <= {path for path, _ in found}, "half a checkpoint is to be seen"
    steps = [checked(path) for path, _ in found]
    newest = steps[0] if steps else 0
    assert newest >= acknowledged and steps == sorted(steps, reverse=True), f"{steps}, {acknowledged} was acknowledged"
    if acknowledged:
        assert verify(find(folder, latest_tag(folder) or "")) >= acknowledged
    left = hidden_in(folder)
    Saver(mesh_of_one()).save(job(folder, newest + 1))
    assert hidden_in(folder) == set()
    assert [made.step for _, made in committed(folder)] == [newest + 1, *steps]
    return newest, bool(left)


def hidden_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")} - {".lock"}


WAYS = [
    pytest.param(world, background, victims, id=f"{world}-{'background' if background else 'at once'}-{victims}")
    for world, victims in ((1, (0,)), (2, (0,)), (2, (1,)), (2, (0, 1)))
    for background in (False, True)
]


@pytest.mark.parametrize(("world", "background", "victims"), WAYS)
def test_kills_at_random_times(tmp_path, killed, world, background, victims, num_kills=KILLS_EACH):
    """A larger sweep: ``python tests/checkpoint/test_save_kills.py FOLDER NUMBER``, of each of the eight ways."""
    steps, met = [], 0
    runs = []
    for number in range(num_kills):
        (tmp_path / str(number)).mkdir()
        moment, tag = random.Random(number).uniform(0, 0.1), "best" if number % 3 == 0 else None
        runs.append(Run(str(tmp_path / str(number)), world, background, victims, moment, number % 4 > 0, tag=tag))
    for first in range(0, num_kills, AT_ONCE):
        some = runs[first : first + AT_ONCE]
        for run, (acknowledged, failed) in zip(some, killed(some), strict=True):
            newest, left = check(run, acknowledged)
            steps.append(newest)
            met += left or failed
    assert met > num_kills // 5, f"{met} of {num_kills} kills met a save: too few to say anything"
    assert max(steps) > 0, "no run came to its first checkpoint"


@pytest.fixture
def in_memory(tmp_path):
    """A folder that syncs in no time, where there is one: a kill, unlike a power cut, does not ask what was synced."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize(("world", "victim", "tag"), [(1, 0, "best"), (1, 0, None), (2, 0, None), (2, 1, "best")])
def test_a_kill_at_every_call(in_memory, killed, world, victim, tag):
    """Of the second and third save: with tags of their own, where an old one goes, or replacing one another."""
    seen = set()
    for first in range(1, 400, AT_ONCE):
        runs = [
            Run(str(in_memory / str(n)), 1, False, (0,), last_call=n, tag=tag) for n in range(first, first + AT_ONCE)
        ]
        for run in runs:
            Path(run.path).mkdir()
        for run, (acknowledged, _) in zip(runs, killed(runs), strict=True):
            seen.add((acknowledged, check(run, acknowledged)[0]))
        if (3, 3) in seen:
            break
    assert (3, 3) in seen, "two saves take more calls than were tried"
    moments = {(1, 1), (2, 2)} | ({(1, 2), (2, 3)} if victim == 0 else set())  # who commits dies behind its commit
    assert moments <= seen, f"not all moments around a commit were met: {seen}"


if __name__ == "__main__":
    import sys

    with killing() as kill:
        for way in WAYS:
            place = Path(sys.argv[1]) / str(way.id)
            place.mkdir(parents=True)
            test_kills_at_random_times(place, kill, *way.values, num_kills=int(sys.argv[2]))
            print(f"{way.id}: {sys.argv[2]} kills: all that was visible verified, no acknowledged step was lost")
