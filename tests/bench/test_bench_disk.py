"""The disk's bench: every variant moves the bytes it is charged for, and the page says who was faster."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.offload import bench_disk
from bench.offload.bench_disk import Files, Row, measured, report, variants

NUM_BYTES = 3 * 2**20


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path, NUM_BYTES)
    yield files
    files.remove()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]


def test_every_way_to_write_leaves_the_buffer_in_a_file(files):
    for name, turn in variants(files, "write", [(1, 1), (1, 3)], None).items():
        files.buffer.normal_()
        assert turn() > 0
        path = files.other if files.other.exists() else files.path
        assert torch.equal(load_file(path)["w"], files.buffer), name
        files.other.unlink(missing_ok=True)


def test_every_way_to_read_fills_the_buffer(files):
    variants(files, "write", [(1, 1)], None)["ours 1 MiB × 1"]()
    wanted = files.buffer.clone()
    for name, turn in variants(files, "read", [(1, 1), (1, 3)], None).items():
        files.buffer.zero_()
        assert turn() > 0
        assert torch.equal(files.buffer, wanted), name


def test_rounds_and_the_page(files, tmp_path):
    rows = [row for way in ("read", "write") for row in measured(files, way, variants(files, way, [(8, 4)], None), 2)]
    assert all(row.p20_mib_per_s <= row.median_mib_per_s <= row.p80_mib_per_s <= row.best_mib_per_s for row in rows)
    path = report(rows, tmp_path / "out", NUM_BYTES, 2, "none")
    assert len(json.loads(path.read_text())["rows"]) == len(rows)


def test_the_page_names_who_is_ahead_and_the_share_of_fio(tmp_path):
    rates = {"ours 8 MiB × 4": 800.0, "ours 1 MiB × 1": 1200.0, "fio b": 1000.0, "fio c": 500.0, "mmap": 900.0}
    rows = [
        Row(way, variant, variant.startswith("ours"), rate, rate, rate, rate, 0.0)
        for way in ("read", "write")
        for variant, rate in rates.items()
    ]
    page = report(rows, tmp_path, NUM_BYTES, 2, "3.33").with_suffix(".md").read_text()
    assert f"- read: ours 8 MiB × 4, the default, is 0.80 × fio b (goal {bench_disk.GOAL})" in page
    assert "- write: faster than the default: fio b, mmap" in page
