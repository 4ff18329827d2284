"""A rank's folder: slots, commits, edits."""

from __future__ import annotations

import errno
import os
import time

import pytest
import torch
from folders import SMALL, noise, on_pages, store
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tritonspeed.offload import disk
from tritonspeed.offload.disk import DiskError, DiskFolder, committed, verify
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.page_file import DTYPES, Piece


@pytest.mark.parametrize("slots", (1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", (0, 1, 4096, 12_345))
def test_a_round_trip(folder, numel, dtype, slots):
    flat, first, second = (
        folder.flat("b", "master", dtype, numel, slots=slots),
        noise(numel, dtype),
        noise(numel, dtype),
    )
    assert (flat.numel, flat.dtype, flat.page_elems) == (numel, dtype, 4096 // dtype.itemsize)
    assert torch.equal(flat.read(0, numel), torch.zeros(numel, dtype=dtype))
    flat.fill(first)
    assert torch.equal(flat.read(0, numel), first)
    folder.commit(1)
    store(flat, 0, second)
    assert torch.equal(flat.read(0, numel), second if slots == 1 else first)
    into = on_pages(noise(numel, dtype))
    flat.fetch(0, numel, into).wait()
    assert torch.equal(into, second if slots == 1 else first)
    folder.commit(2)
    assert torch.equal(flat.read(0, numel), second)
    assert verify(folder.folder) == 2


@pytest.mark.parametrize("slots", (1, 2))
def test_reads_begin_and_end_anywhere(folder, slots):
    flat, values = folder.flat("b", "master", torch.bfloat16, 9001, slots=slots), noise(9001, torch.bfloat16)
    flat.fill(values)
    for lo, hi in ((0, 0), (0, 1), (2047, 2049), (9000, 9001), (1, 9001), (4096, 6144), (9001, 9001)):
        assert torch.equal(flat.read(lo, hi), values[lo:hi])
    for lo, hi in ((-1, 1), (0, 9002), (5, 4)):
        with pytest.raises(ValueError, match=r"not within \[0, 9001\)"):
            flat.read(lo, hi)


def test_a_flat_is_filled_from_any_tensor(folder):
    flat = folder.flat("b", "master", torch.float32, 10_000)
    values = torch.randn(100, 100, dtype=torch.float64).t()
    flat.fill(values)
    assert torch.equal(flat.read(0, 10_000), values.float().reshape(-1))
    with pytest.raises(ValueError, match="filled with 9999 values"):
        flat.fill(torch.zeros(9999))


def test_what_is_not_on_pages_is_our_mistake(folder):
    flat, buffer = folder.flat("b", "master", torch.float32, 5000), host_empty(5000, torch.float32)
    for lo, tensor in ((1, buffer[:4999]), (0, buffer[:1000]), (1024, buffer), (0, buffer.double()), (0, buffer[None])):
        with pytest.raises(AssertionError, match="DiskFlat"):
            flat.store(lo, tensor)
        with pytest.raises(AssertionError, match="DiskFlat"):
            flat.fetch(lo, lo + tensor.numel(), tensor)


def test_what_was_not_stored_in_a_step_is_the_last_step_s(folder):
    flat, values = folder.flat("b", "master", torch.float32, 30_000), noise(30_000)
    flat.fill(values)
    folder.commit(0)
    for step in range(1, 6):
        lo = 1024 * step
        values[lo : lo + 2048] = noise(2048)
        store(flat, lo, values[lo : lo + 2048])
        folder.commit(step)
        assert torch.equal(flat.read(0, 30_000), values)
        assert verify(folder.folder) == step


def test_flats_that_were_not_stored_stay_where_they_are(folder):
    flats = [folder.flat(name, "master", torch.float32, 5000) for name in ("a", "b")]
    for flat in flats:
        flat.fill(noise(5000))
    folder.commit(0)
    before = flats[1].read(0, 5000)
    folder.traffic.written_bytes = 0
    store(flats[0], 0, noise(5000))
    folder.commit(1)
    assert folder.traffic.written_bytes == 20480, "5,000 elements of the other flat, and their page"
    assert torch.equal(flats[1].read(0, 5000), before) and verify(folder.folder) == 1


def test_a_flat_made_after_a_commit_counts_from_the_next_one_on(folder):
    folder.flat("a", "master", torch.float32, 10).fill(torch.ones(10))
    folder.commit(1)
    late = folder.flat("b", "master", torch.float32, 10, [Piece.of("w", (10,), 0)])
    late.fill(torch.ones(10))
    late.edit(3, torch.zeros(2))
    assert list(committed(folder.folder)) == []
    folder.commit(2)
    assert committed(folder.folder)["master/w"].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("slots", (1, 2))
@pytest.mark.parametrize("is_committed", (False, True))
@pytest.mark.parametrize(("lo", "hi"), ((0, 20_000), (0, 1), (1023, 1025), (19_999, 20_000), (77, 15_000), (5, 5)))
def test_an_edit_changes_what_is_committed(folder, lo, hi, slots, is_committed):
    flat, other = (
        folder.flat("b", "master", torch.float32, 20_000, slots=slots),
        folder.flat("c", "m", torch.float32, 9),
    )
    values = noise(20_000)
    flat.fill(values)
    if is_committed:
        folder.commit(7, {"lr": 0.5})
        store(other, 0, torch.ones(9))  # of a step that has not ended
    values[lo:hi] = torch.arange(hi - lo)
    flat.edit(lo, torch.arange(hi - lo))
    assert torch.equal(flat.read(0, 20_000), values)
    assert not other.read(0, 9).any()
    if is_committed:
        found = committed(folder.folder)
        found.check_all()
        assert (found.record.step, found.record.facts) == (7, {"lr": 0.5})
    folder.commit(8)
    assert torch.equal(flat.read(0, 20_000), values) and other.read(0, 9).all() == is_committed
    verify(folder.folder)


def test_an_edit_in_the_middle_of_a_step_is_refused(folder):
    flat = folder.flat("b", "master", torch.float32, 2048)
    folder.commit(0)
    store(flat, 0, torch.ones(1024))
    with pytest.raises(RuntimeError, match="commit or discard it first"):
        flat.edit(0, torch.ones(1))
    folder.discard()
    flat.edit(0, torch.ones(1))
    assert flat.read(0, 2048).sum() == 1


def test_many_edits_are_one_commit(folder, monkeypatch):
    flats = [folder.flat(name, "master", torch.float32, 20_000) for name in ("a", "b", "c")]
    wanted = [noise(20_000) for _ in flats]
    for flat, values in zip(flats, wanted, strict=True):
        flat.fill(values)
    folder.commit(3)
    records = []
    write_record = disk.write_record
    monkeypatch.setattr(disk, "write_record", lambda *args: (records.append(args), write_record(*args)))
    with folder.editing():
        for i, lo in ((0, 5), (1, 1020), (0, 4), (0, 19_000), (1, 0)):
            flats[i].edit(lo, torch.full((100,), -1.0))
            wanted[i][lo : lo + 100] = -1
        assert (flats[0].read(0, 20_000) >= 0).all(), "edits show at the end"
    assert len(records) == 1 and verify(folder.folder) == 3
    for flat, values in zip(flats, wanted, strict=True):
        assert torch.equal(flat.read(0, 20_000), values)


def test_edits_that_fail_change_nothing(folder):
    flat = folder.flat("a", "master", torch.float32, 20_000)
    folder.commit(3)
    with pytest.raises(KeyError), folder.editing():
        flat.edit(0, torch.ones(10))
        raise KeyError
    assert not flat.read(0, 20_000).any()
    store(flat, 0, torch.ones(20_000))
    folder.commit(4)
    assert flat.read(0, 20_000).all() and verify(folder.folder) == 4


def test_a_removed_flat_takes_its_files_along_and_leaves_the_record_true(folder):
    keep, gone = folder.flat("a", "master", torch.float32, 10), folder.flat("b", "master", torch.float32, 10)
    folder.commit(1)
    store(keep, 0, torch.ones(10))  # waits for its own commit
    gone.remove()
    assert sorted(path.name for path in folder.folder.glob("*.safetensors")) == [
        "a.master.0.safetensors",
        "a.master.1.safetensors",
    ]
    assert verify(folder.folder) == 1 and not keep.read(0, 10).any()
    folder.commit(2)
    assert verify(folder.folder) == 2 and keep.read(0, 10).all()
    folder.flat("b", "master", torch.float32, 10)


def test_a_fetch_from_one_slot_comes_after_a_store_under_way(folder, monkeypatch):
    flat, values, really = folder.flat("a", "parameters", torch.float32, 20_000, slots=1), noise(20_000), os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: (time.sleep(0.01), really(*args))[1])
    handle, into = flat.store(0, on_pages(values)), host_empty(20_000, torch.float32)
    flat.fetch(0, 20_000, into).wait()
    assert torch.equal(into, values)
    handle.wait()


def test_a_second_store_comes_after_the_first_one_of_the_same_elements(folder, monkeypatch):
    flat, values, really, calls = folder.flat("a", "master", torch.float32, 2048), noise(2048), os.pwritev, []
    folder.commit(0)

    def first_is_slow(*args):
        calls.append(args)
        if len(calls) == 1:
            time.sleep(0.05)
        return really(*args)

    monkeypatch.setattr(os, "pwritev", first_is_slow)
    first = flat.store(0, on_pages(noise(2048)))
    flat.store(0, on_pages(values)).wait()
    folder.commit(1)
    first.wait()
    assert torch.equal(flat.read(0, 2048), values) and verify(folder.folder) == 1


def test_a_step_that_is_stored_again_is_committed_as_stored_last(folder, monkeypatch):
    flat, really = folder.flat("a", "master", torch.float32, 20_000), os.pwritev
    folder.commit(0)

    def full(descriptor, buffers, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    handle = flat.store(4096, on_pages(noise(4096)))
    with pytest.raises(DiskError, match="No space"):
        handle.wait()
    with pytest.raises(DiskError, match="No space"):
        folder.commit(1)
    assert verify(folder.folder) == 0
    monkeypatch.setattr(os, "pwritev", really)
    values = noise(20_000)
    store(flat, 0, values)
    folder.commit(1)
    assert torch.equal(flat.read(0, 20_000), values) and verify(folder.folder) == 1


def test_files_carry_their_tensors_by_name_and_anybody_opens_them(folder):
    pieces = [Piece.of("w", (3, 4), 0), Piece.of("größe/b", (100,), 64, 10, 20), Piece.of("none", (0, 2), 80)]
    flat = folder.flat("layers.0/x", "exp_avg", torch.float32, 100, pieces)
    flat.fill(torch.arange(100))
    folder.commit(1)
    loaded = load_file(folder.folder / "layers.0%2Fx.exp_avg.0.safetensors")
    found = committed(folder.folder)
    assert set(found) == {"exp_avg/w", "exp_avg/größe/b[10:20]", "exp_avg/none"} and len(found) == 3
    for name, wanted in (("w", torch.arange(12.0).view(3, 4)), ("größe/b[10:20]", torch.arange(64.0, 74)),
                         ("none", torch.zeros(0, 2))):  # fmt: skip
        assert torch.equal(loaded[name], wanted) and torch.equal(found[f"exp_avg/{name}"], wanted)
    assert (found.record.step, found.record.rank, found.record.world) == (1, 1, 2)
    with pytest.raises(KeyError):
        found["exp_avg/other"]


class Model:
    """What a folder must hold: arrays in memory, two of them for each flat."""

    def __init__(self, numel: int) -> None:
        self.now, self.next = torch.zeros(numel), None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_stores_edits_and_commits(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.sampled_from((1, 1024, 5000, 9000)), min_size=1, max_size=3))
    slots = data.draw(st.lists(st.sampled_from((1, 2)), min_size=len(sizes), max_size=len(sizes)))
    folder = DiskFolder(tmp_path_factory.mktemp("any"), requests=SMALL)
    flats = [
        folder.flat(str(i), "m", torch.float32, n, slots=s) for i, (n, s) in enumerate(zip(sizes, slots, strict=True))
    ]
    models, step = [Model(n) for n in sizes], 0
    for _ in range(data.draw(st.integers(1, 12))):
        i = data.draw(st.integers(0, len(flats) - 1))
        flat, model, action = (
            flats[i],
            models[i],
            data.draw(st.sampled_from(("store", "store", "edit", "commit", "drop"))),
        )
        if action == "store":
            lo = 1024 * data.draw(st.integers(0, (flat.numel - 1) // 1024))
            hi = data.draw(st.sampled_from([*range(lo + 1024, flat.numel, 1024), flat.numel]))
            values = noise(hi - lo)
            store(flat, lo, values)
            if slots[i] == 1:
                model.now[lo:hi] = values
            else:
                model.next = model.now.clone() if model.next is None else model.next
                model.next[lo:hi] = values
        elif action == "edit" and model.next is None:
            lo = data.draw(st.integers(0, flat.numel - 1))
            values = noise(data.draw(st.integers(1, flat.numel - lo)))
            flat.edit(lo, values)
            model.now[lo : lo + values.numel()] = values
        elif action == "drop":
            folder.discard()
            for other in models:
                other.next = None
        elif action == "commit":
            step += 1
            folder.commit(step)
            for other in models:
                other.now, other.next = (other.now if other.next is None else other.next), None
        for flat, model in zip(flats, models, strict=True):
            assert torch.equal(flat.read(0, flat.numel), model.now)
        if step:
            assert verify(folder.folder) == step
    folder.close()
