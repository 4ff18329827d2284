"""A committed slot that a checkpoint has too: its bytes never change again, whatever the run does."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import SMALL, noise, on_pages, store
from safetensors.torch import load_file

from tritonspeed.offload import held as held_module
from tritonspeed.offload.commit_record import digest_of, header_digest
from tritonspeed.offload.direct import DirectFile
from tritonspeed.offload.disk import CorruptState, DiskError, DiskFolder, verify
from tritonspeed.offload.disk_flat import DiskFlat
from tritonspeed.offload.page_file import Piece, read_header

NUMEL = 12_345


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(held_module, "COPY_BYTES", 8192)


def share(flat: DiskFlat, path: Path) -> str:
    """What a save does, in one go; how it was done, once all that is said of the file is true."""
    held = flat.hold()
    way = held.place(path)
    check_digests(path, held.digests())
    assert read_header(path)[0] == held.contents and header_digest(held.contents) == flat._header
    held.release()
    return way


def check_digests(path: Path, digests: tuple[tuple[int, int, str], ...]) -> None:
    """Of runs that are, together, all of the flat."""
    contents, begin = read_header(path)
    content, end = path.read_bytes()[begin:][: contents.flat_bytes], 0
    for lo, hi, digest in digests:
        assert lo == end < hi and digest_of(content[lo:hi]) == digest
        end = hi
    assert end == contents.flat_bytes


def values_in(path: Path) -> torch.Tensor:
    return load_file(path)["w"]


def made(folder: DiskFolder, slots: int = 2, bucket: str = "b") -> tuple[DiskFlat, torch.Tensor]:
    """A flat that is committed, and its values."""
    flat = folder.flat(bucket, "master", torch.float32, NUMEL, [Piece.of("w", (NUMEL,), 0)], slots)
    values = noise(NUMEL)
    flat.fill(values)
    folder.commit(0)
    return flat, values


class Life:
    """A flat in a random life: what it must hold, and what was shared of it."""

    def __init__(self, folder: DiskFolder, kept: Path, slots: int, random_: random.Random) -> None:
        self.folder, self.kept, self.random = folder, kept, random_
        self.flat, self.values = made(folder, slots)
        self.pending = self.values
        self.shared: dict[Path, bytes] = {}
        self.held: dict[held_module.Held, bytes] = {}
        self.steps = itertools.count(1)

    def part(self) -> tuple[int, torch.Tensor]:
        lo = self.random.randrange(NUMEL)
        return lo, noise(self.random.randint(1, NUMEL - lo))

    def store(self) -> None:
        lo = self.random.randrange(0, NUMEL, 1024)
        hi = self.random.choice([min(lo + 4096, NUMEL), NUMEL])
        new = noise(hi - lo)
        store(self.flat, lo, new)
        self.pending = self.pending.clone()
        self.pending[lo:hi] = new
        if not self.flat.has_two_slots:
            self.values = self.pending

    def commit(self) -> None:
        self.folder.commit(next(self.steps))
        self.values = self.pending

    def discard(self) -> None:
        self.folder.discard()
        self.pending = self.values

    def edit(self) -> None:
        if self.flat.is_changed:
            self.commit()
        with self.folder.editing():
            for _ in range(self.random.randint(1, 2)):
                lo, new = self.part()
                self.flat.edit(lo, new)
                self.values = self.values.clone()
                self.values[lo : lo + new.numel()] = new
        self.pending = self.values

    def fill(self) -> None:
        if self.flat.is_changed:
            self.discard()
        self.values = self.pending = noise(NUMEL)
        self.flat.fill(self.values)

    def hold(self) -> None:
        path = self.kept / f"{len(self.shared)}.safetensors"
        held = self.flat.hold()
        held.place(path)
        check_digests(path, held.digests())
        assert torch.equal(values_in(path), self.values)
        self.shared[path] = self.held[held] = path.read_bytes()

    def release(self) -> None:
        for held in list(self.held)[: self.random.randint(0, 3)]:
            held.release()
            del self.held[held]

    def forget(self) -> None:
        if self.shared and self.random.random() < 0.5:  # an old checkpoint is deleted
            path = self.random.choice(list(self.shared))
            path.unlink(missing_ok=True)

    def check(self) -> None:
        for path, content in self.shared.items():
            if path.exists():
                assert path.read_bytes() == content, f"{path.name} has changed"
        if self.held:
            held = self.random.choice(list(self.held))
            values = bytearray(self.held[held][-held.contents.data_bytes :])
            assert torch.equal(held.read(3, NUMEL - 5), torch.frombuffer(values, dtype=torch.float32)[3 : NUMEL - 5])


MOVES = ("store", "store", "commit", "commit", "discard", "edit", "fill", "hold", "hold", "release", "forget")


@pytest.mark.parametrize("slots", (1, 2))
@pytest.mark.parametrize("can_link", (True, False))
@pytest.mark.parametrize("seed", range(3))
def test_shared_bytes_never_change(tmp_path, folder, monkeypatch, seed, slots, can_link):
    if not can_link:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    for name in ("fsync", "fdatasync"):  # no power is cut here; a busy disk made it 10 s
        monkeypatch.setattr(os, name, lambda descriptor: None)
    kept = tmp_path / "kept"
    kept.mkdir()
    torch.manual_seed(seed)
    life = Life(folder, kept, slots, random.Random(seed))
    for _ in range(50):
        getattr(life, life.random.choice(MOVES))()
        assert torch.equal(life.flat.read(0, NUMEL), life.values)
        life.check()
    life.commit()
    assert verify(folder.folder) == folder._last.step
    life.flat.remove()
    life.check()
    for held in life.held:
        held.release()
    life.held.clear()
    folder.close()
    life.check()
    shutil.rmtree(folder.folder)
    life.check()
    assert len(life.shared) > 2


def test_it_bites_where_a_shared_file_is_written(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(DirectFile, "is_shared", False)
    with pytest.raises(AssertionError, match="has changed"):
        test_shared_bytes_never_change(tmp_path, folder, monkeypatch, 0, 2, True)


def refuse(number: int):
    def call(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_nothing_is_copied_on_one_file_system(tmp_path, folder):
    flat, values = made(folder)
    moved = folder.traffic.read_bytes, folder.traffic.written_bytes
    assert share(flat, tmp_path / "a") == "linked"
    assert (folder.traffic.read_bytes, folder.traffic.written_bytes) == moved
    assert (tmp_path / "a").samefile(folder.folder / "b.master.0.safetensors")
    assert (tmp_path / "a").stat().st_nlink == 2
    store(flat, 0, noise(NUMEL))  # goes to slot 1
    folder.commit(1)
    assert (tmp_path / "a").stat().st_nlink == 2
    store(flat, 0, noise(NUMEL))  # slot 0 again
    assert (tmp_path / "a").stat().st_nlink == 1 and torch.equal(values_in(tmp_path / "a"), values)
    folder.commit(2)
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "b.master.0.safetensors",
        "b.master.1.safetensors",
        "committed.json",
        "lock",
    ]


def test_the_same_slot_twice_and_both_slots(tmp_path, folder):
    flat, values = made(folder)
    assert share(flat, tmp_path / "a") == share(flat, tmp_path / "b") == "linked"
    assert (tmp_path / "a").stat().st_nlink == 3
    new = noise(NUMEL)
    store(flat, 0, new)
    folder.commit(1)
    share(flat, tmp_path / "c")
    for step in range(2, 5):
        store(flat, 0, noise(NUMEL))
        folder.commit(step)
    for name, wanted in (("a", values), ("b", values), ("c", new)):
        assert torch.equal(values_in(tmp_path / name), wanted)
    assert verify(folder.folder) == 4


def test_a_deleted_checkpoint_costs_no_new_file(tmp_path, folder):
    flat, _ = made(folder)
    share(flat, tmp_path / "a")
    (tmp_path / "a").unlink()
    before = (folder.folder / "b.master.0.safetensors").stat().st_ino
    for step in (1, 2):
        store(flat, 0, noise(NUMEL))
        folder.commit(step)
    assert (folder.folder / "b.master.0.safetensors").stat().st_ino == before
    assert share(flat, tmp_path / "a") == "linked"
    assert (tmp_path / "a").stat().st_ino == before


def test_digests_of_what_a_step_stored_are_known(folder, monkeypatch):
    flat, _ = made(folder)
    new = noise(NUMEL)
    store(flat, 0, new[:4096])
    store(flat, 4096, new[4096:])
    folder.commit(1)
    moved = folder.traffic.read_bytes
    digests = flat.hold().digests()
    assert [(lo, hi) for lo, hi, _ in digests] == [(0, 16384), (16384, 4 * NUMEL)]
    assert folder.traffic.read_bytes == moved


@pytest.mark.parametrize("slots", (1, 2))
@pytest.mark.parametrize("numel", (0, 1, 1024, NUMEL))
def test_digests_that_nobody_knows_are_read(tmp_path, folder, numel, slots):
    pieces = [Piece.of("w", (numel,), 0)] if numel else []
    flat = folder.flat("b", "master", torch.float32, numel, pieces, slots)  # never filled, nor committed
    for name in ("a", "b"):
        share(flat, tmp_path / name)
        values = flat.read(0, numel)
        assert torch.equal(values, torch.zeros(numel)) or name == "b"
        store(flat, 0, noise(numel))
        folder.commit(1)
        assert torch.equal(load_file(tmp_path / name).get("w", values), values)
    flat.edit(0, noise(numel))
    share(flat, tmp_path / "c")


def test_one_slot_is_copied_before_it_is_written(tmp_path, folder):
    flat, values = made(folder, slots=1)
    share(flat, tmp_path / "a")
    store(flat, 1024, noise(1024))
    wanted = values.clone()
    wanted[1024:2048] = flat.read(1024, 2048)
    assert torch.equal(flat.read(0, NUMEL), wanted) and torch.equal(values_in(tmp_path / "a"), values)
    share(flat, tmp_path / "b")
    flat.edit(7, torch.tensor([5.0]))
    assert torch.equal(values_in(tmp_path / "b"), wanted) and flat.read(7, 8).item() == 5


def test_reading_one_slot_while_it_is_replaced(tmp_path, folder):
    flat, values = made(folder, slots=1)
    share(flat, tmp_path / "a")
    into = on_pages(torch.zeros(NUMEL))
    under_way = flat.fetch(0, NUMEL, into)
    store(flat, 0, noise(NUMEL))
    under_way.wait()
    assert torch.equal(into, values), "it was asked for before the store"


def another_file_system(tmp_path: Path) -> Path:
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK) or place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system that may be written to")
    return place / f"tritonspeed-test-{os.getpid()}"


@pytest.mark.parametrize("slots", (1, 2))
def test_another_file_system_gets_a_copy_while_the_run_goes_on(tmp_path, folder, slots):
    kept = another_file_system(tmp_path)
    kept.mkdir()
    try:
        flat, values = made(folder, slots)
        held = flat.hold()
        for step in (1, 2, 3):
            store(flat, 0, noise(NUMEL))
            folder.commit(step)
        assert held.place(kept / "a") == "copied"
        check_digests(kept / "a", held.digests())
        assert torch.equal(values_in(kept / "a"), values)
        held.release()
        assert not list(folder.folder.glob(".held*"))
        with pytest.raises(OSError, match="No such file"):
            flat.hold().place(kept / "missing" / "a")
    finally:
        shutil.rmtree(kept)


@pytest.mark.parametrize("number", (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV), ids=errno.errorcode.get)
def test_where_links_are_refused_the_open_file_is_held_and_copied(tmp_path, folder, monkeypatch, number):
    flat, values = made(folder)
    monkeypatch.setattr(os, "link", refuse(number))
    held, first = flat.hold(), flat._files[0]
    for step in (1, 2):
        store(flat, 0, noise(NUMEL))
        folder.commit(step)
    assert flat._files[0] is not first, "held: not written to"
    assert torch.equal(held.read(1, NUMEL), values[1:])
    assert held.place(tmp_path / "a") == "copied"
    check_digests(tmp_path / "a", held.digests())
    assert torch.equal(values_in(tmp_path / "a"), values)
    held.release()
    held, second = flat.hold(), flat._files[0]
    held.release()
    for step in (3, 4):
        store(flat, 0, noise(NUMEL))
        folder.commit(step)
    assert flat._files[0] is second, "nobody holds it any more"


def test_extents_are_shared_where_names_cannot_be(tmp_path, folder, monkeypatch):
    def ficlone(target: int, request: int, source: int) -> None:
        assert request == 0x40049409
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)

    flat, values = made(folder)
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    monkeypatch.setattr(fcntl, "ioctl", ficlone)
    assert share(flat, tmp_path / "a") == "reflinked"
    assert torch.equal(values_in(tmp_path / "a"), values)


def test_a_damaged_slot_is_not_copied(tmp_path, folder, monkeypatch):
    flat, _ = made(folder)
    with open(folder.folder / "b.master.0.safetensors", "r+b") as stream:
        stream.seek(4096 + 20_000)
        stream.write(b"damage")
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    with pytest.raises(CorruptState, match=r"b.master.0.safetensors: bytes \[\d+, \d+\) of the flat are not what was"):
        flat.hold().place(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, folder, monkeypatch):
    flat, _ = made(folder)
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    monkeypatch.setattr(os, "pwritev", refuse(errno.ENOSPC))
    with pytest.raises(DiskError, match="bytes are free"):
        flat.hold().place(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_closed_folder(tmp_path, folder, monkeypatch):
    flat, values = made(folder)
    linked, late = flat.hold(), flat.hold()
    folder.close()
    assert linked.place(tmp_path / "a") == "linked", "a name needs nobody"
    assert torch.equal(values_in(tmp_path / "a"), values)
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    with pytest.raises(ValueError, match="its folder was closed before the checkpoint was written"):
        late.place(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_is_let_go_of_is_released(folder):
    flat, _ = made(folder)
    held = flat.hold()
    assert len(list(folder.folder.glob(".held*"))) == 1
    del held
    assert not list(folder.folder.glob(".held*"))


def test_a_forked_child_lets_go_of_nothing(folder):
    flat, _ = made(folder)
    held = flat.hold()
    child = os.fork()
    if child == 0:
        held.__del__()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(folder.folder.glob(".held*"))) == 1


def test_the_next_run_clears_what_was_held_and_leaves_checkpoints(tmp_path):
    first = DiskFolder(tmp_path / "run", requests=SMALL)
    flat, values = made(first)
    share(flat, tmp_path / "a")
    held = flat.hold()
    (first.folder / "b.master.1.safetensors.tmp").write_text("a new file that was not whole yet")
    first.close()
    second = DiskFolder(tmp_path / "run", requests=SMALL)
    new, _ = made(second)
    assert sorted(path.name for path in second.folder.glob("*safetensors*")) == [
        "b.master.0.safetensors",
        "b.master.1.safetensors",
    ]
    new.fill(noise(NUMEL))
    second.close()
    assert torch.equal(values_in(tmp_path / "a"), values)
    held.release()


ON_A_SMALL_DISK = """
import errno, os, subprocess, sys
import torch
from tritonspeed.offload.disk import DiskError, DiskFolder, verify

place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", place], check=True)
folder = DiskFolder(place)
flat = folder.flat("a", "master", torch.float32, 50_000)
single = folder.flat("a", "parameters", torch.float32, 10, slots=1)
flat.fill(torch.ones(50_000))
folder.commit(1)
for name, each in (("a", flat), ("p", single)):
    held = each.hold()
    assert held.place(f"{place}/{name}") == "linked"
    held.release()
kept = open(f"{place}/a", "rb").read()
flat.store(0, flat.read(0, 50_000).add_(1)).wait()
folder.commit(2)
with open(place + "/other", "wb", buffering=0) as other:
    try:
        while other.write(bytes(4096)): pass
    except OSError: pass
for write in (lambda: flat.store(0, flat.read(0, 50_000)), lambda: flat.edit(5, torch.zeros(1)),
              lambda: single.store(0, single.read(0, 10)), lambda: single.edit(0, torch.ones(1))):
    try:
        write()
    except DiskError as error:
        assert error.errno == errno.ENOSPC and "safetensors" in str(error.filename), error
        assert "a checkpoint has this file too" in str(error) and "bytes are needed and" in str(error), error
        print("no room:", error)
    assert not [name for name in os.listdir(folder.folder) if name.endswith(".tmp")]
assert verify(folder.folder) == 2 and (flat.read(0, 50_000) == 2).all()
assert open(f"{place}/a", "rb").read() == kept
os.unlink(place + "/other")
flat.store(0, flat.read(0, 50_000).add_(1)).wait()
folder.commit(3)
assert verify(folder.folder) == 3 and (flat.read(0, 50_000) == 3).all()
assert open(f"{place}/a", "rb").read() == kept
print("room")
"""


def test_a_disk_without_room_for_the_next_file(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a namespace with mounts of its own is refused here")
    command = ["unshare", "-Urm", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["no room"] * 4 + ["room"]
