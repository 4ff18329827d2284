"""The bench of offload beside a GPU runs in small on a CPU, so that it is whole when a GPU is at hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.offload import bench_gpu_offload as bench
from bench.offload.gpu_trial import Trial, _covered, _merged
from bench.offload.llama import SIZES, Llama

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_runs_in_small(tmp_path):
    results = bench.main(["--toy", "--device", "cpu", "--out", str(tmp_path), "--time-limit", "200"])
    kept = json.loads((tmp_path / "gpu_offload.json").read_text())
    assert set(kept) == {"machine", *bench.WHAT}
    rate = results["rate"]
    assert "failed" not in rate, rate
    for way in ("overlap", "at once"):
        assert len(rate[way]["steps_s"]) == 2 and rate[way]["tflop_per_s"] > 0
        assert all(norm > 0 for norm in rate[way]["norms"])
        assert rate[way]["links"]["host_memory"]["num_bytes"] > 0
    assert rate["estimate"]["host_bytes"] > 12 * rate["num_params"]
    top = results["largest"]["largest"]
    assert top is not None, results["largest"]["failed"]
    assert top["trial"]["size"]["num_layers"] == 3  # the deepest that is tried
    assert (tmp_path / "offload_trace.json.gz").exists() and (tmp_path / "offload_timeline.png").exists()
    said = bench.lines(results)
    assert any("TFLOP/s" in line for line in said) and any(line.startswith("largest") for line in said)


def test_what_fails_says_why():
    found = bench.run_trial(Trial("toy", device="cpu", length=32, rows=2, optimizer="nowhere"), 60)
    assert "nowhere" in found["failed"]
    late = bench.run_trial(Trial("toy", device="cpu", length=32, rows=2), 0.01)
    assert late["failed"].startswith("not done within")


def test_what_does_not_fit_is_not_tried():
    trial = Trial("toy", device="cpu", length=32, rows=2)
    forecast = trial.forecast(2, bench.machine_of("H100", num_devices=1))
    plenty = {"device": 0, "host": 2**40, "disk": 0}
    assert trial.lacks(2, forecast, plenty) == []
    assert trial.lacks(2, forecast, plenty | {"host": 2**20}) == ["host"]
    beside = replace(trial, device="cuda")
    assert beside.lacks(2, beside.forecast(2, bench.machine_of("H100", num_devices=1)), plenty) == ["device"]


def test_a_size_has_the_parameters_it_says():
    with torch.device("meta"):
        for size in SIZES.values():
            assert sum(p.numel() for p in Llama(size).parameters()) == size.num_params
    assert SIZES["7b"].num_params == pytest.approx(6.74e9, rel=1e-3)
    assert SIZES["8b"].num_params == pytest.approx(8.03e9, rel=1e-3)


def test_lanes():
    spans = _merged([(100.0, 50.0), (0.0, 10.0), (160.0, 10.0)])
    assert spans == [(0.0, 10.0), (100.0, 170.0)]
    assert _covered([(0.0, 100.0)], [(50.0, 70.0), (90.0, 200.0)]) == pytest.approx(0.3)
    assert _covered([], spans) is None


def test_the_round_stays_under_nine_minutes():
    text = (ROOT / "bench" / "gpu_offload.sh").read_text()
    limits = [int(n) for n in re.findall(r"^(?:part|bench) \w+ (\d+)", text, re.MULTILINE)]
    assert len(limits) == 4 and sum(limits) < 9 * 60
