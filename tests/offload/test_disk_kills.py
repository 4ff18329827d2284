"""Killed and cut off at any moment: what was committed verifies, and no step that was acknowledged is lost.

Three ways to stop: a kill at each system call of a step in turn, kills at random times, and power cuts, which also take
back what was written and not synced (played back from a log of the calls, so that every order can be tried).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import SMALL, on_pages
from kills import die_at, killing
from power import Log, rebuilt
from safetensors import safe_open

from tritonspeed.offload.disk import CorruptState, DiskFolder, committed, verify
from tritonspeed.offload.page_file import Piece

NUMEL = 12_345
TILE_ELEMS = 4096
NUM_TILES = -(-NUMEL // TILE_ELEMS)
NUM_RANDOM_KILLS = 40
KINDS = ("master", "exp_avg")
CALLS = ("pwritev", "fdatasync", "write", "fsync", "rename")


def contents(kind: str, step: int) -> torch.Tensor:
    """What a step leaves: all of the masters are new, one tile of the moment."""
    values = torch.empty(NUMEL)
    for number in range(NUM_TILES):
        tile = slice(number * TILE_ELEMS, (number + 1) * TILE_ELEMS)
        last = step if kind == "master" else max(0, step - (step - number) % NUM_TILES)
        values[tile] = (torch.arange(NUMEL)[tile] * (last + 1)) % 65_521
    return values


def start(path: str) -> tuple[DiskFolder, dict[str, Any]]:
    folder = DiskFolder(path, requests=SMALL)
    pieces = [Piece.of("w", (NUMEL,), 0)]
    flats = {kind: folder.flat("b", kind, torch.float32, NUMEL, pieces) for kind in KINDS}
    for kind, flat in flats.items():
        flat.fill(contents(kind, 0))
    folder.commit(0)
    return folder, flats


def one_step(folder: DiskFolder, flats: dict[str, Any], step: int) -> None:
    handles = []
    for kind, flat in flats.items():
        values = contents(kind, step)
        for number in range(NUM_TILES):
            if kind == "master" or number == step % NUM_TILES:
                lo = number * TILE_ELEMS
                handles.append(flat.store(lo, on_pages(values[lo : lo + TILE_ELEMS])))
    for handle in handles:
        handle.wait()
    folder.commit(step, {"step": step})


def train(path: str, acknowledge: Callable[[int], Any], last_call: int | None) -> None:
    """Step until killed."""
    folder, flats = start(path)
    acknowledge(0)
    die_at(last_call, CALLS)
    for step in itertools.count(1):
        one_step(folder, flats, step)
        acknowledge(step)


@pytest.fixture(scope="module")
def killed():
    """``killed(path, last_call, delay_s)`` trains in another process until it is killed; the last acknowledged step."""
    with killing(train) as kill:
        yield kill


def check(folder: Path, acknowledged: int) -> int:
    """The committed step, complete and not before the acknowledged one."""
    step = verify(folder)
    assert step in (acknowledged, acknowledged + 1)
    found = committed(folder)
    assert found.record.facts == ({"step": step} if step else {})
    for kind in KINDS:
        assert torch.equal(found[f"{kind}/w"], contents(kind, step)), f"{kind} is not of step {step}"
    return step


def is_torn(folder: Path, step: int) -> bool:
    """Both slots are valid files; whether the one that is not committed is of no step."""
    torn = False
    for path in folder.glob("b.master.*.safetensors"):
        with safe_open(path, "pt") as opened:
            values = opened.get_tensor("w")
        torn |= not any(torch.equal(values, contents("master", s)) for s in (step - 1, step, step + 1)) and step > 0
    return torn


def test_a_kill_at_every_call_of_two_steps(tmp_path, killed):
    torn, steps = 0, set()
    for number in range(1, 61):
        path = tmp_path / str(number)
        acknowledged = killed(path, last_call=number)
        folder = path / "tritonspeed" / "rank-0-of-1"
        step = check(folder, acknowledged)
        torn += is_torn(folder, step)
        steps.add((acknowledged, step))
        if acknowledged == 2:
            break
    assert torn, "no kill left a slot half written: the test does not reach what it is for"
    assert {(0, 0), (1, 1), (0, 1)} <= steps, "not all moments around a commit were met"
    assert acknowledged == 2, "two steps take more calls than were tried"


def test_kills_at_random_times(tmp_path, killed, num_kills=NUM_RANDOM_KILLS):
    """A larger sweep: ``python tests/offload/test_disk_kills.py FOLDER NUMBER``."""
    steps = []
    for number in range(num_kills):
        path = tmp_path / str(number)
        acknowledged = killed(path, None, random.Random(number).uniform(0, 0.1))
        folder = path / "tritonspeed" / "rank-0-of-1"
        steps.append(check(folder, acknowledged))
        is_torn(folder, steps[-1])
        again = DiskFolder(path)  # the lock went with the process
        again.close()
    assert max(steps) > 0, "no run came as far as its first step"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log of four steps and of an edit."""
    folder, flats = start(str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        log = Log(folder.folder, patched)
        for step in range(1, 5):
            one_step(folder, flats, step)
            log.events.append(("acknowledged", step))
        flats["master"].edit(100, flats["master"].read(100, 5000))  # all of the same values: another slot, one step
    folder.close()
    return log


def test_a_power_cut_behind_every_call(tmp_path, log):
    seen = set()
    for number in range(len(log.events) + 1):
        for seed in range(3):
            files, acknowledged = log.play(number, random.Random(1000 * number + seed))
            step = check(rebuilt(tmp_path / f"{number}.{seed}", files), acknowledged)
            seen.add(step - acknowledged)
    assert seen == {0, 1}, "not all moments around a commit were met"


def test_the_power_cut_bites_where_nothing_is_synced(tmp_path, log):
    broken = 0
    for number in range(len(log.events) + 1):
        files, acknowledged = log.play(number, random.Random(number), loses_syncs=True)
        try:
            check(rebuilt(tmp_path / str(number), files), acknowledged)
        except (AssertionError, CorruptState):
            broken += 1
    assert broken > 5


if __name__ == "__main__":
    import sys

    with killing(train) as kill:
        test_kills_at_random_times(Path(sys.argv[1]), kill, int(sys.argv[2]))
    print(f"{sys.argv[2]} kills: every committed state verified, no acknowledged step was lost")
