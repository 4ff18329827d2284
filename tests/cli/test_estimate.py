"""`tritonspeed estimate`: the tables, JSON, the picture, its exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from tritonspeed.cli.estimate import add_arguments, parse_size, run

CONFIG = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
ON_DISK = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}


@pytest.fixture
def estimate(tmp_path, capsys):
    def call(*options, config=CONFIG):
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(config))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        status = run(parser.parse_args(["--config", str(path), *options]))
        return status, capsys.readouterr().out

    return call


def test_the_tables(estimate):
    zero = CONFIG["zero_optimization"] | ON_DISK
    status, out = estimate(
        "--model", "params=7e9", "--gpus", "8", "--nodes", "4", config=CONFIG | {"zero_optimization": zero}
    )
    assert status == 0
    assert "7 B parameters · bf16 · ZeRO stage 3 on 4 nodes × 8 H100 · 8,192 tokens" in out
    assert "assumed: 33 blocks" in out
    for name in (
        "parameters",
        "gradients",
        "activations",
        "files, both slots",
        "disk, write",
        "network, between nodes",
    ):
        assert name in out, name
    assert out.count(" binds") == 3  # in its row, in the sentence below, in the ranking's head
    assert "offload is hidden from" in out
    assert '"zero_optimization": {' in out


def test_json_has_what_the_tables_have(estimate):
    status, out = estimate("--model", "llama8b", "--json", "--gpus", "4", "--tokens", "16384", "--top", "3")
    report = json.loads(out)
    assert status == 0
    assert report["model"]["parameters"] == 8_030_261_248
    assert report["ranks"] == 4
    assert report["links"]["compute"]["bytes"] == pytest.approx(6 * 8_030_261_248 * 16384)
    assert set(report["bytes_per_rank"]["device_at_peak"]) >= {"parameters", "gradients", "optimizer"}
    assert len(report["settings"]) == 3
    assert report["settings"][0]["fits"]
    assert report["step"]["binding"] in report["links"]


def test_what_fits_nowhere_fails(estimate):
    status, out = estimate("--model", "params=30b", "--gpus", "1", "--gpu", "4090", "--host-memory", "16")
    assert status == 1
    assert "0 of 6 fit" in out
    assert "nothing fits" in out


def test_sizes_are_taken(estimate):
    options = ("--model", "params=7e9", "--gpus", "1", "--json")
    small = json.loads(estimate(*options, "--device-memory", "24", "--host-memory", "40GB", "--disk", "1TiB")[1])
    assert small["machine"]["device_bytes"] == 24 * 2**30
    assert small["machine"]["host_bytes"] == 40 * 10**9
    assert small["machine"]["disk_bytes"] == 2**40
    assert small["shortages"]
    assert small["settings"][0]["offload_optimizer"] == "nvme"
    assert not json.loads(estimate(*options)[1])["settings"][0]["shortages"]


@pytest.mark.parametrize(("text", "want"), [
    ("80", 80 * 2**30), ("80GiB", 80 * 2**30), ("1.5 TB", 1_500_000_000_000), ("2t", 2 * 2**40), ("512 MiB", 2**29),
])  # fmt: skip
def test_how_a_size_may_be_written(text, want):
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "much", "GiB", "-3", "0", "5 parsecs", "1e400"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_calibrated_on_this_machine(estimate, tmp_path, monkeypatch):
    from tritonspeed.estimation import calibrate

    monkeypatch.setattr("tritonspeed.estimation.calibrate", lambda path: calibrate(path, seconds=0.5))
    status, out = estimate("--model", "params=10m", "--calibrate", str(tmp_path))
    assert status == 0
    assert "Measured: " in out
    assert "fdatasync" in out
    assert not list(tmp_path.glob("*.calibrate"))


def test_mistakes_are_said(estimate):
    with pytest.raises(ValueError, match="--gpus 0 must be at least 1"):
        estimate("--model", "params=7e9", "--gpus", "0")
    with pytest.raises(ValueError, match="'Voodoo' is not in the table"):
        estimate("--model", "params=7e9", "--gpu", "Voodoo")
    with pytest.raises(ValueError, match="give one of them"):
        estimate("--model", "params=7e9", "--gpu", "H100", "--calibrate")
    with pytest.raises(ValueError, match=r"--plot .* cannot be written"):
        estimate("--model", "params=1m", "--plot", "absent/out.png")


@pytest.mark.parametrize("options", [("--gpus", "8"), ("--gpus", "1", "--gpu", "4090", "--host-memory", "16")])
def test_the_picture(estimate, tmp_path, options):
    from PIL import Image

    path = tmp_path / "out.png"
    zero = CONFIG["zero_optimization"] | ON_DISK
    estimate("--model", "params=7e9", "--plot", str(path), *options, config=CONFIG | {"zero_optimization": zero})
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert picture.height > 700
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50  # something is drawn


def test_help_imports_no_torch():
    program = (
        "import sys; from tritonspeed import cli\n"
        "try: cli.main(['estimate', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
