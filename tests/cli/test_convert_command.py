"""`tritonspeed convert` and `tritonspeed verify`: what they say and how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritonspeed import cli

WEIGHTS = {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5).bfloat16()}


@pytest.fixture
def run(capsys):
    def call(*words):
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def runs(tmp_path, run):
    """A folder with two checkpoints of ours."""
    save_file(WEIGHTS, tmp_path / "start.safetensors")
    for tag in ("one", "two"):
        status, out, _ = run("convert", tmp_path / "start.safetensors", tmp_path / "runs" / tag)
        assert status == 0
        lines = out.splitlines()
        assert lines[0] == f"read     {tmp_path / 'start.safetensors'}: plain weights, 2 parameters, 20 values"
        assert lines[1].startswith(f"wrote    {tmp_path / 'runs' / tag}: ") and lines[1].endswith(" bytes")
        assert len(lines) == 2
    return tmp_path / "runs"


def test_to_weights_and_what_is_left_out(runs, run, tmp_path) -> None:
    status, out, _ = run("convert", runs, tmp_path / "w", "--to", "huggingface", "--dtype", "fp16", "--tag", "one")
    assert status == 0
    assert out.splitlines()[0] == f"read     {runs / 'one'}: a checkpoint of tritonspeed, 2 parameters, 20 values"
    found = load_file(tmp_path / "w" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        n: t.half().tolist() for n, t in WEIGHTS.items()
    }
    status, out, _ = run("convert", runs, tmp_path / "w2", "--to", "huggingface", "--max-shard-size", "40B")
    assert status == 2


def test_mistakes_are_one_line(runs, run, tmp_path) -> None:
    for words, said in (
        ((runs, runs / "two"), "is there already"),
        ((tmp_path / "none", tmp_path / "x"), "there is no"),
        ((runs, tmp_path / "x", "--tag", "three"), "'three' is no checkpoint"),
        ((runs, tmp_path / "x", "--dtype", "bf16"), "only weights are cast"),
        ((runs, tmp_path / "x", "--max-shard-size", "much"), "write bytes, or a number and a unit"),
    ):
        status, out, err = run("convert", *words)
        assert (status, out) == (2, "")
        assert err.startswith("tritonspeed convert: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_verify_finds_a_flipped_byte(runs, run) -> None:
    status, out, _ = run("verify", runs)
    assert status == 0
    assert [line.split(",")[0] for line in sorted(out.splitlines())] == [
        f"good     {runs / tag}: step 0" for tag in ("one", "two")
    ]
    assert run("verify", runs / "one", "--sampled")[1].endswith("sampled\n")
    file = next(runs.glob("one/rank-0-of-1/*.master.safetensors"))
    content = bytearray(file.read_bytes())
    content[4096] ^= 1
    file.write_bytes(content)
    status, out, _ = run("verify", runs)
    assert status == 1
    good, damaged = sorted(out.splitlines(), reverse=True)
    assert good.startswith(f"good     {runs / 'two'}")
    assert damaged.startswith(f"damaged  {runs / 'one'}: {file}: bytes [")
    assert run("verify", runs, "--tag", "two")[0] == 0


def test_verify_of_a_damaged_manifest_and_of_others(runs, run, tmp_path) -> None:
    (runs / "one" / "manifest.json").write_text("{")
    status, out, _ = run("verify", runs)
    assert status == 1 and f"damaged  {runs / 'one'}: " in out and f"good     {runs / 'two'}" in out
    status, out, err = run("verify", tmp_path / "start.safetensors")
    assert (status, out) == (2, "")
    assert "is plain weights: only tritonspeed's checkpoints have digests to compare with" in err


def test_help_waits_for_no_torch() -> None:
    program = (
        "import sys; from tritonspeed import cli\n"
        "try: cli.main([sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for command, said in (("convert", "SAVE_DIR/TAG"), ("verify", "--sampled")):
        done = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout
