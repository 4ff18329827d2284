"""What readers of a folder find: the committed tensors, or where the damage is."""

from __future__ import annotations

import json

import pytest
import torch
from folders import SMALL, noise, store

from tritonspeed.offload.disk import CorruptState, DiskFolder, committed, verify
from tritonspeed.offload.page_file import Piece


@pytest.fixture
def left(tmp_path):
    """A folder that a run has left: two flats, three steps."""
    folder = DiskFolder(tmp_path, requests=SMALL)
    flats = [folder.flat("x", kind, torch.float32, 9000, [Piece.of("w", (9000,), 0)]) for kind in ("master", "exp_avg")]
    for step in range(3):
        for flat in flats:
            store(flat, 0, noise(5120))
            store(flat, 5120, noise(9000 - 5120))
        folder.commit(step)
    folder.close()
    return folder.folder


@pytest.mark.parametrize("at", (0, 1, 5120 * 4 - 1, 5120 * 4, 9000 * 4 - 1))
def test_a_flipped_bit_is_found(left, at):
    record = json.loads((left / "committed.json").read_text())
    path = left / record["flats"][0]["file"]
    content = bytearray(path.read_bytes())
    content[4096 + at] ^= 16
    path.write_bytes(content)
    found = committed(left)
    with pytest.raises(CorruptState, match=f"{path.name}: bytes .*damaged"):
        found["master/w"]
    found["exp_avg/w"]
    with pytest.raises(CorruptState, match=path.name):
        verify(left)


def test_a_flipped_bit_of_the_header_is_found(left):
    record = json.loads((left / "committed.json").read_text())
    path = left / record["flats"][0]["file"]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"w":', b'"v":', 1))
    with pytest.raises(CorruptState, match="header is not the committed one"):
        committed(left)
    path.unlink()
    with pytest.raises(CorruptState, match=path.name):
        verify(left)


@pytest.mark.parametrize(
    "change", ('"step": 2|"step": 3', '"slot": |"slot": 1', '"format": 1|"format": 2', "{|", "[|{")
)
def test_a_changed_record_is_found(left, change):
    path, (old, new) = left / "committed.json", change.split("|")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CorruptState, match="commit record is damaged"):
        verify(left)


def test_a_reader_that_a_run_overtook_is_told(tmp_path):
    folder = DiskFolder(tmp_path, requests=SMALL)
    flat = folder.flat("x", "master", torch.float32, 5000, [Piece.of("w", (5000,), 0)])
    flat.fill(noise(5000))
    folder.commit(0)
    found = committed(folder.folder)
    for step in (1, 2):
        store(flat, 0, noise(5000))
        folder.commit(step)
    with pytest.raises(CorruptState, match="a run has gone on to step 2 meanwhile"):
        found["master/w"]
    folder.close()


def test_damage_is_not_covered_by_copying_it(folder):
    flat = folder.flat("x", "master", torch.float32, 9000)
    flat.fill(noise(9000))
    folder.commit(0)
    path = folder.folder / "x.master.0.safetensors"
    with open(path, "r+b") as stream:
        stream.seek(4096 + 8000 * 4)
        stream.write(b"\xff\xff\xff\xff")
    store(flat, 0, noise(1024))
    folder.commit(1)
    with pytest.raises(CorruptState, match="x.master.1"):
        verify(folder.folder)
