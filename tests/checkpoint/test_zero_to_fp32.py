"""DeepSpeed's functions and script that make one fp32 state dict, on our checkpoints."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from run_of_two import BUFFERS, PARAMETERS, make, values
from safetensors.torch import load_file
from torch import nn

from tritonspeed.checkpoint import zero_to_fp32
from tritonspeed.checkpoint.script import put_script
from tritonspeed.checkpoint.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    convert_zero_checkpoint_to_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "runs" / "global_step12")
    (tmp_path / "runs" / "latest").write_text("global_step12")
    return tmp_path / "runs"


def wanted(frozen=True, tied=True):
    truth = values()
    flat = {**truth["parameters"], **truth["master"], "none": torch.empty(0)}  # masters, where there are both
    found = {n: flat[n].float().view(f.shape) for n, f in PARAMETERS.items() if f.trainable or frozen}
    if tied:
        found["head.weight"] = found["embed.weight"]
    return found | {n: b.float() if b.is_floating_point() else b for n, b in BUFFERS.items()}


def assert_same(found, truth):
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_signatures_are_deepspeeds() -> None:
    """As in DeepSpeed 0.19: its docs' examples and its callers run."""
    said = {
        "get_fp32_state_dict_from_zero_checkpoint": "checkpoint_dir tag=None exclude_frozen_parameters=False"
        " lazy_mode=False",
        "convert_zero_checkpoint_to_fp32_state_dict": "checkpoint_dir output_dir max_shard_size='5GB'"
        " safe_serialization=False tag=None exclude_frozen_parameters=False",
        "convert_zero_checkpoint_to_state_dict": "checkpoint_dir output_dir dtype=torch.float32 max_shard_size='5GB'"
        " safe_serialization=False tag=None exclude_frozen_parameters=False",
        "load_state_dict_from_zero_checkpoint": "model checkpoint_dir tag=None",
    }
    for name, text in said.items():
        parameters = inspect.signature(getattr(zero_to_fp32, name)).parameters.values()
        assert " ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters) == text


def test_the_state_dict(folder) -> None:
    found = get_fp32_state_dict_from_zero_checkpoint(folder)
    assert_same(found, wanted())
    assert found["head.weight"] is found["embed.weight"]
    assert_same(get_fp32_state_dict_from_zero_checkpoint(folder, "global_step12", True), wanted(frozen=False))
    lazy = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    assert lazy["up.weight"].shape == (27, 13) and lazy["up.weight"].dtype == torch.float32
    assert_same({name: tensor.contiguous() for name, tensor in lazy.items()}, wanted())


def test_into_a_model(folder) -> None:
    up, other = nn.Linear(13, 27), nn.Linear(1, 1)
    model, kept = nn.ModuleDict({"up": up, "other": other}), other.weight.item()
    assert load_state_dict_from_zero_checkpoint(model, folder) is model
    assert torch.equal(up.weight, wanted()["up.weight"]) and torch.equal(up.bias, wanted()["up.bias"])
    assert other.weight.item() == kept


@pytest.mark.parametrize("size", [None, "1KB"])
def test_files_of_torch_save(folder, tmp_path, size) -> None:
    out = tmp_path / "out"
    convert_zero_checkpoint_to_fp32_state_dict(folder, out, max_shard_size=size)
    files = sorted(out.glob("*.bin"))
    found = {}
    for file in files:
        found |= torch.load(file, weights_only=True)
    assert_same(found, wanted())
    if size is None:
        assert os.listdir(out) == ["pytorch_model.bin"]
        return
    assert files[0].name == f"pytorch_model-00001-of-{len(files):05d}.bin" and len(files) > 1
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in torch.load(out / file, weights_only=True)
    assert index["weight_map"].keys() == found.keys()


@pytest.mark.parametrize("size", [10**9, "1KB"])
def test_files_of_safetensors(folder, tmp_path, size) -> None:
    out = tmp_path / "out"
    convert_zero_checkpoint_to_fp32_state_dict(folder, out, size, True, exclude_frozen_parameters=True)
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert_same(found, wanted(frozen=False, tied=False))
    assert (out / "model.safetensors.index.json").exists() == (size == "1KB")


def test_another_dtype(folder, tmp_path) -> None:
    convert_zero_checkpoint_to_state_dict(folder, tmp_path / "out", "torch.bfloat16", safe_serialization=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(found, {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted(tied=False).items()})
    with pytest.raises(ValueError, match="dtype 'int8': must be one of float32"):
        convert_zero_checkpoint_to_state_dict(folder, tmp_path / "no", "int8")
    assert not (tmp_path / "no").exists()


def test_what_is_not_there(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder .*global_step13"):
        get_fp32_state_dict_from_zero_checkpoint(folder, "global_step13")
    (folder / "latest").unlink()
    with pytest.raises(ValueError, match="'latest'"):
        get_fp32_state_dict_from_zero_checkpoint(folder)


def test_the_script(folder, tmp_path) -> None:
    path = put_script(folder)
    assert path == folder / "zero_to_fp32.py" and os.access(path, os.X_OK)
    written = path.stat().st_mtime_ns
    put_script(folder)
    assert path.stat().st_mtime_ns == written
    command = [
        sys.executable,
        "zero_to_fp32.py",
        ".",
        str(tmp_path / "out"),
        "--safe_serialization",
        "-t",
        "global_step12",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), wanted(tied=False))
    failed = subprocess.run([*command[:-1], "none"], cwd=folder, capture_output=True, text=True, timeout=100)
    assert failed.returncode == 2
    assert failed.stderr.startswith("zero_to_fp32.py: there is no folder") and failed.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog) -> None:
    put_script(tmp_path / "absent")
    assert "zero_to_fp32.py could not be written" in caplog.text


def test_the_script_without_tritonspeed_says_so(tmp_path) -> None:
    shutil.copy(put_script(tmp_path), tmp_path / "here.py")
    done = subprocess.run(
        [sys.executable, "-S", "-E", "here.py", ".", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "needs tritonspeed" in done.stderr and "pip install tritonspeed" in done.stderr
    assert "Traceback" not in done.stderr
