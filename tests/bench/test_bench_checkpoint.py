"""The bench of checkpoints in small: every system loads what it saved, and the page says where a peer is ahead."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from bench.checkpoint import bench_checkpoint as bench
from bench.checkpoint import bench_kills
from bench.checkpoint.bench_checkpoint import Row
from bench.checkpoint.rank import resident_bytes
from bench.checkpoint.state import BYTES_PER_PARAMETER, Size, local_state

SMALL = Size(1, 64)
SLOW = 60.0  # seconds that no turn takes


def test_the_state_is_14_bytes_a_parameter_and_cut_among_ranks():
    assert BYTES_PER_PARAMETER == 14
    assert SMALL.num_parameters == 12 * 64**2 + (3 + 1 + 4 + 1 + 2) * 64
    parts = [local_state(SMALL, rank, 2) for rank in range(2)]
    held = sum(t.nbytes for part in parts for tensors in part.values() for t in tensors.values())
    assert held == SMALL.state_bytes
    with pytest.raises(ValueError, match="3 ranks do not share evenly"):
        local_state(SMALL, 0, 3)


@pytest.mark.slow
def test_every_system_loads_what_it_saved_and_is_in_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "wait_until_idle", lambda: None)
    names = ["torch", "ours", "ours-async", "ours-disk"]
    arguments = ["--path", str(tmp_path), "--out", str(tmp_path / "out"), "--groups", *names]
    arguments += ["--worlds", "2", "--rounds", "1", "--blocks", "1", "--width", "64"]
    monkeypatch.setattr("sys.argv", ["bench_checkpoint", *arguments])
    bench.main()  # a rank compares the state with what was saved, and fails where it differs
    (path,) = (tmp_path / "out").glob("*_checkpoint.json")
    rows = {row["system"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 8 and sum(name.startswith("ours") for name in rows) == 3
    for row in rows.values():
        assert 0 < row["stall_s"] <= row["complete_s"] <= row["durable_s"] < SLOW
        assert row["disk_bytes"] > 12 * SMALL.num_parameters, "masters and moments"
        assert row["load_s"] > 0 and row["synced"]
    assert not list(tmp_path.glob("bench-checkpoint-*"))


@pytest.mark.slow
def test_killed_while_saving_over_the_last_one(tmp_path):
    (row,) = bench_kills.rows_of("ours-async", sys.executable, tmp_path, 2, 100)
    assert row["system"] == "ours async" and row["good"] == row["kills"] == 2, row


def test_resident_memory_is_what_the_kernel_says():
    assert 0 < resident_bytes("VmRSS") <= resident_bytes("VmHWM")
    with pytest.raises(RuntimeError, match="VmNothing"):
        resident_bytes("VmNothing")


def turn_of(durable_s: float, **more: float) -> dict[str, float | str]:
    given = {"stall_s": durable_s, "complete_s": durable_s, "durable_s": durable_s, "load_s": 1.0}
    return {**given, "memory_bytes": 0, "load_memory_bytes": 0, "disk_bytes": 2**30, "synced": "no", **more}


def test_the_share_of_raw_is_taken_round_by_round():
    taken = {
        "raw: bare": [turn_of(1.0), turn_of(4.0), turn_of(1.0)],
        "ours": [turn_of(2.0), turn_of(4.0), turn_of(2.0)],
    }
    raw, ours = bench.rows_of(1, taken)
    assert (raw.percent_of_raw, ours.percent_of_raw) == (100.0, 50.0)
    assert ours.mib_per_s == 512.0


def row(system: str, **more: float) -> Row:
    given = {"stall_s": 1.0, "complete_s": 1.0, "durable_s": 1.0, "mib_per_s": 1.0, "percent_of_raw": 90.0}
    given |= {"disk_bytes": 1, "memory_bytes": 5, "load_s": 1.0, "load_memory_bytes": 1}
    return Row(world=1, system=system, synced="no", **{**given, **more})


def test_the_page_begins_with_where_a_peer_is_ahead():
    raw = row("raw: bare", durable_s=0.1, stall_s=0.1)
    ours = row("ours", percent_of_raw=80.0)
    peers = [row("fast", durable_s=0.5), row("peer async", stall_s=0.1)]
    assert bench.misses([raw, ours, *peers]) == [
        "1 ranks, ours: durable_s 1.00, fast 0.50",
        "1 ranks, ours: 80 % of raw, goal 85",
    ]
    in_background = replace(ours, system="ours async", percent_of_raw=90.0)
    assert "1 ranks, ours async: stall_s 1.00, peer async 0.10" in bench.misses([raw, in_background, *peers])
    record = {"misses": ["one"], "parameters": 1, "state_bytes": 14, "machine": {}}
    page = bench.page_of(record, [ours], {"ours": "0 of 24"})
    assert page.startswith("Where a peer is ahead of ours, or a goal is missed: \n- one\n") and "| 0 of 24 |" in page


def test_kills_come_from_the_newest_result(tmp_path):
    assert bench.kills_in(tmp_path) == {}
    found = {"system": "ours", "kills": 24, "good": 21, "unloadable": 1, "torn": 2, "older": 0, "said": ""}
    for day in ("01", "02"):
        (tmp_path / f"2026-01-{day}_x_checkpoint-kills.json").write_text(json.dumps({"rows": [found]}))
        found["torn"] = 0
    assert bench.kills_in(tmp_path) == {"ours": "1 of 24"}
