"""Runs that share every committed slot with a checkpoint, killed at any moment: no checkpoint is ever damaged.

What is acknowledged is a step that was committed and whose checkpoint stands. After a kill, at each system call in turn
or at random, every checkpoint there is holds its step's values, and so does the folder.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import SMALL
from kills import die_at, killing
from power import Log, rebuilt
from safetensors.torch import load_file
from test_disk_kills import CALLS, KINDS, check, contents, one_step, start

from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.disk import DiskFolder
from tritonspeed.offload.page_file import read_header

NUM_RANDOM_KILLS = 40
NUM_KEPT = 2
SAVING_CALLS = (*CALLS, "link", "unlink", "posix_fallocate", "pwrite", "mkdir", "rmdir")


def save(flats: dict[str, Any], kept: Path, step: int) -> None:
    """A checkpoint of one rank, as the real one is made: hidden, synced, then renamed."""
    hidden = kept / f".{step}"
    os.mkdir(hidden)
    held = {kind: flat.hold() for kind, flat in flats.items()}
    for kind, each in held.items():
        assert each.place(hidden / kind) == "linked"
    descriptor = os.open(hidden / "index.json", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, json.dumps({kind: each.digests() for kind, each in held.items()}).encode())
    os.fsync(descriptor)
    os.close(descriptor)
    sync(hidden)
    os.rename(hidden, kept / str(step))
    sync(kept)
    for each in held.values():
        each.release()
    if (old := kept / str(step - NUM_KEPT)).exists():
        os.rename(old, kept / ".old")
        sync(kept)
        shutil.rmtree(kept / ".old")


def sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def train(path: str, acknowledge: Callable[[int], Any], last_call: int | None) -> None:
    """Step and save until killed."""
    folder, flats = start(path)
    kept = Path(path) / "kept"
    kept.mkdir()
    save(flats, kept, 0)
    acknowledge(0)
    die_at(last_call, SAVING_CALLS)
    for step in itertools.count(1):
        one_step(folder, flats, step)
        save(flats, kept, step)
        acknowledge(step)


def check_kept(kept: Path, acknowledged: int) -> int:
    """Every checkpoint holds its step; the newest one, not before the acknowledged one."""
    steps = sorted(int(path.name) for path in kept.iterdir() if not path.name.startswith("."))
    assert len(steps) >= min(NUM_KEPT, acknowledged + 1)
    for step in steps:
        index = json.loads((kept / str(step) / "index.json").read_text())
        for kind in KINDS:
            path = kept / str(step) / kind
            begin = read_header(path)[1]
            content = path.read_bytes()[begin:]
            assert all(digest_of(content[lo:hi]) == digest for lo, hi, digest in index[kind])
            assert torch.equal(load_file(path)["w"], contents(kind, step)), f"{kind} of checkpoint {step} has changed"
    assert steps[-1] in (acknowledged, acknowledged + 1)
    return steps[-1]


def check_all(path: Path, acknowledged: int) -> int:
    folder = path / "tritonspeed" / "rank-0-of-1"
    committed = check(folder, acknowledged)
    newest = check_kept(path / "kept", acknowledged)
    assert newest <= committed
    return newest


@pytest.fixture(scope="module")
def killed():
    with killing(train) as kill:
        yield kill


def test_a_kill_at_every_call_of_three_steps_and_saves(tmp_path, killed):
    seen, acknowledged, num_torn = set(), 0, 0
    for number in range(1, 200):
        path = tmp_path / str(number)
        acknowledged = killed(path, last_call=number)
        seen.add(check_all(path, acknowledged) - acknowledged)
        left = {entry.name for entry in (path / "tritonspeed" / "rank-0-of-1").iterdir()}
        num_torn += any(name.startswith(".held") or name.endswith(".tmp") for name in left)
        shutil.rmtree(path)
        if acknowledged == 3:
            break
    assert acknowledged == 3, "three steps take more calls than were tried"
    assert seen == {0, 1}, "not all moments around a save were met"
    assert number > 80 and num_torn > 10, "no kill came while slots were held, or made anew"


def test_kills_at_random_times_and_the_next_run(tmp_path, killed, num_kills=NUM_RANDOM_KILLS):
    """A larger sweep: ``python tests/offload/test_held_kills.py FOLDER NUMBER``."""
    newest = []
    for number in range(num_kills):
        path = tmp_path / str(number)
        acknowledged = killed(path, None, random.Random(number).uniform(0, 0.15))
        newest.append(check_all(path, acknowledged))
        again = DiskFolder(path, requests=SMALL)  # the next run clears the folder; checkpoints are not its own
        again.flat("b", "master", torch.float32, 10).fill(torch.ones(10))
        assert {entry.name for entry in again.folder.iterdir()} == {
            "lock",
            "b.master.0.safetensors",
            "b.master.1.safetensors",
        }
        again.close()
        check_kept(path / "kept", acknowledged)
        shutil.rmtree(path)
    assert max(newest) > 1, "no run came as far as its second step"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log of four steps, each saved, and of an edit that was saved."""
    root = tmp_path / "run"
    folder, flats = start(str(root))
    (root / "kept").mkdir()
    save(flats, root / "kept", 0)
    with monkeypatch.context() as patched:
        log = Log(root, patched)
        for step in range(1, 5):
            one_step(folder, flats, step)
            save(flats, root / "kept", step)
            log.events.append(("acknowledged", step))
        flats["master"].edit(100, flats["master"].read(100, 5000))  # all of the same values: another slot, one step
    folder.close()
    return log


def test_a_power_cut_behind_every_call(tmp_path, log):
    seen = set()
    for number in range(len(log.events) + 1):
        renamed = number and log.events[number - 1][0] == "rename"  # most is at stake
        for seed in range(10 if renamed else 1):
            files, acknowledged = log.play(number, random.Random(1000 * number + seed))
            path = rebuilt(tmp_path / f"{number}.{seed}", files)
            seen.add(check_all(path, acknowledged) - acknowledged)
            shutil.rmtree(path)
    assert seen == {0, 1}, "not all moments around a save were met"


if __name__ == "__main__":
    import sys

    with killing(train) as kill:
        test_kills_at_random_times_and_the_next_run(Path(sys.argv[1]), kill, int(sys.argv[2]))
    print(f"{sys.argv[2]} kills: every checkpoint holds its step, no acknowledged one was lost")
