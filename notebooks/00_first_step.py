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
# # From a plain PyTorch loop to ZeRO-3, in three cells
#
# 1. A loop as everyone writes it.
# 2. The same loop through `ts.initialize`: four lines change, and no number.
# 3. The same again on two ranks, under each ZeRO stage: the losses stay, the memory goes.
#
# Everything runs on a laptop without a GPU, in less than a minute.
#
# ## 1. A plain loop
#
# Six residual blocks learn a sum of curves from 64 examples. Nothing here knows of tritonspeed.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks later, on any machine: so all of it stays on the CPU

import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(1)
STEPS, ROWS, WIDTH = 60, 16, 192


def make_model() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(6)], nn.Linear(WIDTH, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step % 4))
    return x, (2 * x[:, :8]).tanh().sum(1, keepdim=True)


model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
plain_losses = []
for step in range(STEPS):
    x, y = batch(step)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    plain_losses.append(loss.item())

print(f"{sum(p.numel() for p in model.parameters()):,} parameters, loss {plain_losses[0]:.3f} → {plain_losses[-1]:.3f}")

# %% [markdown]
# ## 2. The same loop through `ts.initialize`
#
# The config is DeepSpeed's, as a dict or as the path of a `ds_config.json`. The engine takes over `backward` and
# `step`; the optimizer is named in the config. With one process there is nobody to share with, so this only shows that
# the numbers are the same ones.

# %%
import tritonspeed as ts

CONFIG = {
    "train_batch_size": ROWS,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "weight_decay": 0.0}},
    "zero_optimization": {
        "stage": 3,
        # Sizes in elements, small as this model is: at most two blocks are whole at a time.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 600_000,
        "stage3_max_reuse_distance": 0,
    },
}

engine, optimizer, _, _ = ts.initialize(model=make_model(), config=CONFIG)
engine_losses = []
for step in range(STEPS):
    x, y = batch(step)
    loss = F.mse_loss(engine(x), y)
    engine.backward(loss)
    engine.step()
    engine_losses.append(loss.item())

print(engine.last_step)
difference = max(abs(a - b) for a, b in zip(plain_losses, engine_losses, strict=True))
print(f"largest difference to the plain loop: {difference:.1e}")

# %% [markdown]
# ## 3. Two ranks, four stages
#
# Now a script for two processes, made of the very functions above. Each rank takes half of the rows. What a stage
# holds is computed by `ts.estimate` before anything runs, and read off the engine afterwards.

# %%
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def train(stage: int) -> dict:
    config = {**CONFIG, "zero_optimization": {**CONFIG["zero_optimization"], "stage": stage}}
    model = make_model()
    computed = ts.estimate(model, config, world_size=2)
    engine, *_ = ts.initialize(model=model, config=config)
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(2)[engine.global_rank] for t in batch(step))
        loss = F.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {
        "losses": losses,
        "measured": engine.memory(),
        "measured peak": engine.last_step.peak_bytes,
        "computed": computed.rest_bytes,
        "computed peak": computed.total_peak_bytes,
    }


HEAD = f"""
import json, sys, torch
from torch import Tensor, nn
from torch.nn import functional as F
import tritonspeed as ts

STEPS, ROWS, WIDTH = {STEPS}, {ROWS}, {WIDTH}
CONFIG = {CONFIG!r}
"""
TAIL = """
ts.init_distributed()
result = [train(stage) for stage in range(4)]
with open(f"{sys.argv[1]}/rank{ts.comm.mesh_of().rank}.json", "w") as out:
    json.dump(result, out)
ts.comm.shutdown()
"""
with tempfile.TemporaryDirectory() as folder:
    script = Path(folder) / "two_ranks.py"
    script.write_text("\n\n".join([HEAD, *map(inspect.getsource, (make_model, batch, train)), TAIL]))
    command = ["run", "--num_procs", "2", "--no_local_rank", str(script), folder]
    subprocess.run([sys.executable, "-m", "tritonspeed.cli", *command], check=True)
    first, second = (json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2))

for stage, row in enumerate(first):
    held, needed = sum(row["measured"].values()) / 2**20, row["measured peak"] / 2**20
    print(
        f"stage {stage}: {held:.1f} MiB between steps, {needed:.1f} MiB at the peak of one, loss {row['losses'][-1]!r}"
    )
print("the same bits in all", STEPS, "losses:", all(row["losses"] == first[0]["losses"] for row in first))

# %% [markdown]
# The mean of the two ranks' losses is the loss of the whole batch, so the curve below is the plain loop's.
#
# On the right is what one rank holds between two steps, by category, measured (solid) beside computed (hatched); the
# tick above each bar is the peak inside a step, when gradients and gathered parameters are on their way. At stage 3
# the parameters are still there: they are the masters' shards, half on each rank.

# %%
import matplotlib.pyplot as plt

COLOURS = {"optimizer": "#3b5b92", "gradients": "#e08a3c", "parameters": "#4f9d69", "communication": "#b9bec7"}
shared_losses = [(a + b) / 2 for a, b in zip(first[3]["losses"], second[3]["losses"], strict=True)]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(plain_losses, color="#b9bec7", linewidth=5, label="plain PyTorch, one process")
left.plot(shared_losses, color="#3b5b92", linewidth=1.5, label="ZeRO-3, two ranks")
left.set(xlabel="step", ylabel="loss", yscale="log")
left.legend(frameon=False)

for stage, row in enumerate(first):
    for x, how in ((stage - 0.2, "measured"), (stage + 0.2, "computed")):
        bottom = 0.0
        for name, colour in COLOURS.items():
            height = row[how][name] / 2**20
            look = {"color": colour} if how == "measured" else {"fill": False, "edgecolor": colour, "hatch": "////"}
            label = name if (stage, how) == (0, "measured") and height else None
            right.bar(x, height, 0.36, bottom=bottom, label=label, **look)
            bottom += height
        label = "at the peak of a step" if (stage, how) == (0, "measured") else None
        right.hlines(row[f"{how} peak"] / 2**20, x - 0.18, x + 0.18, color="#2b2f36", label=label)
right.set_xticks(range(4), [f"stage {stage}" for stage in range(4)])
right.set(ylabel="MiB on one rank", ylim=(0, 40))
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go from here
#
# - `engine.explain()` prints the plan: which unit is gathered when, in which dtype, on how many bytes.
# - `tritonspeed check ds_config.json` says what each key of your config does.
# - `make demo` trains a language model this way, on real text.

# %%
print(engine.explain())
