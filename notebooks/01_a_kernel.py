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
# # One kernel, from its maths to the roofline
#
# LayerNorm: what it computes, how the kernel reads its rows, what compilers made of it for four GPUs that need not be
# here, how exact it is, and how fast it can be at best. Without a GPU it takes less than a minute; with one, the last
# cell also measures.
#
# ## 1. The maths
#
# Each row of $x$ is brought to mean 0 and variance 1, then scaled and shifted:
#
# $$y = \hat x \, w + b \qquad \hat x = (x - \bar x)\, r \qquad
# r = \frac{1}{\sqrt{\overline{(x - \bar x)^2} + \epsilon}}$$
#
# With $h = g\,w$, $g$ the gradient of $y$, the chain rule through $\bar x$ and $r$ leaves two means per row:
#
# $$dx = r\,\big(h - \hat x\,\overline{h \hat x} - \overline{h}\big) \qquad
# dw = \sum_{rows} g\,\hat x \qquad db = \sum_{rows} g$$
#
# In PyTorch, both ways:

# %%
import torch
from torch import Tensor


def forward(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * r * w + b, centred * r, r


def backward(g: Tensor, x_hat: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = g * w
    dx = r * (h - x_hat * (h * x_hat).mean(-1, keepdim=True) - h.mean(-1, keepdim=True))
    return dx, (g * x_hat).sum(0), g.sum(0)


torch.manual_seed(0)
x, g = torch.randn(2, 32, 1001, dtype=torch.float64)
w, b = torch.randn(2, 1001, dtype=torch.float64)
y, x_hat, r = forward(x, w, b)

leaves = [t.clone().requires_grad_() for t in (x, w, b)]
theirs = torch.nn.functional.layer_norm(leaves[0], (1001,), *leaves[1:])
wanted = torch.autograd.grad(theirs, leaves, g)
print("y:", (y - theirs).abs().max().item())
for name, ours, known in zip(("dx", "dw", "db"), backward(g, x_hat, r, w), wanted, strict=True):
    print(f"{name}:", (ours - known).abs().max().item())

# %% [markdown]
# ## 2. The kernel
#
# Nothing here is worth a matrix instruction: 8 operations an element against 4 bytes moved, so memory is what counts.
# One program holds a row in registers (several, where they are short), so each element crosses the bus once, and
# accesses are 16 bytes wide. For a row of 1001 elements that takes some care: rows begin anywhere between two
# 16-byte boundaries, so a row is read as a *body* of whole vectors, and *edges* of up to seven elements beside it.

# %%
import inspect

from tritonspeed.kernels import norm_rows

print(inspect.getsource(norm_rows._norm_forward_kernel.fn))

# %% [markdown]
# A function around it makes the outputs, asks which configuration this card takes for this shape, and launches:

# %%
print(inspect.getsource(norm_rows.launch_norm_forward))

# %% [markdown]
# ## 3. What the compiler made of it
#
# Triton's wheel carries the assemblers of NVIDIA and AMD. A launch is recorded instead of carried out, then compiled
# for any card: an A100, an H100, an RTX 5090 and an MI300X. *Registers* bound how many threads share a
# multiprocessor, a *spill* would send them to memory, and *loads* are those from global memory: bytes → instructions.
# The 2-byte ones at odd lengths are the edges, and the weights, which come out of the cache.

# %%
from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.machine_code import machine_code
from tritonspeed.kernels.norm_gradients import Wanted, launch_norm_backward
from tritonspeed.kernels.norm_rows import Norm, launch_norm_forward


def launch_both(rows: int, n: int, dtype: torch.dtype) -> None:
    x, statistics, norm = torch.empty(rows, n, dtype=dtype), torch.empty(rows), Norm(True, 1e-5, 0.0, 0.0)
    weight, bias = torch.empty(2, n, dtype=dtype)
    launch_norm_forward(x, None, weight, bias.clone(), None, norm)
    wanted = Wanted(dx=dtype, dresidual=None, parameters=True, has_residual=False)
    launch_norm_backward(x, None, x, weight, bias.clone(), None, statistics, statistics, norm, wanted)


lines = [f"{'N':>5} {'card':8} {'kernel':14} {'warps':>5} {'registers':>9} {'spills':>6} {'shared KiB':>10}  loads"]
for n in (4096, 1001):
    for card in ("sm_80", "sm_90", "sm_120", "gfx942"):
        with recording(CARDS[card]) as launches:
            launch_both(512, n, torch.bfloat16)
        for launched in launches:
            code = machine_code(launched, CARDS[card])
            kernel = launched.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            loads = ", ".join(f"{width}: {count}" for width, count in sorted(code.loads.items(), reverse=True))
            lines.append(
                f"{n:5} {card:8} {kernel:14} {launched.options['num_warps']:5} {code.registers:9}"
                f" {code.spilled_bytes:6} {code.shared_bytes / 1024:10.1f}  {loads}"
            )
print("\n".join(lines))

# %% [markdown]
# ## 4. How exact it is
#
# The largest error of $y$ against fp64 on the same inputs, beside PyTorch's own, for rows with mean 100. Where there is
# no GPU, Triton's interpreter runs the kernel, in a process of its own: a kernel is interpreted or compiled from the
# moment it is defined.

# %%
import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt

LENGTHS = [5, 17, 64, 257, 1001, 4096, 8193, 20001]
MEASURE = f"""
import json, torch, torch.nn.functional as F
from tritonspeed.kernels import layer_norm
device, found = "cuda" if torch.cuda.is_available() else "cpu", []
for n in {LENGTHS}:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(n)
        x, w, b = (torch.randn(4, n) + 100).to(device, dtype), *torch.randn(2, n).to(device, dtype)
        exact = F.layer_norm(x.double(), (n,), w.double(), b.double())
        ours, theirs = layer_norm(x, w, b), F.layer_norm(x, (n,), w, b)
        found.append([n, str(dtype), *[(y - exact).abs().max().item() for y in (ours, theirs)]])
print(json.dumps(found))
"""
interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
done = subprocess.run([sys.executable, "-c", MEASURE], env=os.environ | interpret, capture_output=True, text=True)
found = json.loads(done.stdout.splitlines()[-1])

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for dtype, colour in (("float32", "C0"), ("bfloat16", "C1")):
    rows = [row for row in found if row[1] == f"torch.{dtype}"]
    axes.loglog([row[0] for row in rows], [row[2] for row in rows], "o-", color=colour, label=f"{dtype}, kernel")
    axes.loglog([row[0] for row in rows], [row[3] for row in rows], "x--", color=colour, label=f"{dtype}, PyTorch")
axes.set(xlabel="columns", ylabel="largest error of y", title="against fp64, rows of mean 100")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## 5. How fast it can be
#
# The bytes that any implementation must move: forward reads $x$ and writes $y$; backward reads $g$ and $x$ and writes
# $dx$. The statistics and weights are next to nothing. Divided by a card's bandwidth (its datasheet's) that is the
# floor; 85 % of the bandwidth is what the forward aims at, 70 % the backward, to 8192 columns. Beyond 16384 the
# gradients of the weights do not fit in registers beside a row: the backward reads twice, and 60 % is its ceiling.

# %%
BANDWIDTH = {"A100 80 GB": 2.04e12, "H100 SXM": 3.35e12, "RTX 5090": 1.79e12, "MI300X": 5.3e12}  # bytes a second


def seconds(card: str, elements: int, passes: int, itemsize: int = 2) -> float:
    return elements * passes * itemsize / BANDWIDTH[card]


print(f"8192 rows of 4096 in bf16:  {'forward µs':>10} {'backward µs':>12}")
for card in BANDWIDTH:
    times = [seconds(card, 8192 * 4096, passes) * 1e6 for passes in (2, 3)]
    print(f"{card:26}  {times[0]:10.1f} {times[1]:12.1f}")

sizes = [2**k for k in range(9, 18)]
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for card in BANDWIDTH:
    axes.loglog(sizes, [seconds(card, 8192 * n, 3) * 1e6 for n in sizes], label=card)
axes.set(xlabel="columns", ylabel="µs at full bandwidth", title="backward, 8192 rows, bf16: the floor")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## 6. The tuning curve
#
# On a GPU: every configuration that the tuner would try, timed, from the fastest to the slowest; the dashed line is
# what the heuristic chose without timing anything.

# %%
if torch.cuda.is_available():
    import triton

    from tritonspeed.kernels import layer_norm
    from tritonspeed.kernels._triton import card_of
    from tritonspeed.kernels.norm_rows import NORM_FORWARD
    from tritonspeed.kernels.tuned import listening

    x, (w, b) = torch.randn(8192, 4096, device="cuda").bfloat16(), torch.randn(2, 4096, device="cuda").bfloat16()
    decisions = []
    with listening(lambda tunable, card, features: decisions.append(features)):
        layer_norm(x, w, b)

    def share(how) -> float:
        with NORM_FORWARD.pinned(how):
            milliseconds = triton.testing.do_bench(lambda: layer_norm(x, w, b))
        return 2 * x.numel() * x.element_size() / (milliseconds * 1e-3) / 1e12

    candidates = NORM_FORWARD.candidates(card_of(x), **decisions[0])
    curve = sorted((share(how) for how in candidates), reverse=True)
    heuristic = share(NORM_FORWARD.heuristic(card_of(x), **decisions[0]))
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(curve, "o-")
    axes.axhline(heuristic, linestyle="--", color="C1", label="heuristic")
    axes.set(xlabel="configuration", ylabel="TB/s", title=f"{torch.cuda.get_device_name()}, 8192 × 4096, bf16, forward")
    axes.legend()
    plt.show()
else:
    print("No GPU here: nothing was timed.")
