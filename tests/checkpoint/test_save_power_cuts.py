"""A power cut behind every call of a save: what was acknowledged survives, and all that is visible is whole.

The tree is recorded behind every call. A cut then takes back what was not synced: any sectors of a file, and in a
folder any of the states that its names went through since it was synced. Each folder and file loses on its own, which
is more than a journal allows.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from saving import checked, job, mesh_of_one

from tritonspeed.checkpoint.folder import committed, find, latest_tag
from tritonspeed.checkpoint.saver import Saver

WRITES = ("pwritev", "pwrite", "write", "rename", "mkdir", "unlink", "rmdir")
SYNCS = ("fsync", "fdatasync")


@dataclass
class Tree:
    """Names and contents, by inode."""

    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)


class Recorder:
    """What the disk went through. An event is the tree behind a call, and the inode that it synced."""

    def __init__(self, root: Path) -> None:
        self.root, self.events = root, list[tuple[Tree, int | None, int]]()
        self.acknowledged, self.has_latest = 0, True
        self._held: dict[int, int] = {}  # open descriptors: an inode's number is not given twice
        self._lock = threading.RLock()

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (*WRITES, *SYNCS):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                result = really(*args, **kwargs)
                self.note(os.fstat(args[0]).st_ino if name in SYNCS else None)
            return result

        return call

    def note(self, synced: int | None = None) -> None:
        tree = Tree()
        self._walk(self.root, tree)
        self.events.append((tree, synced, self.acknowledged))

    def _walk(self, path: Path, tree: Tree) -> int:
        number = path.stat().st_ino
        if number not in self._held:
            self._held[number] = os.open(path, os.O_RDONLY)
        if path.is_dir():
            tree.folders[number] = {each.name: self._walk(each, tree) for each in path.iterdir()}
        else:
            tree.files[number] = path.read_bytes()
        return number

    def cut(self, number: int, to: Path, random_: random.Random, loses_syncs: bool = False) -> int:
        """The disk after a power cut behind event ``number``; the last acknowledged step."""
        names: dict[int, list[dict[str, int]]] = {}
        synced: dict[int, bytes] = {}
        last: dict[int, bytes] = {}
        for tree, inode, _ in self.events[: number + 1]:
            for folder, entries in tree.folders.items():
                names.setdefault(folder, [{}]).append(entries)
            last.update(tree.files)
            if inode is not None and not loses_syncs:
                if inode in tree.folders:
                    names[inode] = [tree.folders[inode]]
                elif inode in tree.files:
                    synced[inode] = tree.files[inode]
        share = random_.choice((0.0, 0.5, 1.0))

        def build(inode: int, path: Path) -> None:
            if inode not in names:
                path.write_bytes(_mixed(synced.get(inode, b""), last[inode], share, random_))
                return
            path.mkdir()
            for name, child in random_.choice(names[inode]).items():
                build(child, path / name)

        build(self.root.stat().st_ino, to)
        return self.events[number][2]


def _mixed(old: bytes, new: bytes, share: float, random_: random.Random) -> bytes:
    """Any sectors of ``new`` over ``old``."""
    made = bytearray(new if random_.random() < share else old)
    made = made.ljust(len(old), b"\0")
    for lo in range(0, len(made), 512):
        source = new if random_.random() < share else old
        made[lo : lo + 512] = source[lo : lo + 512].ljust(min(512, len(made) - lo), b"\0")
    return bytes(made)


CHANGES = {"replaced": {"tag": "best"}, "pruned": {"keep_last": 1}, "without latest": {"set_latest": False}}


@pytest.fixture(params=CHANGES)
def recorder(request, tmp_path, monkeypatch):
    """Three saves, one way or another."""
    root = tmp_path / "saves"
    root.mkdir()
    recorder, saver = Recorder(root), Saver(mesh_of_one())
    with monkeypatch.context() as patched:
        recorder.patch(patched)
        recorder.note()
        for step in (1, 2, 3):
            saver.save(job(root, step, **CHANGES[request.param]))
            recorder.acknowledged = step
            recorder.note()
    recorder.has_latest = (root / "latest").exists()
    yield recorder
    recorder.close()


def check(folder: Path, acknowledged: int, has_latest: bool) -> int:
    found = committed(folder)
    visible = {path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert visible <= {path for path, _ in found}, "half a checkpoint is to be seen"
    steps = [checked(path) for path, _ in found]
    assert max(steps, default=0) >= acknowledged, f"{steps}, {acknowledged} was acknowledged"
    if acknowledged and has_latest:
        assert checked(find(folder, latest_tag(folder) or "")) >= acknowledged
    return max(steps, default=0)


def test_a_power_cut_behind_every_call(tmp_path, recorder):
    seen = set()
    for number in range(len(recorder.events)):
        for seed in range(3):
            to = tmp_path / f"{number}.{seed}"
            acknowledged = recorder.cut(number, to, random.Random(1000 * number + seed))
            seen.add(check(to, acknowledged, recorder.has_latest) - acknowledged)
        if number % 10 == 0:
            assert checked(Saver(mesh_of_one()).save(job(to, 50))) == 50
    assert seen == {0, 1}, "not all moments around a commit were met"


def test_the_power_cut_bites_where_nothing_is_synced(tmp_path, recorder):
    broken = 0
    for number in range(len(recorder.events)):
        to = tmp_path / str(number)
        acknowledged = recorder.cut(number, to, random.Random(number), loses_syncs=True)
        try:
            check(to, acknowledged, recorder.has_latest)
        except Exception:
            broken += 1
    assert broken > 10, broken
