"""Our own format read back: any interval of any parameter, from any number of ranks' files, checked."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from handmade import Rank, spread, write
from safetensors.torch import save_file

from tritonspeed.checkpoint import (
    CheckpointError,
    CorruptCheckpoint,
    MismatchedCheckpoint,
    ParameterFacts,
    blocks,
    data_file,
)
from tritonspeed.checkpoint.manifest import INDEX
from tritonspeed.checkpoint.stored import StoredCheckpoint, verify

SHAPES = {"embed": (300, 70), "norm": (33,), "layers.0.weight": (128, 64), "layers.0.bias": (1,), "scale": ()}


def facts(shapes=SHAPES):
    return {name: ParameterFacts(shape, torch.bfloat16) for name, shape in shapes.items()}


def values(kinds=("master", "exp_avg"), shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    return {kind: {name: torch.randn(shape).flatten().to(dtype) for name, shape in shapes.items()} for kind in kinds}


def compare(found, truth, rng, times=200):
    """Random intervals of everything."""
    for _ in range(times):
        kind = rng.choice(list(truth))
        name = rng.choice(list(truth[kind]))
        want = truth[kind][name]
        lo, hi = sorted(rng.randint(0, want.numel()) for _ in range(2))
        got = found.read(kind, name, lo, hi)
        assert got.dtype == want.dtype and torch.equal(got, want[lo:hi]), f"{kind} of {name}, [{lo}, {hi})"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two pages, so that small files have many; runs of more than four are long."""
    monkeypatch.setattr(data_file, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(data_file, "LONG_BYTES", 16384)
    monkeypatch.setattr(blocks, "RETURNED_BYTES", 4096)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("run_bytes", [1000, 4096, 12288, 2**24])
def test_any_interval_of_any_world(tmp_path, world, run_bytes, small_blocks):
    rng, truth = random.Random(world), values()
    path = write(tmp_path / "c", facts(), spread(truth, world, rng), run_bytes=run_bytes, gap=rng.choice((0, 5)))
    with StoredCheckpoint(path) as found:
        assert dict(found.parameters) == facts()
        compare(found, truth, rng)
        assert found.kinds("norm") == {"master", "exp_avg"}
    assert verify(path) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_any_dtype(tmp_path, dtype):
    truth = {"master": {n: v.mul(40).abs().to(dtype) for n, v in values()["master"].items()}}
    path, rng = write(tmp_path / "c", facts(), spread(truth, 3, random.Random(0)), run_bytes=1000), random.Random(1)
    with StoredCheckpoint(path) as found:
        for name, want in truth["master"].items():
            lo, hi = sorted(rng.randint(0, want.numel()) for _ in range(2))
            got = found.read("master", name, lo, hi)
            assert got.dtype == dtype and torch.equal(got.view(torch.uint8), want[lo:hi].view(torch.uint8))


def test_parts_of_several_dtypes_come_in_one_that_holds_all(tmp_path):
    left, right = torch.randn(5).bfloat16(), torch.randn(6)
    flats = [[("b", "master", [("w", 0, 5, left)])], [("b", "master", [("w", 5, 11, right)])]]
    path = write(tmp_path / "c", facts({"w": (11,)}), [Rank(each) for each in flats])
    with StoredCheckpoint(path) as found:
        assert torch.equal(found.read("master", "w", 0, 11), torch.cat([left.float(), right]))
        assert found.read("master", "w", 0, 4).dtype == torch.float32
    flats[1] = [("b", "master", [("w", 5, 11, right.to(torch.float8_e5m2))])]
    path = write(tmp_path / "other", facts({"w": (11,)}), [Rank(each) for each in flats])
    with pytest.raises(CorruptCheckpoint, match=r"master of 'w' is in files of torch.bfloat16, torch.float8_e5m2"):
        StoredCheckpoint(path)


def test_a_gradient_is_what_was_summed_and_what_waits(tmp_path):
    truth = values(("master", "gradient", "outbox"))
    of_all = {"norm", "scale"}  # of these nothing was summed yet
    truth["gradient"] = {n: v.bfloat16() for n, v in truth["gradient"].items() if n not in of_all}
    truth["outbox"] = {n: v.bfloat16() for n, v in truth["outbox"].items() if n != "embed"}
    world = 3
    path = write(tmp_path / "c", facts(), spread(truth, world, random.Random(0)))
    with StoredCheckpoint(path) as found:
        for name, shape in SHAPES.items():
            numel = torch.Size(shape).numel()
            want = torch.zeros(numel) if name in of_all else truth["gradient"][name].float()
            for rank in range(world):
                own = found.read_own("outbox", rank, name, 0, numel)
                if name == "embed":
                    assert own is None
                    want = truth["gradient"][name]
                    continue
                assert torch.equal(own, truth["outbox"][name] * (rank + 1))
                want += own.float()
            assert torch.equal(found.read("gradient", name, 0, numel), want)
            has = {"outbox": name != "embed", "gradient": name not in of_all, "master": True}
            assert found.kinds(name) == {kind for kind, there in has.items() if there}
        assert torch.equal(found.read("gradient", "norm", 3, 9), found.read("gradient", "norm", 0, 33)[3:9])


def test_names_numbers_and_states(tmp_path):
    parameters = {
        "w": ParameterFacts((4,), torch.float32, True, ("tied", "tied.too")),
        "frozen": ParameterFacts((2,), torch.float16, False),
        "nothing": ParameterFacts((0, 3), torch.float32),
    }
    run = {"global_steps": 3, "optimizer": "AdamW", "micro_batch": None, "param_groups": [{"params": ["w"]}]}
    kept = {"cpu": torch.arange(9, dtype=torch.uint8), "pair": (1, 2.5)}
    flats = [("b", "master", [("w", 0, 4, torch.arange(4.0))])]
    ranks = [
        Rank(flats, {"run": {**run, "of a later version": 1}, "random": kept}, [({"step": 3.0}, ("w",))]),
        Rank([], {"random": kept}),
        Rank(),
    ]
    path = write(tmp_path / "c", parameters, ranks)
    with StoredCheckpoint(path) as found:
        assert torch.equal(found.read("master", "tied.too", 1, 3), torch.tensor([1.0, 2.0]))
        assert found.kinds("tied") == {"master"} and found.scalars("tied") == {"step": 3.0}
        assert found.kinds("frozen") == frozenset() and found.scalars("frozen") == {}
        assert found.kinds("nothing") == {"master"} and found.read("master", "nothing", 0, 0).numel() == 0
        assert (found.facts.global_steps, found.facts.optimizer, found.facts.world) == (3, "AdamW", 3)
        assert found.facts.param_groups == [{"params": ["w"]}] and found.facts.micro_batch is None
        for rank in (0, 1):
            random_state = found.rank_state(rank)["random"]
            assert torch.equal(random_state["cpu"], kept["cpu"]) and random_state["pair"] == (1, 2.5)
        assert found.rank_state(2) == {} and found.rank_state(3) == {}
        with pytest.raises(MismatchedCheckpoint, match="no parameter 'unknown'"):
            found.kinds("unknown")
        with pytest.raises(MismatchedCheckpoint, match="no exp_avg of 'w'"):
            found.read("exp_avg", "tied", 0, 1)
        with pytest.raises(ValueError, match=r"\[2, 5\) of 'w', which has 4 elements"):
            found.read("master", "w", 2, 5)
    with pytest.raises(ValueError, match="'full', 'sampled' or 'none'"):
        StoredCheckpoint(path, "most")


GAPS = {
    "a gap": ([("w", 0, 4), ("w", 5, 9)], r"\[4, 5\) is in no file"),
    "an overlap": ([("w", 0, 5), ("w", 4, 9)], r"\[4, 5\) is in .* too"),
    "no beginning": ([("w", 1, 9)], r"\[0, 1\) is in no file"),
    "no end": ([("w", 0, 8)], r"\[8, 9\) is in no file"),
    "twice": ([("w", 0, 9), ("w", 0, 9)], r"\[0, 9\) is in .* too"),
}


@pytest.mark.parametrize(("parts", "says"), GAPS.values(), ids=GAPS)
def test_parts_that_are_not_the_whole(tmp_path, parts, says):
    ranks = [Rank([("b", "exp_avg", [(n, lo, hi, torch.zeros(hi - lo))])]) for n, lo, hi in parts]
    ranks[0].flats.append(("b", "master", [("w", 0, 9, torch.zeros(9))]))
    with pytest.raises(CorruptCheckpoint, match=f"exp_avg of 'w': {says}"):
        StoredCheckpoint(write(tmp_path / "c", facts({"w": (9,)}), ranks))


def test_a_trained_parameter_without_values(tmp_path):
    with pytest.raises(CorruptCheckpoint, match="no file has values of the trained parameter 'w'"):
        StoredCheckpoint(write(tmp_path / "c", facts({"w": (9,)}), [Rank()]))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_what_each_way_of_verifying_finds(tmp_path):
    """A file of 20 runs of a page: damage in one that is sampled, in one that is not, in the header, in the size."""
    numel = 20 * 1024
    truth = {"master": {"w": torch.randn(numel)}}
    path = write(tmp_path / "c", facts({"w": (numel,)}), spread(truth, 1, random.Random(0), buckets=1))
    file = path / "rank-0-of-1" / "bucket0.master.safetensors"
    good, begin = file.read_bytes(), os.path.getsize(file) - 4 * numel

    def finds(level):
        try:
            with StoredCheckpoint(path, level) as found:
                found.read("master", "w", 0, numel)
        except CorruptCheckpoint as error:
            assert str(file) in str(error)
            return True
        return False

    damage = {
        8 * 4096 + begin + 17: (True, True, False),  # run 8
        begin: (True, True, False),
        3 * 4096 + begin: (True, False, False),
        20: (True, True, False),
    }
    for at, wanted in damage.items():
        flip(file, at)
        assert tuple(finds(level) for level in ("full", "sampled", "none")) == wanted, at
        file.write_bytes(good)
    file.write_bytes(good[:-4096])
    assert all(finds(level) for level in ("full", "sampled", "none"))
    file.write_bytes(good)
    flip(file, 3 * 4096 + begin)
    with pytest.raises(CorruptCheckpoint, match=rf"bytes \[{begin + 12288:,}, {begin + 16384:,}\) are not what was"):
        verify(path)
    assert verify(path, every_byte=False) == 7
    with StoredCheckpoint(path) as found:  # the error is the same every time
        for _ in range(2):
            with pytest.raises(CorruptCheckpoint):
                found.read("master", "w", 3 * 1024, 3 * 1024 + 1)


def test_a_sample_is_an_eighth_of_the_reading(tmp_path, small_blocks):
    truth = {"master": {"w": torch.randn(64 * 2048)}}
    told = {True: [], False: []}
    path = write(tmp_path / "c", facts({"w": (64 * 2048,)}), spread(truth, 1, random.Random(0)), run_bytes=8192)
    for every_byte, read in told.items():
        verify(path, every_byte, read.append)
    assert sum(told[False]) * 8 == sum(told[True]) == 4 * 64 * 2048


def test_a_run_too_long_for_memory_is_checked_too(tmp_path, small_blocks):
    truth = {"master": {"w": torch.randn(20_000)}}
    path = write(tmp_path / "c", facts({"w": (20_000,)}), spread(truth, 1, random.Random(0)), run_bytes=2**20)
    with StoredCheckpoint(path) as found:
        assert sum(block.is_part for block in found.files[0][0].blocks) == 10
        compare(found, truth, random.Random(0), 30)
    file = path / "rank-0-of-1" / "bucket0.master.safetensors"
    flip(file, os.path.getsize(file) - 2000)
    with StoredCheckpoint(path) as found, pytest.raises(CorruptCheckpoint, match="digest"):
        found.read("master", "w", 0, 1)
    with StoredCheckpoint(path, "none") as found:
        assert torch.equal(found.read("master", "w", 0, 1), truth["master"]["w"][:1])


def held_bytes(found):
    held = found._blocks
    return sum(h.buffer.numel() for h in held._held.values()) + sum(x.numel() for x in held._free)


def test_memory_is_bounded_and_nothing_is_read_twice(tmp_path, small_blocks):
    """Bucket by bucket, several kinds in turn, as a loader does it."""
    shapes = {f"layers.{i}.w": (30_000 + 1000 * i,) for i in range(6)}
    truth = values(("master", "exp_avg", "exp_avg_sq"), shapes)
    path, told = write(tmp_path / "c", facts(shapes), spread(truth, 2, random.Random(3), buckets=6)), []
    reads = []
    for name in shapes:
        numel = truth["master"][name].numel()
        steps = [(lo, min(lo + 3000, numel)) for lo in range(0, numel, 3000)]
        reads += [("master", name, lo, hi) for lo, hi in steps]
        reads += [(kind, name, lo, hi) for lo, hi in steps for kind in ("exp_avg", "exp_avg_sq")]
    with StoredCheckpoint(path, on_bytes=told.append) as found:
        found._blocks = blocks.Blocks(20 * 8192, 4 * 8192, told.append)
        for kind, name, lo, hi in reads:
            assert torch.equal(found.read(kind, name, lo, hi), truth[kind][name][lo:hi])
            assert held_bytes(found) == found._blocks._total_bytes <= 20 * 8192
        assert sum(told) == found.total_bytes


def test_threads_may_read_at_once(tmp_path, small_blocks):
    """Buffers go from block to block: never under somebody who still reads."""
    shapes = {f"w{i}": (20_000,) for i in range(4)}
    truth = values(("master", "exp_avg"), shapes)
    path = write(tmp_path / "c", facts(shapes), spread(truth, 3, random.Random(3)))
    with StoredCheckpoint(path) as found, ThreadPoolExecutor(4) as threads:
        found._blocks = blocks.Blocks(6 * 8192, 2 * 8192)
        for done in [threads.submit(compare, found, truth, random.Random(i), 60) for i in range(4)]:
            done.result()


def test_values_stay_what_they_are(tmp_path, small_blocks):
    """Their memory is used again, once nobody has them any more."""
    truth = {"master": {"w": torch.randn(60_000)}}
    path = write(tmp_path / "c", facts({"w": (60_000,)}), spread(truth, 1, random.Random(3)))
    with StoredCheckpoint(path) as found:
        kept, places = [], set()
        for lo in range(0, 60_000, 2000):
            got = found.read("master", "w", lo, lo + 2000)
            places.add(got.data_ptr())
            if lo % 3:
                kept.append((lo, got[500:].view(torch.int32)))  # a view is enough to hold it
        assert len(places) < 30
    for lo, got in kept:
        assert torch.equal(got.view(torch.float32), truth["master"]["w"][lo + 500 : lo + 2000])


def test_a_file_system_without_direct_io(tmp_path, monkeypatch, small_blocks):
    """Some refuse to open for it, some to read."""
    truth = values()
    path = write(tmp_path / "c", facts(), spread(truth, 2, random.Random(0)), run_bytes=1000)
    real_open, real_read, refused = os.open, os.preadv, []

    def refuses_open(name, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "refused")
        return real_open(name, flags, *args, **kwargs)

    def refuses_read(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "refused")
        return real_read(descriptor, buffers, offset)

    for name, refuses in (("open", refuses_open), ("preadv", refuses_read)):
        refused.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuses)
            with StoredCheckpoint(path) as found:
                compare(found, truth, random.Random(0), 30)
        assert refused, name


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    truth = values()
    path = write(tmp_path / "c", facts(), spread(truth, 1, random.Random(0)))

    def fails(code):
        def read(descriptor, buffers, offset):
            raise OSError(code, os.strerror(code))

        return read

    with StoredCheckpoint(path) as found:
        monkeypatch.setattr(os, "preadv", fails(errno.EIO))
        with pytest.raises(CorruptCheckpoint, match=r"master.safetensors cannot be read: the disk failed"):
            found.read("master", "embed", 0, 5)
        monkeypatch.setattr(os, "preadv", fails(errno.EACCES))
        with pytest.raises(CheckpointError, match="Permission denied") as caught:
            found.read("master", "embed", 0, 5)
        assert not isinstance(caught.value, CorruptCheckpoint)
        monkeypatch.undo()
        compare(found, truth, random.Random(0), 20)


def test_a_folder_of_weights_inside_is_checked_by_size(tmp_path):
    path = write(tmp_path / "c", facts(), spread(values(), 1, random.Random(0)))
    (path / "model").mkdir()
    file = path / "model" / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    assert verify(path) == 7
    os.truncate(file, os.path.getsize(file) - 1)
    with pytest.raises(CorruptCheckpoint, match="model.safetensors"):
        verify(path)


def test_what_was_never_a_checkpoint(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json is missing"):
        StoredCheckpoint(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json is missing"):
        StoredCheckpoint(tmp_path / "nowhere")
    path = write(tmp_path / "c", facts(), spread(values(), 2, random.Random(0)))
    index = path / "rank-1-of-2" / INDEX
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content))  # says the same, and is not what the manifest was written for
    with pytest.raises(CorruptCheckpoint, match=r"rank-1-of-2/index.json is not the one"):
        StoredCheckpoint(path)
