"""The example of the README: Trainer under ZeRO-3 on two ranks, with nothing of ours in the script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_trainer_example_learns_saves_and_writes(tmp_path):
    script = ROOT / "examples" / "hf_trainer.py"
    assert "tritonspeed" not in "\n".join(script.read_text().split('"""')[2:]), "the script is a user's"
    command = [sys.executable, "-m", "tritonspeed.cli", "run", "--num_gpus", "2", str(script)]
    command += ["--deepspeed", str(ROOT / "examples" / "hf_zero3.json"), "--output_dir", str(tmp_path), "--use_cpu"]
    command += ["--bf16", "--hidden_size", "32", "--num_layers", "2", "--max_steps", "12", "--learning_rate", "1e-2"]
    command += ["--logging_steps", "4", "--save_strategy", "no", "--report_to", "none", "--warmup_steps", "1"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("`deepspeed` is tritonspeed") == 1, done.stderr
    eval_loss = float(done.stdout.split("'eval_loss': ")[-1].split(",")[0])
    assert 0 < eval_loss < 5.0, "guessing is 5.545 nats a byte"
    assert "def " in done.stdout
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    assert saved.lm_head.weight.dtype == torch.bfloat16 and not saved.lm_head.weight.isnan().any()
