"""TRL's trainers, as they are, on two ranks: SFT, Reward, DPO, KTO, GRPO, RLOO at stages 2 and 3.

Between them the scripts have gradient checkpointing, a fused head that reads ``lm_head.weight`` past its module,
reference models that are engines without optimizer and follow the policy, reward models beside callables, sampling
inside the step with the model gathered or not, completions logged, and a model that is loaded from what was saved.

Sampled words are the same as under real DeepSpeed as long as no logit's rounding decides one: the models' weights are
larger than usual, so that no two words are near each other in twelve rows of eight.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from script_cases import RECORDED, SCRIPTS, TRL, trl
from script_runs import OFFLINE, TIMEOUT_S, differences
from transformers import AutoModelForCausalLM

CASES = {case.name.removeprefix("trl_"): case for case in TRL}
SAMPLED = ("completions/mean_length", "reward", "reward_std", "kl", "entropy", "rewards/short/mean")


@pytest.mark.parametrize("trainer", ["sft", "reward", "dpo", "kto", "grpo", "rloo"])
def test_every_trainer_has_deepspeeds_numbers_and_stages_2_and_3_the_same(trainer, as_recorded):
    two, three = as_recorded(CASES[f"{trainer}-stage2"]), as_recorded(CASES[f"{trainer}-stage3"])
    assert two["steps"] == three["steps"] and two["metrics"] == three["metrics"]
    assert len(three["steps"]) == 3 and three["steps"][1]["grad_norm"] > 0
    if trainer in ("grpo", "rloo"):
        assert all(name in three["steps"][2] for name in SAMPLED)
        assert all(f"─ Step {step} ─" in three["output"] for step in (1, 2, 3))  # completions, as a table


@pytest.mark.parametrize("case", ["sft-lora-stage3", "dpo-asked-once-stage3"])
def test_adapters_on_packed_text_and_a_reference_that_is_asked_once(case, as_recorded):
    as_recorded(CASES[case])


def test_generation_with_the_model_in_parts_samples_what_the_gathered_one_does(as_recorded):
    """Real DeepSpeed cannot: held against its record of the gathered model."""
    record = as_recorded(CASES["grpo-in-parts-stage3"])
    gathered = trl("grpo-stage3")
    found = differences(gathered, record, json.loads((RECORDED / f"{gathered.name}.json").read_text()))
    assert not found, "\n".join(found)


PREPARE = """
import sys
sys.path.insert(0, sys.argv[1])
from datasets import Dataset
from trl_tiny import saved_model, sentences
saved_model("models")
Dataset.from_dict({"text": sentences(32, 12, seed=1)}).to_json("data/train.jsonl")
"""


def test_the_command_line_of_trl(tmp_path):
    """With the accelerate config for ZeRO-3 that TRL brings along, which is for bf16 on eight GPUs."""
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"

    def run(*command: str) -> str:
        launcher = [sys.executable, "-m", "tritonspeed.cli", "env", *command]
        done = subprocess.run(launcher, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=tmp_path)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout + done.stderr

    (tmp_path / "data").mkdir()
    run(sys.executable, "-c", PREPARE, str(SCRIPTS))
    del env["RANK"]
    chosen = ["--model_name_or_path", "models/model-0-False-0", "--dataset_name", "data", "--output_dir", "saved"]
    shape = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--report_to", "none"]
    launch = ["--accelerate_config", "zero3", "--num_processes", "2", "--main_process_port", "0"]  # 0: a free one
    said = run("trl", "sft", *chosen, *shape, "--use_cpu", "--save_strategy", "no", *launch)
    assert "`deepspeed` is tritonspeed" in said and said.count("'grad_norm'") == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.vocab_size == 64
