"""Who may use a folder, and what happens when the disk does not play along: an error that says it, no state lost."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from folders import noise, on_pages, store

from tritonspeed.offload import disk
from tritonspeed.offload.disk import CorruptState, DiskError, DiskFolder, verify


def test_two_runs_in_one_folder(tmp_path, folder):
    with pytest.raises(ValueError, match=f"another run holds this folder, process {os.getpid()}: close the engine"):
        DiskFolder(tmp_path, 1, 2)
    DiskFolder(tmp_path, 0, 2).close()
    folder.close()
    folder.close()
    DiskFolder(tmp_path, 1, 2).close()
    with pytest.raises(ValueError, match="the folder is closed"):
        folder.commit(1)


def test_another_process_holds_it_until_it_is_killed(tmp_path):
    program = f"""
    import time
    from tritonspeed.offload.disk import DiskFolder
    folder = DiskFolder({str(tmp_path)!r})
    print("held", flush=True)
    time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {other.pid}: wait for it, or end it"):
        DiskFolder(tmp_path)
    other.kill()
    other.communicate()
    DiskFolder(tmp_path).close()


def test_a_folder_that_nobody_can_reach_is_free(tmp_path):
    folder = DiskFolder(tmp_path)
    flat = folder.flat("a", "master", torch.float32, 10)
    assert flat._folder is folder, "a cycle, so that only the collector finds it"
    del folder, flat
    DiskFolder(tmp_path).close()


def test_a_forked_child_does_not_hold_it(tmp_path):
    folder = DiskFolder(tmp_path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # a data loader's worker that outlives the run
        os.read(reading, 1)
        os._exit(0)
    try:
        folder.forget_lock()  # as a kill does: without unlocking
        DiskFolder(tmp_path).close()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)


def test_what_a_dead_run_left_is_replaced_with_a_warning(tmp_path, caplog):
    first = DiskFolder(tmp_path)
    first.flat("old", "master", torch.float32, 10_000)
    first.commit(41)
    first.close()
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        second = DiskFolder(tmp_path)
        assert verify(second.folder) == 41, "until the first flat is made, it is there"
        assert not caplog.records
        second.flat("new", "master", torch.float32, 10)
    assert "replacing what an earlier run left, step 41 committed at 20" in caplog.text
    assert "engine.load_checkpoint(save_dir) takes the last checkpoint that was saved" in caplog.text
    assert not list(second.folder.glob("old*"))
    with pytest.raises(FileNotFoundError, match="nothing was committed"):
        verify(second.folder)
    second.close()


def test_files_of_another_number_of_ranks_are_named(tmp_path, caplog):
    DiskFolder(tmp_path, 0, 4).close()
    folder = DiskFolder(tmp_path, 0, 2)
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        folder.flat("a", "master", torch.float32, 10)
    assert "left files here too: ['rank-0-of-4']" in caplog.text
    folder.close()


def test_damaged_remains_do_not_stop_the_next_run(tmp_path, caplog):
    first = DiskFolder(tmp_path)
    first.flat("old", "master", torch.float32, 10)
    first.commit(41)
    first.close()
    (first.folder / "committed.json").write_text("{")
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        second = DiskFolder(tmp_path)
        second.flat("old", "master", torch.float32, 10)
    assert "damaged" in caplog.text
    second.close()


def test_a_name_twice_or_three_slots(folder):
    folder.flat("a", "master", torch.float32, 10)
    with pytest.raises(ValueError, match="master of a is there already"):
        folder.flat("a", "master", torch.float32, 10)
    with pytest.raises(ValueError, match="3 slots"):
        folder.flat("b", "master", torch.float32, 10, slots=3)


def test_a_missing_folder(tmp_path):
    DiskFolder(tmp_path / "new").close()
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/a: is the disk mounted"):
        DiskFolder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        DiskFolder(tmp_path / "file")


ON_A_SMALL_DISK = """
import errno, os, subprocess, sys
import torch
from tritonspeed.offload.disk import DiskFolder, verify

place = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
folder = DiskFolder(place)
flat = folder.flat("a", "master", torch.float32, 50_000)
flat.fill(torch.ones(50_000))
folder.commit(1)
free = os.statvfs(place).f_bavail
for numel, needed in ((200_000, "806,912"), (100_000, "405,504")):  # no room for a slot, no room for the second one
    try:
        folder.flat("b", "master", torch.float32, numel)
    except OSError as error:
        assert error.errno == errno.ENOSPC and f"{needed} bytes are needed" in str(error), error
        print("no room for a flat:", error)
    assert os.statvfs(place).f_bavail == free
assert verify(folder.folder) == 1
with open(place + "/other", "wb") as other:
    other.write(bytes(free * os.statvfs(place).f_frsize))
flat.store(0, flat.read(0, 50_000).add_(1)).wait()
try:
    folder.commit(2)
except OSError as error:
    assert error.errno == errno.ENOSPC and "step 2 could not be committed" in str(error), error
    assert "step 1 is committed" in str(error), error
    print("no room for the record:", error)
assert verify(folder.folder) == 1
os.unlink(place + "/other")
reserve, os.posix_fallocate = os.posix_fallocate, lambda descriptor, offset, length: os.ftruncate(descriptor, length)
sparse = folder.flat("c", "master", torch.float32, 200_000)
os.posix_fallocate = reserve
try:
    sparse.fill(torch.ones(200_000))
except OSError as error:
    assert error.errno == errno.ENOSPC and "c.master.0.safetensors" in str(error) and "nvme_path" in str(error), error
    print("no room for a write:", error)
assert verify(folder.folder) == 1
sparse.remove()
folder.commit(2)
assert verify(folder.folder) == 2 and (flat.read(0, 50_000) == 2).all()
folder.close()
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
try:
    DiskFolder(place)
except ValueError as error:
    assert "cannot be written: Read-only file system" in str(error), error
    print("read-only:", error)
"""


def test_a_full_and_a_read_only_disk(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a namespace with mounts of its own is refused here")
    command = ["unshare", "-Urm", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "no room for a flat",
        "no room for a flat",
        "no room for the record",
        "no room for a write",
        "read-only",
    ]


def test_a_file_that_vanished_is_found_before_it_is_committed(folder):
    flat = folder.flat("a", "master", torch.float32, 5000)
    folder.commit(1)
    store(flat, 0, noise(5000))
    (folder.folder / "a.master.1.safetensors").unlink()
    with pytest.raises(DiskError, match="a.master.1.safetensors"):
        folder.commit(2)
    assert verify(folder.folder) == 1
    with pytest.raises(DiskError, match="could not be synced.*start again from a checkpoint"):
        flat.store(0, on_pages(noise(5000)))


def test_a_file_that_was_cut_off(folder):
    flat = folder.flat("a", "master", torch.float32, 50_000)
    folder.commit(1)
    os.truncate(folder.folder / "a.master.0.safetensors", 50_000)
    with pytest.raises(DiskError, match="cut off at 50000 bytes while in use"):
        flat.read(0, 50_000)
    with pytest.raises(CorruptState, match="has 50,000 bytes, must have 204,800: it was cut off"):
        verify(folder.folder)


def test_a_sync_that_failed_is_not_asked_again(folder, monkeypatch):
    flat, really = folder.flat("a", "master", torch.float32, 5000), os.fdatasync
    folder.commit(1)
    store(flat, 0, noise(5000))

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(DiskError, match="sync"):
        folder.commit(2)
    monkeypatch.setattr(os, "fdatasync", really)
    with pytest.raises(DiskError, match="could not be synced"):
        folder.commit(2)
    assert verify(folder.folder) == 1


def test_a_record_whose_name_may_not_be_on_the_disk_stops_the_run(folder, monkeypatch):
    flat, really = folder.flat("a", "master", torch.float32, 5000), disk.sync_folder
    folder.commit(1)
    store(flat, 0, noise(5000))

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "sync_folder", fail)
    with pytest.raises(DiskError, match="commit of step 2 could not be synced"):
        folder.commit(2)
    monkeypatch.setattr(disk, "sync_folder", really)
    with pytest.raises(DiskError, match="start again"):
        flat.store(0, on_pages(noise(5000)))
    assert verify(folder.folder) == 2
