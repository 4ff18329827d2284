"""What Lightning's converter asks of a checkpoint's files: DeepSpeed's own are named, ours are made in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tritonspeed as ts
from tritonspeed.integrations.zero_files import get_model_state_file, get_optim_files


def test_deepspeeds_files_are_named_rank_after_rank(tmp_path):
    for rank in (0, 10, 2, 1):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    names = [Path(str(path)).name for path in get_optim_files(tmp_path)]
    assert names == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1, 2, 10)]
    for stage, name in ((1, "mp_rank_00_model_states.pt"), (3, "zero_pp_rank_0_mp_rank_00_model_states.pt")):
        with pytest.raises(FileNotFoundError, match=name):
            get_model_state_file(tmp_path, stage)
        (tmp_path / name).touch()
        assert get_model_state_file(tmp_path, stage) == str(tmp_path / name)


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*_optim_states.pt and no manifest.json"):
        get_optim_files(tmp_path)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ours_tell_the_stage_and_what_was_given_to_be_kept(stage, tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    engine = ts.initialize(model=torch.nn.Linear(3, 1), config=config)[0]
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    kept = {"epoch": 3, "hyper_parameters": {"lr": 0.1}, "best": torch.tensor(0.5)}
    engine.save_checkpoint(tmp_path, tag="checkpoint", client_state=kept)
    (optim_file,) = get_optim_files(tmp_path / "checkpoint")
    assert torch.load(optim_file, weights_only=True) == {"optimizer_state_dict": {"zero_stage": stage}}
    states = torch.load(get_model_state_file(tmp_path / "checkpoint", stage), weights_only=True)
    assert {name: states[name] for name in kept} == kept
    assert states["global_steps"] == 1 and states["dp_world_size"] == 1 and states["module"] == {}
