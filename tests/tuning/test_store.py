"""The store of tuned configurations: who finds what, and that nothing is lost by other writers, kills and bad disks."""

import json
import multiprocessing as mp
import os
import random
import subprocess
import sys
import textwrap
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tritonspeed.kernels import store as stores
from tritonspeed.kernels.cards import CARDS, GIB, MIB
from tritonspeed.kernels.store import Entry, FolderStore, Layers, journal_of, parse, read_journal

H100 = CARDS["sm_90"]
H200 = replace(H100, memory_bytes=141 * GIB)
H100_PCIE = replace(H100, num_sms=114)
A100 = CARDS["sm_80"]
NAME, SOURCE = "layer_norm_forward", "0123456789abcdef"
NUM_WRITERS, NUM_MERGES = 4, 60
NUM_KILLS = 32


def entry(block: int, **measured: float) -> Entry:
    return Entry({"block": block, "num_warps": 4}, measured=measured)


def path_of(folder: Path) -> Path:
    return FolderStore(folder).path(H100.key, NAME)


def test_what_is_put_is_found_by_another_process(tmp_path: Path) -> None:
    FolderStore(tmp_path).put(H100, NAME, SOURCE, "n=4096,dtype=bf16", entry(1024, median_us=3.5))
    fresh = FolderStore(tmp_path)
    assert fresh.lookup(H100, NAME, SOURCE, "n=4096,dtype=bf16") == {"block": 1024, "num_warps": 4}
    assert fresh.lookup(H100, NAME, SOURCE, "n=8192,dtype=bf16") is None
    assert fresh.lookup(H100, "softmax_forward", SOURCE, "n=4096,dtype=bf16") is None
    assert path_of(tmp_path) == tmp_path / "cuda/sm_90/132sm-50mib-80gib/layer_norm_forward.json"
    assert fresh.summary() == {H100.key: {NAME: 1}}
    assert fresh.entries(H100.key, NAME)["n=4096,dtype=bf16"][SOURCE].measured == {"median_us": 3.5}


def test_another_source_is_another_kernel(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(H100, NAME, SOURCE, "n=1", entry(1024))
    assert store.lookup(H100, NAME, "fedcba9876543210", "n=1") is None
    store.put(H100, NAME, "fedcba9876543210", "n=1", entry(2048))
    for source, block in ((SOURCE, 1024), ("fedcba9876543210", 2048)):
        found = FolderStore(tmp_path).lookup(H100, NAME, source, "n=1")
        assert found is not None and found["block"] == block


def test_the_very_card_then_its_nearest_sister_then_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(H100_PCIE, NAME, SOURCE, "n=1", entry(1))
    assert store.lookup(H100, NAME, SOURCE, "n=1") == {"block": 1, "num_warps": 4}
    store.put(H200, NAME, SOURCE, "n=1", entry(2))  # as many SMs as an H100
    assert store.lookup(H100, NAME, SOURCE, "n=1") == {"block": 2, "num_warps": 4}
    store.put(H100, NAME, SOURCE, "n=1", entry(3))
    assert store.lookup(H100, NAME, SOURCE, "n=1") == {"block": 3, "num_warps": 4}
    assert store.lookup(A100, NAME, SOURCE, "n=1") is None


def test_that_nothing_beat_the_heuristic_holds_for_one_card(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(H200, NAME, SOURCE, "n=1", replace(entry(1), is_heuristic=True))
    assert store.lookup(H200, NAME, SOURCE, "n=1") is not None
    assert store.lookup(H100, NAME, SOURCE, "n=1") is None


def test_the_very_card_wins_over_a_sister_in_an_earlier_layer(tmp_path: Path) -> None:
    mine, shipped = FolderStore(tmp_path / "mine"), FolderStore(tmp_path / "shipped")
    mine.put(H200, NAME, SOURCE, "n=1", entry(1))
    layers = Layers([mine, shipped])
    assert layers.lookup(H100, NAME, SOURCE, "n=1") == {"block": 1, "num_warps": 4}
    shipped.put(H100, NAME, SOURCE, "n=1", entry(2))
    assert layers.lookup(H100, NAME, SOURCE, "n=1") == {"block": 2, "num_warps": 4}
    assert layers.lookup(H200, NAME, SOURCE, "n=1") == {"block": 1, "num_warps": 4}


def processes() -> mp.context.ForkServerContext:
    """Processes that start in milliseconds: torch is imported once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tritonspeed.kernels.store"])
    return context


def write_many(folder: str, writer: int, seen: "mp.Queue[int]") -> None:
    store = FolderStore(folder)
    for i in range(NUM_MERGES):
        store.put(H100, NAME, SOURCE, f"writer={writer},i={i}", entry(i))
        store.record(H100, NAME, [{"features": "n=1", "source": SOURCE, "writer": writer, "i": i}])
        found = FolderStore(folder).entries(H100.key, NAME)  # a reader never meets half a file
        seen.put(sum(map(len, found.values())))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    context = processes()
    seen = context.Queue()
    writers = [context.Process(target=write_many, args=(str(tmp_path), w, seen)) for w in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    counts = [seen.get(timeout=60) for _ in range(NUM_WRITERS * NUM_MERGES)]
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    found = FolderStore(tmp_path).entries(H100.key, NAME)
    wanted = {f"writer={w},i={i}": i for w in range(NUM_WRITERS) for i in range(NUM_MERGES)}
    assert {features: by_source[SOURCE].launch["block"] for features, by_source in found.items()} == wanted
    assert max(counts) == len(wanted)
    timed = FolderStore(tmp_path).timed(H100, NAME, SOURCE, "n=1")
    assert {(line["writer"], line["i"]) for line in timed} == {
        (w, i) for w in range(NUM_WRITERS) for i in range(NUM_MERGES)
    }
    assert not list(tmp_path.rglob("*.corrupt")) and not list(tmp_path.rglob("*.tmp"))


def write_until_killed(folder: str, start: int, said: Connection) -> None:
    store = FolderStore(folder)
    for i in range(start, start + 100_000):
        store.record(H100, NAME, [{"features": "n=1", "source": "s", "i": i}])
        said.send(("timed", i))
        store.put(H100, NAME, "s", f"i={i}", Entry({"block": i}))
        said.send(("put", i))


def test_a_kill_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(0)
    context = processes()
    acknowledged: dict[str, set[int]] = {"timed": set(), "put": set()}
    for kill in range(NUM_KILLS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(str(tmp_path), 1000 * kill, theirs))
        process.start()
        theirs.close()
        said = [ours.recv() for _ in range(rng.randrange(1, 8))]
        time.sleep(rng.uniform(0.0, 0.01))  # several writes long
        process.kill()
        process.join()
        with suppress(EOFError, OSError):  # the last message may be cut short
            while True:
                said.append(ours.recv())
        for kind, number in said:
            acknowledged[kind].add(number)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the file is valid, whenever the kill came
            found = FolderStore(tmp_path).entries(H100.key, NAME)
        assert acknowledged["put"] <= {by_source["s"].launch["block"] for by_source in found.values()}
        assert acknowledged["timed"] <= {
            line["i"] for line in read_journal(journal_of(path_of(tmp_path))) if "i" in line
        }
    assert len(acknowledged["put"]) > NUM_KILLS, "the kills came before anything was written"
    FolderStore(tmp_path).put(H100, NAME, "s", "after", entry(7))
    assert not list(tmp_path.rglob("*.tmp")), "what a kill left behind is used up by the next writer"


def rewritten(folder: Path, **changes: object) -> bytes:
    return json.dumps(json.loads(path_of(folder).read_bytes()) | changes).encode()


CORRUPTIONS = {
    "truncated": lambda folder: path_of(folder).read_bytes()[:-20],
    "empty": lambda folder: b"",
    "garbage": lambda folder: random.Random(1).randbytes(500),
    "another file": lambda folder: b'["a", "list"]',
    "no format": lambda folder: b'{"entries": {}}',
    "entries of another type": lambda folder: rewritten(folder, entries=[1]),
    "a source of another type": lambda folder: rewritten(folder, entries={"n=1": 3}),
    "no launch": lambda folder: rewritten(folder, entries={"n=1": {SOURCE: {"measured": {}}}}),
    "a launch of words": lambda folder: rewritten(folder, entries={"n=1": {SOURCE: {"launch": {"block": "large"}}}}),
    "a launch of fractions": lambda folder: rewritten(folder, entries={"n=1": {SOURCE: {"launch": {"block": 1.5}}}}),
    "measured of another type": lambda folder: rewritten(
        folder, entries={"n=1": {SOURCE: {"launch": {"block": 1}, "measured": 3}}}
    ),
}


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_a_corrupt_file_is_reported_and_rebuilt(tmp_path: Path, how: str) -> None:
    store = FolderStore(tmp_path)
    store.put(H100, NAME, SOURCE, "n=1", entry(1))
    store.put(H100, NAME, SOURCE, "n=2", entry(2))
    bad = CORRUPTIONS[how](tmp_path)
    path_of(tmp_path).write_bytes(bad)
    fresh = FolderStore(tmp_path)
    with pytest.warns(UserWarning, match=r"layer_norm_forward.json is corrupt \(.+\): moved to .+, 2 entries rebuilt"):
        assert fresh.lookup(H100, NAME, SOURCE, "n=1") == {"block": 1, "num_warps": 4}
    assert path_of(tmp_path).with_suffix(".corrupt").read_bytes() == bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderStore(tmp_path).lookup(H100, NAME, SOURCE, "n=2") == {"block": 2, "num_warps": 4}


def test_a_writer_meets_a_corrupt_file(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put(H100, NAME, SOURCE, "n=1", entry(1))
    path_of(tmp_path).write_bytes(b"{")
    with pytest.warns(UserWarning, match="1 entries rebuilt"):
        store.put(H100, NAME, SOURCE, "n=2", entry(2))
    assert parse(path_of(tmp_path).read_bytes()).keys() == {"n=1", "n=2"}


def test_a_corrupt_journal_loses_its_bad_lines_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for n in range(3):
        store.put(H100, NAME, SOURCE, f"n={n}", entry(n))
    journal = journal_of(path_of(tmp_path))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1].replace(b'"block": 1', b'"block": 8') + lines[2] + lines[2][:30])
    store.record(H100, NAME, [{"features": "n=9", "source": SOURCE, "i": 9}])  # after a line that was cut short
    path_of(tmp_path).write_bytes(b"")
    with pytest.warns(UserWarning, match="2 entries rebuilt"):
        assert FolderStore(tmp_path).entries(H100.key, NAME).keys() == {"n=0", "n=2"}
    assert [line["i"] for line in store.timed(H100, NAME, SOURCE, "n=9")] == [9]


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = path_of(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 2, "new": true}')
    with pytest.warns(UserWarning, match="format 2 is of a later version, this one reads 1; it is not used"):
        assert FolderStore(tmp_path).lookup(H100, NAME, SOURCE, "n=1") is None
    with pytest.raises(ValueError, match="update tritonspeed"):
        FolderStore(tmp_path).put(H100, NAME, SOURCE, "n=1", entry(1))
    assert path.read_text() == '{"format": 2, "new": true}'


def read_only(folder: Path) -> Path:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def as_nobody(folder: Path, program: str) -> str:
    """Run in a process that permissions hold for: root may write anywhere."""
    prelude = "import os, sys\nimport tritonspeed.kernels.store, tritonspeed.kernels.cards, torch\n"
    if os.geteuid() == 0:
        prelude += "os.setgid(65534); os.setuid(65534)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(program), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_read_only_folder_is_read_and_its_writers_are_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        folder = Path(name) / "tuned"
        FolderStore(folder).put(H100, NAME, SOURCE, "n=1", entry(1))
        FolderStore(folder).put(H100, "broken", SOURCE, "n=1", entry(1))
        FolderStore(folder).path(H100.key, "broken").write_bytes(b"{")
        read_only(folder)
        said = as_nobody(
            folder,
            f"""
            from tritonspeed.kernels.cards import CARDS
            from tritonspeed.kernels.store import Entry, FolderStore
            store = FolderStore(sys.argv[1])
            assert store.lookup(CARDS["sm_90"], {NAME!r}, {SOURCE!r}, "n=1")["block"] == 1
            assert store.lookup(CARDS["sm_90"], "broken", {SOURCE!r}, "n=1")["block"] == 1  # its journal knows
            for write in (
                lambda: store.put(CARDS["sm_90"], {NAME!r}, {SOURCE!r}, "n=2", Entry({{"block": 2}})),
                lambda: store.record(CARDS["sm_90"], {NAME!r}, [{{}}]),
                lambda: store.check_writable(CARDS["sm_80"], {NAME!r}),
            ):
                try:
                    write()
                except ValueError as error:
                    print(error)
                else:
                    raise SystemExit("written")
            """,
        )
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
    assert said.count("cannot be written to") == 3 and "--out DIR" in said
    assert "broken.json is corrupt" in said and "the 1 entries of its journal are used" in said


def test_no_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "nowhere")
    assert store.lookup(H100, NAME, SOURCE, "n=1") is None
    assert store.summary() == {} and store.timed(H100, NAME, SOURCE, "n=1") == []
    assert not (tmp_path / "nowhere").exists()


def test_accepting_ends_the_search_that_was_timed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.record(H100, NAME, [{"features": "n=1", "source": SOURCE, "i": 1}])
    store.put(H100, NAME, SOURCE, "n=1", entry(1))
    assert store.timed(H100, NAME, SOURCE, "n=1") == []
    store.record(H100, NAME, [{"features": "n=1", "source": SOURCE, "i": 2}])
    assert [line["i"] for line in store.timed(H100, NAME, SOURCE, "n=1")] == [2]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    store.put(H100, NAME, SOURCE, "n=1", entry(1))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        store.put(H100, NAME, SOURCE, "n=2", entry(2))
    monkeypatch.undo()
    assert FolderStore(tmp_path).lookup(H100, NAME, SOURCE, "n=1") == {"block": 1, "num_warps": 4}


def test_a_key_tells_cards_of_one_architecture_apart() -> None:
    assert H100.key != H200.key != H100_PCIE.key
    assert replace(H100, l2_bytes=60 * MIB).key != H100.key


def test_an_entry_survives_its_file(tmp_path: Path) -> None:
    whole = Entry({"block": 1}, is_heuristic=True, measured={"median_us": 1.5, "date": "2026-01-01"})
    store = FolderStore(tmp_path)
    store.put(H100, NAME, SOURCE, "n=1", whole)
    assert FolderStore(tmp_path).entries(H100.key, NAME)["n=1"][SOURCE] == whole
    assert read_journal(journal_of(path_of(tmp_path)))[0]["entry"] == asdict(whole)
