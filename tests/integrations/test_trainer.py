"""Hugging Face's Trainer, as it is, on two ranks: real DeepSpeed's numbers, and what it leaves on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script_cases import RECORDED, RESUMED, SCRIPTS, TRAINER, Case, offloaded, trainer, with_auto, zero
from script_runs import OFFLINE, differences, run_case

CASES = {case.name.removeprefix("trainer_"): case for case in [*TRAINER, *RESUMED]}


def recorded(name: str) -> dict:
    """Real DeepSpeed's figures of a case."""
    return json.loads((RECORDED / f"trainer_{name}.json").read_text())


def with_arguments(case: Case, *arguments: str, **changes) -> Case:
    """The same script, told something more."""
    return dataclasses.replace(case, arguments=(*case.arguments, *arguments), **changes)


_ELSEWHERE = ("trainer_pretrained-mixtral", "trainer_pretrained-gpt2", "trainer_stage3-linear")  # below, with more


@pytest.mark.parametrize("case", [c for c in TRAINER if c.name not in _ELSEWHERE], ids=lambda case: case.name)
def test_trainer_has_deepspeeds_numbers(case, as_recorded):
    as_recorded(case)


# from_pretrained


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_a_pretrained_model_is_never_whole_on_a_rank(family, as_recorded):
    """Weights that the checkpoint lacks, keeps as one per expert, ties or resizes included; and it can be resized once
    more after training, which real DeepSpeed does not survive."""
    from transformers import AutoModelForCausalLM

    record = as_recorded(with_arguments(CASES[f"pretrained-{family}"], "--resize_again"))
    assert record["metrics"]["again"] == [1, 4, 80]
    held = {rank: int(own) for rank, own in re.findall(r"rank (\d) holds (\d+) bytes", record["output"])}
    whole = 4 * record["metrics"]["whole"]
    assert sorted(held) == ["0", "1"] and max(held.values()) < 0.6 * whole, (held, whole)  # pages of 4 KiB are not cut
    assert whole <= sum(held.values()) < 1.01 * whole, (held, whole)
    final = Path(record["out"]) / "final"
    model, found = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape == (72, 64)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "gpt2")


def test_compiled_and_saved_for_from_pretrained(as_recorded):
    """--torch_compile: the same numbers, and names that nobody has prefixed; --save_only_model: no shards."""
    case = with_arguments(
        CASES["stage3-linear"],
        *("--torch_compile", "--torch_compile_backend=eager", "--save_strategy=steps", "--save_steps=5"),
        "--save_only_model",
    )
    saved = Path(as_recorded(case)["out"]) / "checkpoint-5"
    assert not list(saved.glob("global_step*"))
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


# save and resume


def test_resumed_runs_go_on_with_the_same_numbers(as_recorded, tmp_path):
    """Another process loads the fourth of five steps: loss, norm and rate of the fifth, and the best model, are the
    uninterrupted run's to the last digit; dropout draws what it would have drawn. With its state on disk from then on.
    """
    case = CASES["save-stage3"]
    whole = as_recorded(case)
    best = whole["metrics"]["best_checkpoint"]
    assert whole["metrics"]["checkpoints"] == sorted({best, "checkpoint-4", "checkpoint-5"})  # save_total_limit=3
    on_disk = offloaded("nvme", path=tmp_path / "nvme", like=case.config)
    resumed = run_case(with_arguments(case, "--resume=checkpoint-4", config=on_disk), tmp_path)
    assert resumed["steps"] == whole["steps"]
    assert resumed["metrics"] == whole["metrics"]
    out = Path(whole["out"])
    check_layout(out / "checkpoint-5", "global_step5", gathered=True)
    same_weights(out / "checkpoint-5", out / "checkpoint-5" / "model.safetensors")
    same_weights(out / best, out / "final" / "model.safetensors")


def test_a_run_of_stage_1_resumes(as_recorded, tmp_path):
    """Hugging Face's optimizer and schedule, which Trainer saves beside the checkpoint."""
    case = CASES["save-stage1"]
    whole = as_recorded(case)
    resumed = run_case(with_arguments(case, "--resume=checkpoint-4"), tmp_path)
    assert (resumed["steps"], resumed["metrics"]) == (whole["steps"], whole["metrics"])
    same_weights(Path(whole["out"]) / "checkpoint-5", Path(whole["out"]) / "checkpoint-5" / "model.safetensors")


def test_weights_that_are_not_gathered_are_in_the_checkpoint(as_recorded, tmp_path):
    """stage3_gather_16bit_weights_on_model_save: false. Trainer saves the shards in the place of model.safetensors."""
    case = CASES["save-ungathered"]
    whole = as_recorded(case)
    out = Path(whole["out"])
    check_layout(out / "checkpoint-3", "global_step3", gathered=False)
    assert not [*out.glob("*/pytorch_model*"), *out.glob("*/model.safetensors")]
    made = tmp_path / "made"
    script = [sys.executable, str(out / "final" / "zero_to_fp32.py"), str(out / "final"), str(made)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    files = list(made.iterdir())
    assert [f.name for f in files if f.suffix in (".bin", ".safetensors")], files
    same_weights(out / "checkpoint-3", next(f for f in files if f.suffix in (".bin", ".safetensors")))
    resumed = run_case(with_arguments(case, "--resume=checkpoint-2"), tmp_path)
    assert (resumed["steps"], resumed["metrics"]) == (whole["steps"], whole["metrics"])


def check_layout(checkpoint: Path, tag: str, gathered: bool) -> None:
    """What Trainer looks for in a folder that it resumes from, and users in one that they take weights from."""
    assert [place.name for place in checkpoint.glob("global_step*")] == [tag]
    assert (checkpoint / "latest").read_text().strip() == tag
    assert os.access(checkpoint / "zero_to_fp32.py", os.X_OK)
    assert (checkpoint / "model.safetensors").exists() == gathered


def same_weights(checkpoint: Path, file: Path) -> None:
    """The whole weights in a checkpoint's shards, by DeepSpeed's function, are those of the file, and of a model that
    from_pretrained opens beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tritonspeed.checkpoint.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    place = file.parent if (file.parent / "config.json").exists() else checkpoint
    written = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    empty = LlamaForCausalLM(LlamaConfig.from_pretrained(place))
    model = load_state_dict_from_zero_checkpoint(empty, checkpoint)
    opened = LlamaForCausalLM.from_pretrained(place).state_dict() if place == file.parent else written
    for name, value in model.state_dict().items():
        assert torch.equal(value, written[name]) and torch.equal(value, opened[name]), name


# what real DeepSpeed does not do on a CPU


def test_fp16_skips_and_then_trains(tmp_path):
    """--fp16 --use_cpu: steps overflow; weights and rate stay, and the run goes on with a lower scale."""
    config = {**zero(3), "fp16": {"enabled": "auto", "initial_scale_power": 20, "hysteresis": 1}}
    del config["bf16"]
    why = "real DeepSpeed has no fp16 on a CPU"
    said = {"TRANSFORMERS_VERBOSITY": "warning"}  # Trainer sets the engine's level by its own
    case = trainer("fp16", config, "--fp16", "--max_steps=6", no_peer=why, close=2, environment=said)
    run = run_case(case, tmp_path)
    steps = run["steps"]
    skipped = [n for n, step in enumerate(steps, 1) if step["grad_norm"] == float("inf")]
    assert skipped[:2] == [1, 2] and len(skipped) < 5
    said = re.findall(r"step (\d): step skipped.*loss scale (\S+) → (\S+)", run["output"])
    assert [int(n) for n, _, _ in said] == skipped
    assert all(2 * float(new) == pytest.approx(float(old), rel=1e-5) for _, old, new in said)
    applied = min(set(range(1, 7)) - set(skipped))
    assert all((step["learning_rate"] > 0) == (n > applied) for n, step in enumerate(steps, 1))
    in_fp32 = recorded("stage3-linear")["steps"]
    same = [{"loss": step["loss"]} for step in in_fp32[:2]]  # the weights that both begin with
    assert not differences(case, {"steps": steps[:2], "metrics": {}}, {"steps": same, "metrics": {}})


def test_a_script_by_itself_with_one_line(tmp_path):
    """`python script.py`, with `import tritonspeed.hf` first: no launcher, no variables, one process."""
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps(with_auto(2, "WarmupLR")))
    script = SCRIPTS / "trainer_causal.py"
    line = f"import tritonspeed.hf, runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {**OFFLINE, "PYTHONPATH": str(SCRIPTS), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", line, "--deepspeed", str(config), "--out", str(tmp_path), "--max_steps=2"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert [step["learning_rate"] for step in steps] == [0, 1e-2]
