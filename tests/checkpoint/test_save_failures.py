"""A save that fails: one named error on all ranks, nothing left of it, what was there intact, the next one works."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from saving import checked, job, mesh_of_one

from tritonspeed.checkpoint import commit, folder
from tritonspeed.checkpoint import saver as saver_module
from tritonspeed.checkpoint.errors import CheckpointBusy, SaveFailed
from tritonspeed.checkpoint.folder import Lock, committed, find, hidden_name, latest_tag
from tritonspeed.checkpoint.saver import Saver
from tritonspeed.comm.mesh import mesh_of

HERE = str(Path(__file__).parent)


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def failing(message: str):
    def extras(hidden, records):
        raise RuntimeError(message)

    return extras


def fails_on(place, bad_rank, background):
    """Save, fail, save: what every rank says."""
    mesh = mesh_of()
    saver, said = Saver(mesh), []
    saver.save(job(place, 1, mesh.rank, mesh.world))
    bad = job(place, 2, mesh.rank, mesh.world, extras=failing("no more ink") if mesh.rank == bad_rank else None)
    try:
        if background:
            saver.start(bad)
            saver.wait()
        else:
            saver.save(bad)
    except SaveFailed as error:
        said.append(str(error))
    there = sorted(path.name for path in Path(place).iterdir())
    mesh.barrier()
    saver.save(job(place, 3, mesh.rank, mesh.world))
    return said, there


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_one_rank_fails(tmp_path, ranks, bad_rank, background):
    results = ranks(3, fails_on, tmp_path, bad_rank, background)
    text = f"checkpoint 'global_step2' was not saved: rank {bad_rank}: no more ink; what was in {tmp_path} before is as"
    assert [said for said, _ in results] == [[f"{text} it was"]] * 3
    assert all({"global_step1", "latest"} <= set(there) for _, there in results)
    assert [checked(path) for path, _ in committed(tmp_path)] == [3, 1]
    assert names(tmp_path) == {"global_step1", "global_step3", "latest", ".lock"}


def elsewhere(place):
    """Rank 1 has a folder of its own under that name."""
    mesh = mesh_of()
    saver = Saver(mesh)
    saver_module.SETTLE_S = 0.05
    own = Path(place) / ("b" if mesh.rank == 1 else "a")
    own.mkdir(exist_ok=True)
    try:
        saver.save(job(own, 1, mesh.rank, mesh.world))
    except SaveFailed as error:
        return str(error).replace(f"{place}/a", "HERE").replace(f"{place}/b", "HERE")
    return ""


def test_a_folder_that_is_not_shared(tmp_path, ranks):
    said = ranks(3, elsewhere, tmp_path)
    assert len(set(said)) == 1
    assert "rank 1: it does not see" in said[0] and "all hosts must share the folder" in said[0]
    assert names(tmp_path / "a") == {".lock"} and names(tmp_path / "b") == set()


def unlike(place):
    mesh = mesh_of()
    state = {"here": object()} if mesh.rank == 1 else {}
    try:
        Saver(mesh).save(job(place, 1, mesh.rank, mesh.world, state=state))
    except SaveFailed as error:
        return str(error)
    return ""


def test_a_state_that_cannot_be_saved_is_found_before_anything_is_written(tmp_path, ranks):
    said = ranks(2, unlike, tmp_path)
    assert said[0] == said[1] and "rank 1: state" in said[0] and names(tmp_path) == {".lock"}


def test_a_background_failure_is_told_once(tmp_path):
    saver, go = Saver(mesh_of_one()), threading.Event()

    def extras(hidden, records):
        assert go.wait(20), "held back for too long"
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a file")

    for tell in (saver.check, saver.wait, lambda: saver.start(job(tmp_path, 3)), lambda: saver.save(job(tmp_path, 3))):
        go.clear()
        saver.start(job(tmp_path, 2, extras=extras))
        saver.check()
        go.set()
        saver._current.thread.join()
        with pytest.raises(SaveFailed, match="rank 0: a file: Input/output error"):
            tell()
        saver.check()
        assert saver.wait() is None and not committed(tmp_path)
    saver.save(job(tmp_path, 3))
    assert checked(tmp_path / "global_step3") == 3


def test_a_rank_that_never_comes(tmp_path, monkeypatch):
    """Rank 0 of two, and nobody else."""
    monkeypatch.setattr(saver_module, "exchange", lambda mesh, numbers: numbers)
    monkeypatch.setattr(saver_module, "broadcast_text", lambda mesh, text, source, unit: text)
    saver = Saver(mesh_of_one(0, 2, timeout_s=0.1))
    with pytest.raises(SaveFailed, match=r"rank 1: was not heard of for 0.1 s after rank 0 had done its part"):
        saver.save(job(tmp_path, 1, 0, 2))
    assert names(tmp_path) == {".lock"}


def test_rank_0_that_never_comes(tmp_path, monkeypatch):
    told = '{"save_id": "0123456789abcdef", "tag": "t", "busy": "", "error": ""}'
    monkeypatch.setattr(saver_module, "exchange", lambda mesh, numbers: numbers)
    monkeypatch.setattr(saver_module, "broadcast_text", lambda mesh, text, source, unit: told)
    hidden, is_open = tmp_path / hidden_name("t", "0123456789abcdef"), tmp_path / ".0123456789abcdef.open-0"
    hidden.mkdir()
    is_open.write_text("")
    saver = Saver(mesh_of_one(1, 2, timeout_s=0.1))
    with pytest.raises(SaveFailed, match=r"rank 0 did not finish within 0.2 s after rank 1 had"):
        saver.save(job(tmp_path, 1, 1, 2))
    shutil.rmtree(hidden)
    hidden.mkdir()
    monkeypatch.setattr(commit, "SETTLE_S", 0.05)
    threading.Timer(0.05, is_open.unlink).start()  # another save has cleared it away
    with pytest.raises(SaveFailed, match="may not be saved: rank 0 is gone"):
        Saver(mesh_of_one(1, 2, timeout_s=5)).save(job(tmp_path, 1, 1, 2))


# who else is there


def test_two_writers(tmp_path):
    go = threading.Event()
    first, second = Saver(mesh_of_one()), Saver(mesh_of_one())
    first.start(job(tmp_path, 1, extras=lambda hidden, records: go.wait(20)))
    with pytest.raises(CheckpointBusy, match=f"process {os.getpid()} on .* is saving into this folder"):
        second.save(job(tmp_path, 2))
    go.set()
    first.wait()
    second.save(job(tmp_path, 2))
    assert [checked(path) for path, _ in committed(tmp_path)] == [2, 1]


def test_a_forked_child_does_not_hold_the_folder(tmp_path):
    lock = Lock.take(tmp_path)
    child = os.fork()
    if child == 0:
        threading.Event().wait(20)
        os._exit(0)
    lock.release()
    Lock.take(tmp_path).release()
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    left = tmp_path / hidden_name("global_step9", "0" * 16)
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert checked(Saver(mesh_of_one()).save(job(tmp_path, 1))) == 1
    assert "only one run may save here" in caplog.text
    assert left.exists()  # perhaps somebody is writing it


def test_a_tag_that_is_taken_by_others(tmp_path):
    (tmp_path / "global_step1").mkdir()
    Saver(mesh_of_one()).save(job(tmp_path, 1))  # an empty folder is nobody's
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "mp_rank_00_model_states.pt").write_text("x")
    with pytest.raises(SaveFailed, match="was not written by tritonspeed: remove it, or save under another tag"):
        Saver(mesh_of_one()).save(job(tmp_path, 2))
    assert latest_tag(tmp_path) == "global_step1"


# what dead saves leave


def test_what_dead_saves_left_is_ended(tmp_path):
    saver = Saver(mesh_of_one())
    for step in (1, 2, 3):
        saver.save(job(tmp_path, step))
    hidden = {step: tmp_path / hidden_name(f"global_step{step}", f"{step:016x}") for step in (1, 2, 3, 4, 5)}
    os.rename(tmp_path / "global_step1", hidden[1])  # died before the second of two renamings
    shutil.copytree(tmp_path / "global_step2", hidden[2])  # before the first
    os.rename(tmp_path / "global_step3", hidden[3].with_name(hidden[3].name + ".replaced"))  # between them
    hidden[4].mkdir()  # before its manifest
    (hidden[4] / "rank-0-of-1").mkdir()
    for left in (".latest.0123456789abcdef", ".latest.tmp", ".0123456789abcdef.open-0", ".0123456789abcdef.done-12"):
        (tmp_path / left).write_text("x")
    (tmp_path / ".mine").mkdir()
    found = {made.tag: path for path, made in committed(tmp_path)}
    assert found == {
        "global_step1": hidden[1],
        "global_step2": tmp_path / "global_step2",
        "global_step3": hidden[3].with_name(hidden[3].name + ".replaced"),
    }
    assert find(tmp_path, "global_step1") == hidden[1]
    saver.save(job(tmp_path, 6))
    assert names(tmp_path) == {"latest", ".lock", ".mine", *(f"global_step{step}" for step in (1, 2, 3, 6))}
    assert sorted(checked(path) for path, _ in committed(tmp_path)) == [1, 2, 3, 6]


def test_the_new_one_is_taken_before_the_one_it_replaces(tmp_path):
    saver = Saver(mesh_of_one())
    saver.save(job(tmp_path, 1, tag="best"))
    os.rename(tmp_path / "best", tmp_path / (hidden_name("best", "0" * 16) + ".replaced"))
    saver = Saver(mesh_of_one())
    saver.save(job(tmp_path / "other", 2, tag="best"))
    os.rename(tmp_path / "other" / "best", tmp_path / hidden_name("best", "0" * 16))
    assert [made.step for _, made in committed(tmp_path)] == [2]
    folder.clear(tmp_path)
    assert names(tmp_path) == {"best", "latest", ".lock", "other"} and checked_tag(tmp_path, "best") == 2


def checked_tag(place: Path, tag: str) -> int:
    return next(made.step for path, made in committed(place) if path.name == tag)


def test_interrupted_by_the_user(tmp_path):
    def extras(hidden, records):
        raise KeyboardInterrupt

    saver = Saver(mesh_of_one())
    with pytest.raises(KeyboardInterrupt):
        saver.save(job(tmp_path, 1, extras=extras))
    assert not committed(tmp_path)
    assert checked(saver.save(job(tmp_path, 2))) == 2 and names(tmp_path) == {"latest", ".lock", "global_step2"}


# the disk


@pytest.mark.parametrize("call", ["rename", "fsync", "fdatasync", "pwritev", "link"])
def test_a_disk_that_fails_at_any_call(tmp_path, monkeypatch, call):
    """Each call of its kind in turn gives EIO; whatever comes of it, nothing that was there is lost."""
    saver = Saver(mesh_of_one())
    saver.save(job(tmp_path, 1))
    really, failed = getattr(os, call), 0
    for number in range(1, 40):
        calls = iter(range(1, 10_000))

        def broken(*args, calls=calls, number=number):
            if next(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return really(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, broken)
            try:
                saver.save(job(tmp_path, 1 + number))
            except SaveFailed as error:
                assert "rank 0: " in str(error) and "Input/output error" in str(error)
                failed += 1
        found = {made.step for path, made in committed(tmp_path) if checked(path)}
        assert 1 in found
        if next(calls) <= number:  # there is no such call any more
            break
    assert failed or call == "link"
    assert checked(saver.save(job(tmp_path, 100))) == 100
    assert all(not name.startswith(".") or name == ".lock" for name in names(tmp_path))


def test_a_limit_on_files(tmp_path, monkeypatch):
    def fallocate(descriptor, offset, length):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(SaveFailed, match=r"rank 0: .*bytes are needed and a limit on the size of files"):
            Saver(mesh_of_one()).save(job(tmp_path, 1))
    assert names(tmp_path) == {".lock"}


ON_A_SMALL_DISK = """
import os, subprocess, sys, threading
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from saving import checked, job, mesh_of_one
from tritonspeed.checkpoint import saver as saver_module
from tritonspeed.checkpoint.errors import SaveFailed
from tritonspeed.checkpoint.folder import committed
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.saver import Saver
from tritonspeed.offload.page_file import PageFile

place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)

def free():
    return os.statvfs(place).f_bavail * os.statvfs(place).f_frsize

def fails(saver, wanted):
    try:
        saver.save(wanted)
    except SaveFailed as error:
        return str(error)
    raise SystemExit("it did not fail")

def large(step, numel):
    values = torch.ones(numel)
    return job(place, step, records=[Record(PageFile("b", "m", torch.float32, numel), lambda lo, hi: values[lo:hi])])

saver = Saver(mesh_of_one())
saver.save(job(place, 1))
before = free()
said = fails(saver, large(2, 400_000))
assert "rank 0: " in said and "disk full: 1,605,632 bytes are needed and" in said and "are free" in said, said
assert free() == before and [checked(path) for path, _ in committed(place)] == [1]
print("no room:", said)
for left in range(0, 60_000, 4096):  # no room for this or that small file
    with open(place / "other", "wb") as other:
        other.write(bytes(max(0, free() - left)))
    try:
        saver.save(job(place, 1 + left // 4096))
    except SaveFailed as error:
        assert "No space left" in str(error) or "disk full" in str(error), error
        said = str(error)
    os.unlink(place / "other")
    assert all(checked(path) for path, _ in committed(place))
    assert all(not name.startswith(".") or name == ".lock" for name in os.listdir(place)), os.listdir(place)
print("hardly any room:", said)
saver.save(job(place, 99))
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
said = fails(saver, job(place, 100))
assert "Read-only file system" in said and "name a folder" in said, said
print("read-only:", said)
"""


def test_a_full_and_a_read_only_disk(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a namespace with mounts of its own is refused here")
    command = ["unshare", "-Urm", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), HERE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["no room", "hardly any room", "read-only"]


def broken_on(place, bad_rank, call):
    """Each call of its kind on one rank gives EIO in turn: what every rank says of every save."""
    mesh, really, told = mesh_of(), getattr(os, call), []
    saver = Saver(mesh)
    for number in range(1, 12):
        calls = iter(range(1, 10_000))

        def broken(*args, calls=calls, number=number):
            if next(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return really(*args)

        if mesh.rank == bad_rank:
            setattr(os, call, broken)
        try:
            saver.save(job(place, number, mesh.rank, mesh.world))
            told.append("")
        except SaveFailed as error:
            told.append(str(error))
        finally:
            setattr(os, call, really)
        mesh.barrier()
    return told


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_disk_that_fails_on_one_of_two_ranks(tmp_path, ranks, bad_rank, call):
    told = ranks(2, broken_on, tmp_path, bad_rank, call)
    assert told[0] == told[1], "the ranks are not told the same"
    failed = {number for number, text in enumerate(told[0], 1) if text.startswith("checkpoint") and "not saved" in text}
    assert failed and all(f"rank {bad_rank}: " in text for text in told[0] if text)
    there = {checked(path) for path, _ in committed(tmp_path)}
    assert there == set(range(1, 12)) - failed
