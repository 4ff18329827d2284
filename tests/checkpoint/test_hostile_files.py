"""Thousands of damaged and forged checkpoints: refused with a reason, or read right; nothing else, and nothing written.

Damage (flipped bits, cut files) must always be found. A forgery has right digests everywhere, so that the code behind
them is reached: it may say something else, but nothing that crashes, leads out of the folder, or takes memory or time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hostile import WORLD, Fixture, Watch, mutate, rearrange, seal

from tritonspeed.checkpoint import CheckpointError, CorruptCheckpoint
from tritonspeed.checkpoint.manifest import INDEX, MANIFEST, STATE
from tritonspeed.checkpoint.stored import StoredCheckpoint, verify
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.page_file import PageFile, Piece, header_bytes

WATCH = Watch()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """In memory where there is a place for it: direct reads wait for a disk to have what was written."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm)) if os.access(shm, os.W_OK) else tmp_path_factory.mktemp("fuzz")
    yield Fixture(folder)
    shutil.rmtree(folder)


def refused(made: Fixture) -> bool:
    """Whether ``verify`` finds it."""
    with WATCH.on(made.path):
        try:
            verify(made.path)
        except CorruptCheckpoint as error:
            assert str(made.path) in str(error)
            str(error).encode()  # what cannot be printed explains nothing
            return True
    return False


def handled(made: Fixture, level: str = "full") -> str:
    with WATCH.on(made.path):
        return made.outcome(level)


def test_the_good_one_is_read(made):
    assert handled(made) == handled(made, "sampled") == handled(made, "none") == "right"
    assert verify(made.path) == 7


def test_every_flipped_bit_is_found(made):
    rng, found = random.Random(1), 0
    for file in made.files():
        content = (made.good / file).read_bytes()
        filler = filler_begins(made, file, len(content))
        for at in {0, 7, 8, filler - 1, *(rng.randrange(filler) for _ in range(90))}:
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            with made.changed(file, flipped):
                assert refused(made), f"{file}, byte {at}"
                found += 1
    assert found > 1000


def filler_begins(made: Fixture, file: Path, size: int) -> int:
    """Behind the flat, up to the end of the page, no value stands."""
    if file.name in (MANIFEST, INDEX, STATE):
        return size
    index = json.loads((made.good / file.parent / INDEX).read_text())
    record = next(f for f in index["files"] if f["file"] == file.name)
    return record["begin"] + record["digests"][-1][1]


def test_every_cut_is_found(made):
    rng, found = random.Random(2), 0
    for file in made.files():
        content = (made.good / file).read_bytes()
        size = len(content)
        ends = {0, 1, 7, 8, 9, size - 1, size // 2, *range(0, size, 512), *(rng.randrange(size) for _ in range(5))}
        for end in ends:
            with made.changed(file, content[:end]):
                # the manifest's last character ends its line, and nobody but its own text vouches for it
                assert refused(made) or (file.name == MANIFEST and end == size - 1), f"{file} cut at {end}"
                found += 1
        for more in (b"\0", b" ", bytes(4096), content):
            with made.changed(file, content + more):
                # a JSON file may end in white space; its digest is of what it says
                assert refused(made) or (file.name == MANIFEST and more == b" "), f"{file} longer by {len(more)}"
    assert found > 300


def test_what_is_no_file_of_the_checkpoint_is_not_opened(made, tmp_path):
    for file in made.files():
        place = made.path / file
        outside = tmp_path / f"outside-{file.name}"
        shutil.copyfile(made.good / file, outside)  # with the very bytes that are expected
        for put in (
            lambda place=place: None,
            lambda place=place: place.mkdir(),
            lambda place=place: os.mkfifo(place),
            lambda place=place, outside=outside: place.symlink_to(outside),
            lambda place=place: place.symlink_to("/dev/zero"),
            lambda place=place: place.symlink_to(place),
        ):
            place.unlink()
            put()
            assert refused(made)
            made.reset()
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(CorruptCheckpoint, match="is no regular file"):
            verify(made.path)
        place.unlink()
        os.link(made.good / file, place)  # the disk tier's files are linked
        assert not refused(made)
        made.reset()
    for rank in range(WORLD):
        folder = made.path / f"rank-{rank}-of-{WORLD}"
        shutil.copytree(folder, tmp_path / folder.name)
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / folder.name)
        assert refused(made)
        folder.unlink()
        assert refused(made)
        made.reset()


def test_files_of_one_size_in_each_others_place(made):
    by_size: dict[int, list[Path]] = {}
    for file in made.files():
        by_size.setdefault((made.good / file).stat().st_size, []).append(file)
    swapped = 0
    for files in by_size.values():
        for file in files[1:]:
            content = (made.good / files[0]).read_bytes()
            if content == (made.good / file).read_bytes():
                continue
            with made.changed(file, content):
                assert refused(made) and handled(made, "sampled") == "refused"
                swapped += 1
    assert swapped > 3


@pytest.mark.parametrize("change", [mutate, rearrange])
@pytest.mark.parametrize("part", range(2))
def test_forged_indexes(made, change, part):
    rng, outcomes = random.Random(100 + part), []
    for _ in range(400):
        said, level = [], rng.choice(("full", "full", "none"))
        with made.forged(rng.randrange(WORLD), lambda content, said=said: said.append(change(content, rng))):
            try:
                outcomes.append(handled(made, level))
            except BaseException as error:
                raise AssertionError(f"{said}, {level}: {error!r}") from error
    assert outcomes.count("refused") > 200 and outcomes.count("right") > 10


@pytest.mark.parametrize("part", range(2))
def test_forged_manifests(made, part):
    rng, outcomes = random.Random(200 + part), []
    for _ in range(300):
        content = json.loads((made.good / MANIFEST).read_text())
        said = mutate(content, rng)
        with made.changed(MANIFEST, seal(content)):
            try:
                outcomes.append(handled(made))
            except BaseException as error:
                raise AssertionError(f"{said}: {error!r}") from error
    assert outcomes.count("refused") > 100 and outcomes.count("right") > 10


def test_a_shape_that_no_tensor_has(made):
    content = json.loads((made.good / MANIFEST).read_text())
    content["parameters"]["scale"]["shape"] = [1] * 65
    with made.changed(MANIFEST, seal(content)):
        assert refused(made)
    content["parameters"]["scale"]["shape"] = [1] * 64
    with made.changed(MANIFEST, seal(content)):
        assert handled(made) == "right"


def test_a_file_that_is_nothing_but_size(made):
    """A terabyte takes no place on the disk; it must not be asked for in memory."""
    numel, step = 2**38, 2**32
    file = PageFile("huge", "parameters", torch.float32, numel, (Piece.of("huge", (numel,), 0),), 0, WORLD)
    header = header_bytes(file)
    flat = made.path / f"rank-0-of-{WORLD}" / "huge.safetensors"
    flat.write_bytes(header)

    def grow(content, begin):
        runs = [[lo, lo + step, "0" * 16] for lo in range(0, 4 * numel, step)]
        content["layouts"].append([["huge", 0, numel, 0]])
        content["files"].append(
            {**content["files"][0], "file": flat.name, "bucket": file.bucket, "kind": file.kind, "numel": numel}
            | {"layout": len(content["layouts"]) - 1, "begin": begin}
            | {"header": digest_of(header), "digests": runs}
        )

    def read(level):
        manifest = json.loads((made.path / MANIFEST).read_text())
        manifest["parameters"]["huge"] = {"shape": [numel], "dtype": "F32", "trainable": False}
        (made.path / MANIFEST).write_bytes(seal(manifest))
        with StoredCheckpoint(made.path, level) as found:
            found.read("parameters", "huge", 0, numel)

    with (
        made.forged(0, lambda c: grow(c, len(header))),
        pytest.raises(CorruptCheckpoint, match=r"has 4,096 bytes, must have 1,099,511,6"),
    ):
        read("none")
    try:
        os.truncate(flat, len(header) + 4 * numel)
    except OSError:
        flat.unlink()
        pytest.skip("this file system has no file of a terabyte")
    for level in ("none", "full"):
        with (
            made.forged(0, lambda c: grow(c, len(header))),
            pytest.raises(CheckpointError, match="do not fit into memory"),
        ):
            read(level)
    os.truncate(flat, 2**40 + 4 * numel)
    with made.forged(0, lambda c: grow(c, 2**40)), pytest.raises(CorruptCheckpoint, match="is no header of the format"):
        read("full")
    flat.unlink()


TEXTS = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "an empty object": b"{}",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and closed": b'{"digest": "", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"digest": NaN}',
    "infinity": b'{"digest": "x", "world": Infinity}',
    "a float beyond": b'{"digest": "x", "world": 1e999}',
    "a number of 5,000 digits": b'{"digest": "x", "world": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"digest": "\xff\xfe"}',
    "UTF-16": '{"digest": "x"}'.encode("utf-16"),
    "a mark of the byte order": b"\xef\xbb\xbf{}",
    "half of a pair": b'{"digest": "\\ud800", "\\udfff": 1}',
    "binary": bytes(range(256)),
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_manifest_or_index(made, text):
    with made.changed(MANIFEST, text):
        assert refused(made)
    manifest = json.loads((made.good / MANIFEST).read_text())
    manifest["indexes"][0] = digest_of(text)
    with made.changed(f"rank-0-of-{WORLD}/{INDEX}", text), made.changed(MANIFEST, seal(manifest)):
        assert refused(made)


def deep_state(content):
    inner: list = []
    content["state"] = {"run": inner}
    for _ in range(300):
        inner.append([])
        inner = inner[0]


INDEXES = {
    "a name with a way out": lambda c: c["files"][0].update(file="../../outside.safetensors"),
    "an absolute name": lambda c: c["files"][0].update(file="/etc/passwd"),
    "a folder above": lambda c: c["files"][0].update(file=".."),
    "a name that no file has": lambda c: c["files"][0].update(file="\ud800"),
    "a name that cannot be printed": lambda c: c["files"][0].update(file="\ud800", digests=[]),
    "a kind that cannot be printed": lambda c: c["files"][0].update(kind="\ud800"),
    "one file twice": lambda c: c["files"].append(c["files"][0]),
    "one file's values twice": lambda c: c["files"].append({**c["files"][0], "file": "other.safetensors"}),
    "an exabyte": lambda c: c["files"][0].update(numel=2**58, digests=[[0, 2**60, "0" * 16]]),
    "as many elements as there are numbers": lambda c: c["files"][0].update(
        numel=2**53, digests=[[0, 2**53, "0" * 16]]
    ),
    "a header of terabytes": lambda c: c["files"][0].update(begin=2**40),
    "no header": lambda c: c["files"][0].update(begin=0, header=digest_of(b"")),
    "runs of floats": lambda c: c["files"][0].update(
        digests=[[float(a), b, d] for a, b, d in c["files"][0]["digests"]]
    ),
    "runs that begin at False": lambda c: c["files"][0]["digests"][0].__setitem__(0, False),
    "runs that overlap": lambda c: c["files"][0]["digests"].insert(1, c["files"][0]["digests"][0]),
    "no runs": lambda c: c["files"][0].update(digests=[]),
    "intervals that overlap": lambda c: c["layouts"][0].append(c["layouts"][0][0]),
    "an interval beyond the parameter": lambda c: c["layouts"][0][0].__setitem__(2, 10**6),
    "an interval backwards": lambda c: c["layouts"][0].__setitem__(0, [c["layouts"][0][0][0], 5, 2, 0]),
    "an interval of nothing known": lambda c: c["layouts"][0][0].__setitem__(0, "unknown"),
    "less of a parameter": lambda c: c["layouts"][0].pop(),
    "no layouts": lambda c: c.update(layouts=[]),
    "another rank's": lambda c: c.update(rank=1),
    "another world's": lambda c: c.update(world=3),
    "another save's": lambda c: c.update(save_id="save-2"),
    "another format": lambda c: c.update(format="tritonspeed.checkpoint.99"),
    "a state of unknown kinds": lambda c: c.update(state={"$made_up": [1]}),
    "a state that names no tensor": lambda c: c.update(state={"run": {"$tensor": "not there"}}),
    "a state that is a list": lambda c: c.update(state=[1]),
    "a state of great depth": deep_state,
    "a run of text": lambda c: c.update(state={"run": "now"}),
    "steps that are text": lambda c: c.update(state={"run": {"global_steps": "7"}}),
    "steps below zero": lambda c: c.update(state={"run": {"global_steps": -7}}),
    "steps beyond counting": lambda c: c.update(state={"run": {"global_steps": 10**400}}),
    "steps that are true": lambda c: c.update(state={"run": {"global_steps": True}}),
    "groups of numbers": lambda c: c.update(state={"run": {"param_groups": [1]}}),
    "no tensors of a state that has some": lambda c: c.update(state_digest=""),
    "numbers of no parameter": lambda c: c.update(scalars=[[{"step": 1}, ["unknown"]]]),
    "a step that no float holds": lambda c: c.update(scalars=[[{"step": 10**400}, ["norm"]]]),
}


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES)
def test_an_index_that_nobody_wrote(made, change):
    with made.forged(0, lambda content: change(content) and None):
        assert refused(made)


def with_header(content: bytes, header: bytes, length: int | None = None) -> bytes:
    """A safetensors file's tensors behind another header."""
    begin = 8 + int.from_bytes(content[:8], "little")
    return struct.pack("<Q", len(header) if length is None else length) + header + content[begin:]


def entry(shape, lo, hi, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [lo, hi]}


BOMBS = {
    "longer than any file": (b"{}", 2**63),
    "all ones": (b"{}", 2**64 - 1),
    "just longer": (b"{}", 10**5),
    "no length": (b"", 0),
    "no JSON": (b"\xff\xfe", None),
    "deep": (b'{"a":' * 100_000, None),
    "a list": (b"[]", None),
    "null entries": (b'{"a": null}', None),
    "an overlap": (json.dumps({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}).encode(), None),
    "a thousand of one place": (json.dumps({str(i): entry([4], 0, 16) for i in range(1000)}).encode(), None),
    "beyond the end": (json.dumps({"a": entry([2**40], 0, 2**42)}).encode(), None),
    "negative": (json.dumps({"a": entry([-4, -1], 0, 16)}).encode(), None),
    "backwards": (json.dumps({"a": entry([4], 16, 0)}).encode(), None),
    "floats": (json.dumps({"a": entry([4.0], 0, 16)}).encode(), None),
    "text": (json.dumps({"a": entry(["4"], 0, 16)}).encode(), None),
    "a shape of terabytes": (json.dumps({"a": entry([2**62, 2**62, 0], 0, 0)}).encode(), None),
    "a shape without end": (json.dumps({"a": entry([2**53] * 10_000, 0, 16)}).encode(), None),
    "another dtype": (json.dumps({"a": entry([4], 0, 16, "C64")}).encode(), None),
    "a dtype that is a list": (json.dumps({"a": entry([4], 0, 16, ["F32"])}).encode(), None),
    "NaN sizes": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [NaN, NaN]}}', None),
    "holes": (json.dumps({"a": entry([1], 8, 12)}).encode(), None),
}


@pytest.mark.parametrize(("header", "length"), BOMBS.values(), ids=BOMBS)
def test_headers_that_ask_for_the_impossible(made, header, length):
    state = f"rank-0-of-{WORLD}/{STATE}"
    content = with_header((made.good / state).read_bytes(), header, length)
    with made.changed(state, content), made.forged(0, lambda c: c.update(state_digest=digest_of(content))):
        assert refused(made)
        assert handled(made, "none") == "refused"

    index = json.loads((made.good / f"rank-0-of-{WORLD}/{INDEX}").read_text())
    record = index["files"][0]
    flat = f"rank-0-of-{WORLD}/{record['file']}"
    begin, content = record["begin"], (made.good / flat).read_bytes()
    room = -(-(8 + len(header)) // 4096) * 4096
    padded = header.ljust(room - 8)
    forged = struct.pack("<Q", len(padded) if length is None else length) + padded + content[begin:]
    change = {"begin": room, "header": digest_of(forged[:room])}
    with made.changed(flat, forged), made.forged(0, lambda c: c["files"][0].update(change)):
        assert refused(made)


def test_a_header_of_another_length(made):
    """All else is right, the digest of the header too."""
    index = json.loads((made.good / f"rank-0-of-{WORLD}/{INDEX}").read_text())
    record = index["files"][0]
    flat = f"rank-0-of-{WORLD}/{record['file']}"
    content = (made.good / flat).read_bytes()
    for more in (-8, -1, 1, 2**40):
        forged = struct.pack("<Q", record["begin"] - 8 + more) + content[8:]
        header = digest_of(forged[: record["begin"]])
        with made.changed(flat, forged), made.forged(0, lambda c, h=header: c["files"][0].update(header=h)):
            assert refused(made), more


def test_tensors_of_a_state_that_cannot_be(made):
    """Several of one place would take many times the file in memory."""
    state = f"rank-0-of-{WORLD}/{STATE}"
    content = (made.good / state).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    end = len(content) - 8 - length
    for more in (
        {"again": header[name]},
        {f"again{i}": header[name] for i in range(1000)},
        {"of 65 dimensions": entry([0] + [1] * 64, end, end)},
        {"of no whole number": entry([0.0], end, end)},
    ):
        forged = with_header(content, json.dumps({**header, **more}).encode())
        with made.changed(state, forged), made.forged(0, lambda c, f=forged: c.update(state_digest=digest_of(f))):
            assert refused(made)


def test_damage_of_a_state_is_found_without_verifying_all(made):
    state = f"rank-0-of-{WORLD}/{STATE}"
    content = bytearray((made.good / state).read_bytes())
    content[-1] ^= 1
    with made.changed(state, content):
        for level in ("full", "sampled"):
            with StoredCheckpoint(made.path, level) as found, pytest.raises(CorruptCheckpoint, match=STATE):
                found.rank_state(0)
        with StoredCheckpoint(made.path, "none") as found:
            assert found.rank_state(0)["run"] == found.rank_state(1)["run"]


def test_nothing_was_written(made):
    assert made.files() == sorted(p.relative_to(made.path) for p in made.path.rglob("*") if p.is_file())
    for file in made.files():
        assert (made.path / file).read_bytes() == (made.good / file).read_bytes()
    assert sorted(p.name for p in made.path.parent.iterdir()) == ["damaged", "good"]
