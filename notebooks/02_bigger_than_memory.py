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
# # Training from the disk: what it will take, then what it took
#
# Adam keeps three fp32 numbers for each parameter, and the model two more in 16 bits, itself and its gradient: 16
# bytes a parameter. Here masters, moments and parameters live in files, and memory holds what is in use.
#
# 1. A model and a config, and what they will take, before anything runs.
# 2. The run, with memory sampled all the while.
# 3. Both side by side.
# 4. What is in the files, opened with plain safetensors.
#
# The model is small, so that this takes less than a minute; `examples/bigger_than_memory.py` is the same with more
# state than the machine has memory.
#
# ## 1. What it will take
#
# A byte-level transformer in plain PyTorch. Each block is recomputed in backward, as usual where memory counts.

# %%
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tritonspeed as ts

WIDTH, DEPTH, HEADS, ROWS, LENGTH, STEPS = 384, 12, 6, 2, 128, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(self.norm_attention(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


# %% [markdown]
# The config is what a DeepSpeed user would write. `max_in_cpu` is 0, so that no parameter stays in memory;
# `buffer_count` says how many tiles of masters and moments are in memory at once: on their way in, being updated, and
# on their way out.

# %%
FOLDER = "state"  # on the disk; here, beside the notebook
BLOCK = sum(p.numel() for p in Block().parameters())
config = {
    "train_micro_batch_size_per_gpu": ROWS,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": BLOCK,
        "stage3_max_live_parameters": 2 * BLOCK,
        "stage3_max_reuse_distance": BLOCK,
        "offload_optimizer": {"device": "nvme", "nvme_path": FOLDER, "buffer_count": 3},
        "offload_param": {"device": "nvme", "nvme_path": FOLDER, "buffer_size": BLOCK, "max_in_cpu": 0},
    },
}

# %% [markdown]
# The text is this notebook's library: Python's own source of `argparse`, which is on every machine.

# %%
import argparse

text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)


def batch(step: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - LENGTH, (ROWS,), generator=torch.Generator().manual_seed(step))
    windows = torch.stack([text[int(s) : int(s) + LENGTH + 1] for s in starts]).long()
    return windows[:, :-1], windows[:, 1:]


# %% [markdown]
# `estimate` needs shapes alone: the model stands on the meta device, without memory. It walks one iteration on
# integers, in the order that the run will take, and one forward and backward on tensors that have only shapes.

# %%
with torch.device("meta"):
    shapes = Transformer()
forecast = ts.estimate(shapes, config, world_size=1, inputs=batch(0), tokens=ROWS * LENGTH)
state_bytes = 16 * forecast.num_parameters
print(f"state: {state_bytes / 2**20:,.1f} MiB, 16 bytes a parameter")
print(forecast)

# %% [markdown]
# ## 2. The run
#
# Under `zero.Init` the parameters of a module go to the disk as soon as it is made: the model is never whole.
# `initialize` moves them on unit by unit, into the files of masters and parameters. A thread notes what the process has
# resident.


# %%
def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


samples: list[tuple[float, int]] = []
done = threading.Event()


def watch() -> None:
    while not done.wait(0.02):
        samples.append((time.perf_counter(), resident_bytes()))


before_bytes = resident_bytes()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()

torch.manual_seed(0)
with ts.zero.Init(config_dict_or_path=config):
    model = Transformer()
engine, *_ = ts.initialize(model=model, config=config)

reports = []
for step in range(STEPS):
    loss = engine(*batch(step))
    engine.backward(loss)
    engine.step()
    reports.append(engine.last_step)
    print(f"step {step + 1}: loss {reports[-1].loss:.2f}")

# %% [markdown]
# `engine.step()` returns when the norm of the gradient is known: the update runs under the next forward, and a unit is
# awaited where it is needed. Reading a master waits for the last one to be committed.

# %%
name, parameter = next((n, p) for n, p in model.named_parameters() if n == "blocks.0.up.weight")
master = ts.zero.safe_get_full_fp32_param(parameter).clone()
done.set()
watcher.join()

# %% [markdown]
# ## 3. Side by side

# %%
MIB = 2**20
last = reports[-1]
grown = max(b for _, b in samples) - before_bytes
allowed = forecast.resident_bytes - forecast.framework_bytes
rows = [
    ("state of the training", state_bytes, None),
    ("resident, beyond what was there before", allowed, grown),
    ("on disk", forecast.disk_bytes, last.disk_bytes),
    ("read in a step", forecast.link_bytes["disk_read"], last.links["disk read"][0]),
    ("written in a step", forecast.link_bytes["disk_write"], last.links["disk write"][0]),
]
print(f"{'MiB':40}{'estimated':>12}{'measured':>12}")
for what, estimated, measured in rows:
    print(f"{what:40}{estimated / MIB:12,.1f}" + (f"{measured / MIB:12,.1f}" if measured is not None else ""))
print("under the bound:", grown <= allowed)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained")
start = samples[0][0]
left.fill_between([t - start for t, _ in samples], [(b - before_bytes) / MIB for _, b in samples], color="#3b5b92")
for value, label, colour in ((state_bytes, "state", "#e08a3c"), (allowed, "bound", "#4f9d69")):
    left.axhline(value / MIB, color=colour)
    left.annotate(label, (0.01, value / MIB), xycoords=("axes fraction", "data"), va="bottom", color=colour)
left.set(xlabel="seconds", ylabel="MiB beyond the framework's", ylim=(0, 1.15 * max(state_bytes, allowed) / MIB))
right.plot(range(1, STEPS + 1), [report.loss for report in reports], "o-", color="#3b5b92")
right.set(xlabel="step", ylabel="loss, nats per byte", ylim=(0, None))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The bound has a margin for what is outside its equation, so the curve stays below it. At this size the buffers of the
# step weigh as much as the gradients; they do not grow with the model, and gradients (2 bytes a parameter) are all that
# does.
#
# ## 4. What is in the files
#
# One file per unit, kind and slot. A step reads one slot of masters and moments and writes the other; the commit record
# says which one holds. Parameters follow from the masters, so they have one slot, written in place.

# %%
rank = Path(FOLDER) / "tritonspeed" / "rank-0-of-1"
files = sorted(path for path in rank.iterdir() if path.name.startswith("blocks.0."))
for path in files:
    print(f"{path.name:45}{path.stat().st_size / MIB:8.2f} MiB")

# %% [markdown]
# They are ordinary safetensors files, whose tensors begin on pages: that is what direct reads and writes around the
# page cache ask for. Anyone can open them.

# %%
import json

from safetensors import safe_open

record = json.loads((rank / "committed.json").read_text())
holds = next(flat for flat in record["flats"] if (flat["bucket"], flat["kind"]) == ("blocks.0", "master"))
print(f"step {record['step']} is committed; the masters of blocks.0 are in {holds['file']}")
with safe_open(rank / holds["file"], framework="pt") as file:
    for key in sorted(file.keys()):
        if not key.startswith("__pad__"):
            print(f"{key:38}{file.get_slice(key).get_dtype():5}{file.get_slice(key).get_shape()}")
    same = torch.equal(file.get_tensor(name), master)
print(f"{name} in the file is the engine's master, bit for bit: {same}")

# %% [markdown]
# `engine.destroy()` gives the folder back; the files stay until another run takes it.

# %%
import shutil

engine.destroy()
shutil.rmtree(FOLDER)
