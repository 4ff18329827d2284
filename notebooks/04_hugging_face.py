# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hugging Face: one script, one config, not a word changed
#
# Trainer, Accelerate and TRL say `import deepspeed`. Started by `tritonspeed run`, they find tritonspeed under it.
#
# 1. A Trainer script and a `ds_config.json`, as they are written everywhere.
# 2. What will happen with both, said before anything runs.
# 3. The same script at ZeRO stages 0, 2 and 3, on two ranks: one curve.
# 4. A look inside one step.
#
# It runs on a laptop without a GPU in about a minute.
#
# ## 1. A script and a config
#
# A Llama of 0.4 million parameters learns bytes of Python's own source; nothing is downloaded. The script knows Hugging
# Face alone. Its last lines write what the Trainer has logged; the callback is for the fourth part.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks, on any machine: so all of it stays on the CPU

script = """
import inspect, json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

config, out, look_inside = sys.argv[1], sys.argv[2], len(sys.argv) > 3
settings = TrainingArguments(
    output_dir=out, deepspeed=config, use_cpu=True, max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3,
    warmup_steps=3, logging_steps=1, save_strategy="no", report_to=[],
)
set_seed(0)
text = torch.frombuffer(bytearray(inspect.getsource(inspect) + inspect.getsource(json), "utf8"), dtype=torch.uint8)
rows = text.long()[: len(text) // 64 * 64].view(-1, 64)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4,
))
trainer = Trainer(model=model, args=settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])

class LookInside(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if look_inside and state.global_step == 20:
            trainer.model_wrapped.trace(steps=1, folder=out)

trainer.add_callback(LookInside())
trainer.train()
if settings.process_index == 0:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT" + json.dumps({"loss": [e["loss"] for e in logged], "norm": [e["grad_norm"] for e in logged]}))
"""

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="tritonspeed-"))
(folder / "train.py").write_text(script)


def config_of(stage):
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys(batches, "auto"),
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "overlap_comm": True, **dict.fromkeys(sizes, "auto")},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    }


for stage in (0, 2, 3):
    (folder / f"stage{stage}.json").write_text(json.dumps(config_of(stage), indent=2))
print((folder / "stage3.json").read_text())


# %% [markdown]
# ## 2. What will happen, before anything runs
#
# `check` reads the config and the script without running either, and without torch. Each key and each name that the
# script takes from DeepSpeed is honoured, mapped, inert with a reason, or refused with an alternative.


# %%
def tritonspeed(*words):
    done = subprocess.run([sys.executable, "-m", "tritonspeed.cli", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


print(tritonspeed("check", "stage3.json", "--script", "train.py", "--world", "2"))

# %% [markdown]
# ## 3. Three stages, one curve
#
# `tritonspeed run` has DeepSpeed's launcher flags. Two ranks each time; where the config says stage 3, no rank holds
# the whole model between two uses of it.

# %%
runs = {}
for stage in (0, 2, 3):
    inside = ["look inside"] if stage == 3 else []
    printed = tritonspeed("run", "--num_gpus", "2", "--no_local_rank", "train.py", f"stage{stage}.json", "out", *inside)
    runs[stage] = json.loads(printed.split("RESULT")[-1].splitlines()[0])
    print(f"stage {stage}: loss {runs[stage]['loss'][0]:.4f} at first, {runs[stage]['loss'][-1]:.4f} at last")

same = runs[0] == runs[2] == runs[3]
print("the same bits in all losses and gradient norms:", same)
assert same

# %%
import matplotlib.pyplot as plt

picture, axes = plt.subplots(figsize=(7, 3.2))
for stage, width, colour in ((0, 7, "#c9d7e8"), (2, 4, "#6f9bc8"), (3, 1.5, "#123a63")):
    axes.plot(range(1, 31), runs[stage]["loss"], linewidth=width, color=colour, label=f"stage {stage}")
axes.set(xlabel="step", ylabel="loss, nats per byte", title="Trainer at three ZeRO stages: one curve")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. A look inside
#
# Under Trainer the engine is `trainer.model_wrapped`; the script asked it for a trace of one step at stage 3. The JSON
# opens at ui.perfetto.dev; this is the picture beside it: who computes, who waits for whom, and what is held meanwhile.

# %%
from IPython.display import Image

Image(next((folder / "out").glob("*.png")).read_bytes(), width=900)
