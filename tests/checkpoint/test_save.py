"""Saving: what is committed is whole, at once or from a snapshot in a thread; ranks meet through files alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from saving import KINDS, WHOLE, checked, index_of, job, mesh_of_one, pieces_of, whole_flat

from tritonspeed.checkpoint.errors import CheckpointError
from tritonspeed.checkpoint.folder import check_tag, committed, find, latest_tag, write_latest
from tritonspeed.checkpoint.manifest import rank_folder
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.saver import Saver
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.checkpoint.writer import file_name, layout_of
from tritonspeed.comm.mesh import mesh_of
from tritonspeed.offload.disk import DiskFolder
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import PageFile, Piece

IN_HERE = {"latest", ".lock"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_saved_is_plain_safetensors(tmp_path):
    saver = Saver(mesh_of_one())
    path = saver.save(job(tmp_path, 3))
    assert path == tmp_path / "global_step3" and checked(path) == 3
    assert latest_tag(tmp_path) == "global_step3" and find(tmp_path, "global_step3") == path
    for kind in KINDS:
        flat, at = whole_flat(kind, 3), 0
        with safe_open(path / "rank-0-of-1" / f"layers.0.{kind}.safetensors", "pt") as file:
            for name, shape in WHOLE.items():
                numel = torch.Size(shape).numel()
                assert torch.equal(file.get_tensor(name), flat[at : at + numel].view(shape))
                at += numel
    index = index_of(path, 0, 1)
    assert index.scalars == (({"step": 3.0}, tuple(WHOLE)),)
    assert [i.name for i in index.layouts[0]] == list(WHOLE) and len(index.layouts) == 1
    assert names(tmp_path) == {*IN_HERE, "global_step3"}
    sizes = [p.stat().st_size for p in (path / "rank-0-of-1").glob("layers*")]
    assert saver.last is not None and saver.last.num_bytes == sum(sizes) and saver.last.path == path
    assert 0 < saver.last.write_seconds < saver.last.seconds == saver.last.stall_seconds


def saves(folder, steps, background=False):
    mesh = mesh_of()
    saver = Saver(mesh)
    for step in steps:
        if background:
            saver.start(job(folder, step, mesh.rank, mesh.world))
        else:
            saver.save(job(folder, step, mesh.rank, mesh.world))
    return str(saver.wait() if background else saver.last.path)


@pytest.mark.parametrize("background", [False, True])
def test_every_rank_writes_its_slice(tmp_path, ranks, background):
    paths = ranks(3, saves, tmp_path, [1, 2], background)
    assert paths == [str(tmp_path / "global_step2")] * 3
    assert [checked(path) for path, _ in committed(tmp_path)] == [2, 1]
    assert names(tmp_path / "global_step2") == {"manifest.json", *(rank_folder(rank, 3) for rank in range(3))}


def gate(slow: threading.Event):
    """Extras that hold a save back until ``slow`` is set."""

    def extras(hidden, records):
        assert slow.wait(20), "the save was held back for too long"

    return extras


def test_training_goes_on_meanwhile(tmp_path):
    saver, go = Saver(mesh_of_one()), threading.Event()
    values = torch.arange(4096.0)
    file = PageFile("b", "master", torch.float32, 4096, (Piece.of("w", (4096,), 0),))
    record, facts = Record(file, lambda lo, hi: values[lo:hi]), {"w": ParameterFacts((4096,), torch.float32)}
    saver.start(job(tmp_path, 1, extras=gate(go), records=[record], parameters=facts))
    assert saver.in_progress and not committed(tmp_path)
    saver.check()  # nothing to say while it goes on
    values.zero_()
    go.set()
    path = saver.wait()
    assert path == tmp_path / "global_step1" and not saver.in_progress and saver.wait() is None
    with safe_open(path / "rank-0-of-1" / "b.master.safetensors", "pt") as saved:
        assert torch.equal(saved.get_tensor("w"), torch.arange(4096.0))
    assert saver.last is not None and saver.last.stall_seconds < saver.last.seconds


def test_the_memory_of_a_snapshot_is_used_again(tmp_path):
    made = []

    def empty(numel, dtype):
        made.append(numel)
        return host_empty(numel, dtype)

    saver = Saver(mesh_of_one(), empty=empty)
    for step in (1, 2, 3):
        saver.start(job(tmp_path, step))
        saver.wait()
    assert len(made) == len(KINDS)
    one = job(tmp_path, 4).records[:1]
    saver.start(job(tmp_path, 4, records=one))  # what is not needed goes
    saver.start(job(tmp_path, 5))
    saver.wait()
    assert len(made) == len(KINDS) + 1
    assert [checked(tmp_path / f"global_step{step}") for step in (1, 2, 3, 5)] == [1, 2, 3, 5]
    saver, made[:] = Saver(mesh_of_one(), empty=empty, keep_buffers=False), []
    for step in (6, 7):
        saver.start(job(tmp_path, step))
    saver.wait()
    assert len(made) == 2 * len(KINDS)


def test_one_save_follows_the_other(tmp_path):
    saver, go = Saver(mesh_of_one()), threading.Event()
    saver.start(job(tmp_path, 1, extras=gate(go)))
    threading.Timer(0.05, go.set).start()
    saver.start(job(tmp_path, 2))  # waits
    assert latest_tag(tmp_path) in ("global_step1", "global_step2")
    saver.save(job(tmp_path, 3))
    assert [checked(path) for path, _ in committed(tmp_path)] == [3, 2, 1]


AT_THE_END = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from saving import job, mesh_of_one
from tritonspeed.checkpoint.saver import Saver

Saver(mesh_of_one()).start(job(Path(sys.argv[1]), 7, extras=lambda hidden, records: time.sleep(0.3)))
"""


def test_the_end_of_the_program_waits_for_the_save(tmp_path):
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, str(tmp_path), here], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert checked(tmp_path / "global_step7") == 7


def test_extras_see_the_records_as_they_are_saved(tmp_path):
    seen = {}

    def extras(hidden, records):
        (hidden / "model").mkdir()
        (hidden / "model" / "a.txt").write_text("a")
        seen["values"] = records[0].read(0, 10).clone()

    path = Saver(mesh_of_one()).save(job(tmp_path, 2, extras=extras))
    assert (path / "model" / "a.txt").read_text() == "a"
    assert torch.equal(seen["values"], whole_flat(KINDS[0], 2)[:10])


def test_a_slot_on_disk_is_the_file(tmp_path):
    """The committed slot is linked, not copied; the next step leaves it alone."""
    folder = DiskFolder(tmp_path / "nvme")
    flats = {kind: folder.flat("layers.0", kind, torch.float32, 4096, pieces_of(0, 4096)) for kind in KINDS}
    for kind, flat in flats.items():
        flat.fill(whole_flat(kind, 5))
    folder.commit(5)
    records = [Record(flat.contents, flat.read, flat) for flat in flats.values()]
    saver, go = Saver(mesh_of_one()), threading.Event()
    saver.start(job(tmp_path / "save", 5, records=records, extras=gate(go)))
    for _ in range(2):
        for flat in flats.values():
            flat.store(0, host_empty(4096, torch.float32).zero_()).wait()
        folder.commit(6)
    go.set()
    path = saver.wait()
    assert path is not None and checked(path) == 5
    assert {(path / "rank-0-of-1" / f"layers.0.{kind}.safetensors").stat().st_nlink for kind in KINDS} == {1}
    saver.save(job(tmp_path / "save", 5, tag="again", records=records))
    assert {p.stat().st_nlink for p in (tmp_path / "save" / "again" / "rank-0-of-1").glob("layers*")} == {2}
    folder.close()


# tags, latest, keeping


def test_a_tag_saved_again_is_replaced(tmp_path):
    saver = Saver(mesh_of_one())
    saver.save(job(tmp_path, 1, tag="best"))
    saver.save(job(tmp_path, 2, tag="best"))
    assert checked(tmp_path / "best") == 2 and names(tmp_path) == {*IN_HERE, "best"}


def test_the_newest_are_kept(tmp_path):
    saver = Saver(mesh_of_one())
    (tmp_path / "mine").mkdir()
    (tmp_path / "global_step77").mkdir()
    (tmp_path / "global_step77" / "theirs").write_text("x")
    for step in range(1, 6):
        saver.save(job(tmp_path, step, keep_last=2))
    assert names(tmp_path) == {*IN_HERE, "mine", "global_step77", "global_step4", "global_step5"}
    os.rename(tmp_path / "global_step4", tmp_path / "a good one")  # whoever renames one keeps it
    saver.save(job(tmp_path, 6, keep_last=1, set_latest=False))
    assert names(tmp_path) == {*IN_HERE, "mine", "global_step77", "a good one", "global_step5", "global_step6"}
    assert latest_tag(tmp_path) == "global_step5"  # and so that one stays
    write_latest(tmp_path, "global_step6")
    saver.save(job(tmp_path, 3, keep_last=1, set_latest=False))  # an older step, written just now
    assert names(tmp_path) == {*IN_HERE, "mine", "global_step77", "a good one", "global_step3", "global_step6"}
    assert [made.step for _, made in committed(tmp_path)] == [3, 6, 4]


def test_the_folder_is_made_with_those_above_it(tmp_path):
    assert checked(Saver(mesh_of_one()).save(job(tmp_path / "a" / "b", 1))) == 1


@pytest.mark.parametrize(
    "tag", ["", ".", "..", "a/b", "/abs", ".hidden", "latest", "a\nb", " a", "a\0", "x" * 201, "ä" * 101, "a\\b"]
)
def test_a_tag_is_a_plain_name(tmp_path, tag):
    with pytest.raises(ValueError, match="tag"):
        job(tmp_path, 1, tag=tag)


def test_good_tags():
    for tag in ("global_step12", "epoch 3", "ä" * 100, "a.b-c", "checkpoint..x"):
        assert check_tag(tag) == tag


def test_latest_that_cannot_be_used_names_nothing(tmp_path, caplog):
    assert latest_tag(tmp_path) is None and latest_tag(tmp_path / "none") is None and not caplog.records
    for content in (b"", b"../../etc", b"\xff\xfe", b"x" * 5000):
        (tmp_path / "latest").write_bytes(content)
        assert latest_tag(tmp_path) is None
    assert len(caplog.records) == 4
    (tmp_path / "latest").write_text("global_step3\n")
    assert latest_tag(tmp_path) == "global_step3"


def test_what_is_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there are: none"):
        find(tmp_path, "a")
    Saver(mesh_of_one()).save(job(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no checkpoint 'a' was committed here; there are: global_step1"):
        find(tmp_path, "a")
    with pytest.raises(ValueError, match="plain name"):
        find(tmp_path, "../a")
    assert committed(tmp_path / "nothing") == []


def test_a_damaged_manifest_is_left_out(tmp_path, caplog):
    saver = Saver(mesh_of_one())
    for step in (1, 2):
        saver.save(job(tmp_path, step))
    place = tmp_path / "global_step2" / "manifest.json"
    place.write_bytes(place.read_bytes()[:-40])
    assert [made.step for _, made in committed(tmp_path)] == [1]
    assert "the manifest is damaged" in caplog.text
    assert checked(saver.save(job(tmp_path, 2))) == 2  # and can be saved again


# names in files


def test_names_of_files():
    made = PageFile("layers/0 ü", "exp_avg", torch.float32, 0)
    assert file_name(made) == "layers%2F0%20%C3%BC.exp_avg.safetensors"
    long = [file_name(PageFile("x" * 300 + end, "m", torch.float32, 0)) for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 220 for name in long)


def test_parts_of_parameters_are_intervals():
    facts = job(Path("x"), 1).parameters
    pieces = (Piece.of("a.weight", (30, 50), 5, 100, 200), Piece.of("b.bias", (333,), 105))
    layout = layout_of(PageFile("b", "master", torch.float32, 4096, pieces), facts)
    assert [(i.name, i.lo, i.hi, i.start) for i in layout] == [("a.weight", 100, 200, 5), ("b.bias", 0, 333, 105)]
    named_like_a_part = {"w[0:3]": facts["c"]}
    layout = layout_of(PageFile("b", "m", torch.float32, 9, (Piece("w[0:3]", (7,), 0, 7),)), named_like_a_part)
    assert [(i.name, i.lo, i.hi) for i in layout] == [("w[0:3]", 0, 7)]
    with pytest.raises(ValueError, match="'w' is no parameter"):
        layout_of(PageFile("b", "m", torch.float32, 9, (Piece("w", (7,), 0, 7),)), facts)
