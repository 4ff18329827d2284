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
# # Checkpoints: saved on two ranks, loaded on three, killed in between
#
# A checkpoint is a folder of plain safetensors files and a little JSON. It is written beside the others and gets its
# name when every rank has everything on disk, so there is either a whole one or none.
#
# 1. Two ranks train and save; what is in the folder, opened with plain safetensors.
# 2. Three ranks go on from it.
# 3. A run is killed while it saves; what is there afterwards.
# 4. Saving behind training's back: what a step waits for.
# 5. Weights for `from_pretrained`, in the same save.
#
# It runs on a laptop without a GPU in less than a minute.
#
# ## 1. Two ranks
#
# A script, as one would start it with `torchrun` or `deepspeed`. The 48 samples of a batch follow from the step, so
# that two ranks with 24 each and three with 16 see the same ones.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several ranks, on any machine: so all of it stays on the CPU

script = """
import json, sys
import torch
from torch import nn
import tritonspeed as ts

folder, until, save_at, width = sys.argv[1], *map(int, sys.argv[2:5])
config = {
    "train_batch_size": 48,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "checkpoint": {"save_model": True},
}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
engine, *_ = ts.initialize(model=model, config=config)
path, client = engine.load_checkpoint(folder)

losses = []
for step in range(engine.global_steps, until):
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(step))
    y = x[:, :4].sum(1, keepdim=True).tanh()
    mine = slice(engine.global_rank * 48 // engine.world_size, (engine.global_rank + 1) * 48 // engine.world_size)
    loss = (engine(x[mine].bfloat16()).float() - y[mine]).pow(2).mean()
    engine.backward(loss)
    engine.step()
    mean = loss.detach()
    torch.distributed.all_reduce(mean)
    losses.append(mean.item() / engine.world_size)
    if save_at and engine.global_steps % save_at == 0:
        engine.save_checkpoint(folder, client_state={"seen": f"{48 * engine.global_steps} samples"})
if engine.global_rank == 0:
    print("RESULT" + json.dumps({"loaded": path, "client": client, "losses": losses}))
engine.destroy()
"""

# %%
import json
import subprocess
import sys
from pathlib import Path

Path("train.py").write_text(script)


def command(num_ranks: int, *arguments: object) -> list[str]:
    ranks = ["run", "--num_procs", str(num_ranks), "--no_local_rank", "train.py"]
    return [sys.executable, "-m", "tritonspeed.cli", *ranks, *map(str, arguments)]


def train(num_ranks: int, *arguments: object) -> dict:
    done = subprocess.run(command(num_ranks, *arguments), capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if "RESULT" in line).split("RESULT")[1])


whole = train(2, "never-stopped", 60, 0, 256)  # to compare with: no checkpoint
first = train(2, "run", 30, 30, 256)
print(f"saved after {len(first['losses'])} steps")

# %% [markdown]
# Each rank has written its half of everything: one file for each bucket (here the model's blocks) and kind of value.


# %%
def show(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.relative_to(folder).as_posix():62}{path.stat().st_size:>12,}")


show(Path("run"))

# %%
manifest = json.loads(Path("run/global_step30/manifest.json").read_text())
print({key: manifest[key] for key in ("format", "tag", "step", "world", "facts")})
print(dict(list(manifest["parameters"].items())[:2]))

# %% [markdown]
# Any safetensors reader opens the files. A parameter that is cut between ranks is there under its name and interval;
# `__pad__` fills pages, since the disk is written around the page cache.

# %%
from safetensors import safe_open

for rank in range(2):
    path = f"run/global_step30/rank-{rank}-of-2/2.exp_avg.safetensors"
    with safe_open(path, framework="pt") as file:
        print(path, file.metadata())
        for key in file.keys():  # noqa: SIM118, it is no mapping
            print(f"    {key:24}{file.get_slice(key).get_dtype():5}{file.get_slice(key).get_shape()}")

# %% [markdown]
# ## 2. Three ranks
#
# Nothing is converted: each of the three reads the intervals that are its own now, from whichever files have them.
# Losses go on as if the run had never stopped; the sums over ranks have another order, which moves the last bits.

# %%
second = train(3, "run", 60, 0, 256)
print("from", Path(second["loaded"]).name, "with", second["client"])
parts = first["losses"] + second["losses"]
apart = max(abs(a - b) / b for a, b in zip(parts, whole["losses"], strict=True))
same = first["losses"] == whole["losses"][:30]
print(f"before the save, the same losses: {same}; over all 60 steps, at most {apart:.1%} apart")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.plot(whole["losses"], color="#c9d3e3", linewidth=5, label="never stopped, two ranks")
axes.plot(range(30), first["losses"], color="#3b5b92", label="two ranks, saved at 30")
axes.plot(range(30, 60), second["losses"], color="#e08a3c", label="three ranks, loaded")
axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# ## 3. Killed while saving
#
# Two ranks of a wider model save after every step; `latest` is followed from here. As soon as a further save is under
# way, which shows as a hidden folder, everything gets SIGKILL.

# %%
import signal
import time

process = subprocess.Popen(
    command(2, "killed", 1000, 1, 2048), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
)
latest = Path("killed/latest")
while not latest.exists():
    time.sleep(0.01)
acknowledged = latest.read_text()
while not any(Path("killed").glob(".global_step*/rank-*/*")) or latest.read_text() == acknowledged:
    time.sleep(0.001)
os.killpg(process.pid, signal.SIGKILL)
process.wait()
print("latest:", latest.read_text())
print(*sorted(path.name for path in Path("killed").iterdir() if path.is_dir()), sep="\n")

# %% [markdown]
# The folder with a dot in front is what the kill has left of a save that never was one. Nobody reads it, and the next
# save clears it away. This notebook's own process is one rank: it loads what `latest` names.

# %%
import torch
from torch import nn

import tritonspeed as ts


def engine_of(width: int, **checkpoint: object) -> ts.Engine:
    config = {
        "train_batch_size": 48,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "checkpoint": checkpoint,
    }
    model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
    return ts.initialize(model=model, config=config)[0]


def step(engine: ts.Engine) -> None:
    engine.backward(engine(torch.randn(48, 64).bfloat16()).float().pow(2).mean())
    engine.step()


engine = engine_of(2048)
path, client = engine.load_checkpoint("killed")
print("loaded", Path(path).name, client)
step(engine)
engine.save_checkpoint("killed")
print("hidden folders after the next save:", len(list(Path("killed").glob(".global_step*"))))
engine.destroy()

# %% [markdown]
# `tritonspeed`'s tests do this hundreds of times, at random moments, to one rank and to all.
#
# ## 4. Behind training's back
#
# With `"async_save": true` a step waits for a copy of the state in host memory; a thread writes it. With the optimizer
# on disk (`"offload_optimizer": {"device": "nvme"}`) it does not even wait for that: the files of the last step get a
# second name in the checkpoint. Here: a state of some 100 MiB, in turns.

# %%
import statistics

taken: dict[str, list[float]] = {}
for name, in_background in (("blocking", False), ("async", True)):
    engine = engine_of(3072, async_save=in_background, keep_last=1)
    for _ in range(4):
        step(engine)
        start = time.perf_counter()
        engine.save_checkpoint(name)
        stalled = time.perf_counter() - start
        engine.wait_for_checkpoint()
        taken.setdefault(f"{name}: training waits", []).append(1e3 * stalled)
        taken.setdefault(f"{name}: on disk", []).append(1e3 * (time.perf_counter() - start))
    engine.destroy()
for name, milliseconds in taken.items():
    print(f"{name:28}{statistics.median(milliseconds[1:]):8.0f} ms")

# %% [markdown]
# On a CPU the copy is the same memory's work as the write; from a GPU it is the link to the host alone.
# `keep_last` leaves one checkpoint:

# %%
print(*sorted(path.name for path in Path("async").iterdir() if path.is_dir()))

# %% [markdown]
# ## 5. Weights for everybody else
#
# `"save_model": true` writes `model/` beside the ranks' folders, from the same values, by all ranks in parallel: what
# `from_pretrained` expects, in the dtype that modules compute with. A plain module reads it.

# %%
from safetensors.torch import load_file

folder = Path("run/global_step30/model")
show(folder)
weights: dict[str, torch.Tensor] = {}
for path in sorted(folder.glob("*.safetensors")):
    weights |= load_file(path)
plain = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)).bfloat16()
print(plain.load_state_dict(weights))

x = torch.randn(48, 64, generator=torch.Generator().manual_seed(30))
loss = (plain(x.bfloat16()).float() - x[:, :4].sum(1, keepdim=True).tanh()).pow(2).mean()
print(f"loss of step 31: {loss:.4f} by the plain module, {whole['losses'][30]:.4f} in the run that never stopped")
