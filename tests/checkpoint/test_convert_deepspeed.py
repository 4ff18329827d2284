"""What real DeepSpeed has saved, through ``convert`` and ``zero_to_fp32``: nothing is lost and no bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_fixture import Made, unpack
from safetensors.torch import load_file

from bench.peers.deepspeed_checkpoints import PACKED
from tritonspeed.checkpoint.convert import convert
from tritonspeed.checkpoint.opening import open_source
from tritonspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("name", PACKED)
def test_to_ours_to_universal_and_to_ours_again(made: Path, tmp_path: Path, name: str) -> None:
    source = open_source(made / name / "checkpoint")
    done = convert(made / name / "checkpoint", tmp_path / "a" / "t")
    assert done.left_out == () and "DeepSpeed" in done.kind
    convert(tmp_path / "a", tmp_path / "u" / "t", to="universal")
    convert(tmp_path / "u", tmp_path / "b" / "t")
    for folder in ("a", "b"):
        other = open_source(tmp_path / folder)
        assert set(other.parameters) == set(source.parameters)
        for parameter, facts in source.parameters.items():
            assert other.parameters[parameter].shape == facts.shape
            assert other.parameters[parameter].aliases == facts.aliases
            kinds, numel = other.kinds(parameter), torch.Size(facts.shape).numel()
            assert kinds == source.kinds(parameter) - ({"parameters"} if folder == "b" and facts.trainable else set())
            for kind in kinds:
                value = source.read(kind, parameter, 0, numel)
                assert torch.equal(other.read(kind, parameter, 0, numel), value), (folder, kind, parameter)
            # a universal checkpoint has a number of steps even where the optimizer (SGD) counts none
            more = {"step"} if folder == "b" and "sgd" in name else set()
            assert {k: v for k, v in other.scalars(parameter).items() if k not in more} == source.scalars(parameter)
        for fact in ("global_steps", "global_samples", "skipped_steps", "optimizer", "scaler", "scheduler"):
            assert getattr(other.facts, fact) == getattr(source.facts, fact), (folder, fact)


@pytest.mark.parametrize("name", PACKED)
def test_one_fp32_state_dict(made: Path, name: str) -> None:
    """As DeepSpeed's own function gives it where that can: it knows no stage 0 and no BF16_Optimizer, and leaves
    frozen parameters out at stage 1."""
    case, found = Made(made / name), get_fp32_state_dict_from_zero_checkpoint(made / name / "checkpoint")
    wanted = {parameter: v for (kind, parameter), v in case.values().items() if kind == "master"}
    if "robin" in name:  # whose accessors mistake one parameter for another: see test_deepspeed_files
        wanted = {}
    frozen = {parameter: v for (kind, parameter), v in case.values().items() if kind == "parameters"}
    wanted |= {parameter: v.float() for parameter, v in frozen.items() if parameter not in wanted}
    wanted |= {"scale": case.truth["buffer|scale"].float()}
    assert set(wanted) <= set(found) and found["head.weight"] is found["embedding.weight"]
    for parameter, value in wanted.items():
        assert found[parameter].dtype == torch.float32
        if "robin" in name and parameter not in ("positions", "scale"):
            assert torch.equal(found[parameter].to(frozen[parameter].dtype), frozen[parameter]), parameter
        else:
            assert torch.equal(found[parameter], value.view(found[parameter].shape)), parameter


def test_to_weights(made: Path, tmp_path: Path) -> None:
    case = Made(made / "stage3-bf16")
    convert(made / "stage3-bf16" / "checkpoint", tmp_path / "w", to="huggingface")
    found = load_file(tmp_path / "w" / "model.safetensors")
    assert "head.weight" not in found and found["positions"].dtype == torch.bfloat16
    for (kind, parameter), value in case.values().items():
        if kind in ("master", "parameters"):
            assert torch.equal(found[parameter], value.bfloat16()), parameter
