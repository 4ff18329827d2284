"""A language model whose training state does not fit in this machine's memory trains here, from files on its disk.

    python examples/bigger_than_memory.py --disk /local_disk/scratch     # as large as memory and disk give a reason for
    python examples/bigger_than_memory.py --parameters 2e6 --steps 5     # the same in seconds

A plain PyTorch transformer reads Python's own sources, byte by byte. Under Adam each parameter needs 16 bytes (fp32
master and two moments, a bf16 parameter, a bf16 gradient): by default as many parameters as need 1.3 times the memory
of the machine. The estimate comes first, with a bound on the memory that this process will have resident; the end
compares. Left in --out: run.json with every loss, time and byte, and memory.png.
"""

import argparse
import json
import math
import os
import random
import shutil
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonspeed as ts

NUM_BYTES = 256  # the vocabulary
STATE_BYTES = 16  # of a parameter: 4 + 4 + 4 of the optimizer, 2 of the model, 2 of its gradient
DISK_BYTES = 26  # of a parameter: both slots of master and moments, and the bf16 parameter
HEAD_SIZE = 64


# The model: RMSNorm, causal attention with rotary positions, GELU; x is [rows, bytes, width] throughout.


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        rows, length, width = x.shape
        query, key, value = self.qkv(x).view(rows, length, 3, -1, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


def rotate(x):
    """Turn pair i of the head's elements at position t by t · 10,000^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10_000 ** -(torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm_attention, self.attention = nn.RMSNorm(width), Attention(width)
        self.norm_mlp = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        self.depth = depth
        self.apply(self.initialise)

    def initialise(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, Block):  # what is added to the stream adds up to as much as there was
            for weight in (module.attention.out.weight, module.down.weight):
                nn.init.normal_(weight, std=(2 * self.depth * weight.shape[1]) ** -0.5)
        if module is self:  # all bytes are as likely at first
            nn.init.normal_(self.head.weight, std=0.1 * self.head.weight.shape[1] ** -0.5)

    def forward(self, tokens, targets):
        """int64 [rows, bytes] each → mean cross-entropy in nats per byte."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def dimensions(num_parameters):
    """(width, depth) of at least so many parameters, 96 times as wide as deep: GPT-3's models are 80 to 130."""
    width = max(HEAD_SIZE, round((8 * num_parameters) ** (1 / 3) / HEAD_SIZE) * HEAD_SIZE)
    return width, max(2, math.ceil((num_parameters - 2 * NUM_BYTES * width) / (12 * width**2)))


# The machine and the text.


def memory_of_machine():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_parameters(disk):
    """State of 1.3 times the memory, where the disk has room for it."""
    wanted, room = 1.3 * memory_of_machine() / STATE_BYTES, 0.95 * shutil.disk_usage(disk).free / DISK_BYTES
    return min(wanted, room)


def read_text(at_most=8_000_000):
    """Python's own sources, uint8."""
    files = sorted(p for p in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in p.parts)
    random.Random(0).shuffle(files)
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) > at_most:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


def batch_of(text, rows, length, step):
    """Inputs and their next bytes, at places that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    windows = torch.stack([text[int(s) : int(s) + length + 1] for s in starts]).long()
    return windows[:, :-1], windows[:, 1:]


class MemoryLog(threading.Thread):
    """What this process has resident, sampled; ``peak_bytes`` is the system's own figure, which misses nothing."""

    def __init__(self, every_s=0.1):
        super().__init__(daemon=True)
        self.every_s, self.samples, self.start_s, self.ended = every_s, [], time.perf_counter(), threading.Event()

    def run(self):
        while not self.ended.wait(self.every_s):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((time.perf_counter() - self.start_s, pages * os.sysconf("SC_PAGE_SIZE")))

    def finish(self):
        self.ended.set()
        self.join()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024

    def highest(self, at_most=1000):
        """So many (seconds, bytes), each the highest of its stretch."""
        stretch = max(1, math.ceil(len(self.samples) / at_most))
        parts = [self.samples[i : i + stretch] for i in range(0, len(self.samples), stretch)]
        return [(round(part[0][0], 2), max(num_bytes for _, num_bytes in part)) for part in parts]


# The run.


def ds_config(args, width, path):
    """What a DeepSpeed user would write: ZeRO-3 with optimizer and parameters on the disk."""
    block = 12 * width**2
    disk = {"device": args.offload, "nvme_path": str(path)}
    return {
        "train_micro_batch_size_per_gpu": args.rows,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": min(1e-3, 0.5 / width), "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": block,  # the next block is read while this one computes
            "stage3_max_live_parameters": 3 * block,
            "stage3_max_reuse_distance": block,
            "offload_optimizer": disk,
            "offload_param": {**disk, "buffer_count": 2, "buffer_size": block, "max_in_cpu": 0},
        },
    }


def size(num_bytes):
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def train(args, log) -> dict[str, Any]:
    width, depth = dimensions(args.parameters)
    config, text = ds_config(args, width, args.disk), read_text()
    with torch.device("meta"):
        shapes = Transformer(width, depth)
    inputs = batch_of(text, args.rows, args.length, 0)
    forecast = ts.estimate(shapes, config, world_size=1, inputs=inputs, tokens=args.rows * args.length)
    state_bytes = STATE_BYTES * forecast.num_parameters
    print(f"{depth} blocks of width {width}; {args.rows} x {args.length} bytes of text a step\n{forecast}")
    print(f"state {size(state_bytes)}, memory of this machine {size(memory_of_machine())}")

    seconds = {"start": time.perf_counter() - log.start_s}
    with ts.zero.Init(config_dict_or_path=config):  # a module's parameters go to the disk as soon as it is made
        model = Transformer(width, depth)
    seconds["built"] = time.perf_counter() - log.start_s
    engine, *_ = ts.initialize(model=model, config=config)
    seconds["initialised"] = time.perf_counter() - log.start_s
    print("seconds after the start: " + ", ".join(f"{name} {when:.1f}" for name, when in seconds.items()), flush=True)

    steps = []
    for step in range(args.steps):
        began = time.perf_counter()
        loss = engine(*batch_of(text, args.rows, args.length, step))
        engine.backward(loss)
        engine.step()
        report = engine.last_step
        assert report is not None, "a step was made"
        took = time.perf_counter() - began
        steps.append({"loss": report.loss, "grad_norm": report.grad_norm, "seconds": took, "links": report.links,
                      "forward_s": report.forward_ms / 1e3, "backward_s": report.backward_ms / 1e3,
                      "step_s": report.step_ms / 1e3, "disk_bytes": report.disk_bytes})  # fmt: skip
        print(f"step {step + 1} · loss {report.loss:.3f} · {took:.1f} s · disk " + ", ".join(
            f"{name.split()[-1]} {num_bytes / 1e9:.2f} GB at {num_bytes / 1e9 / max(busy, 1e-9):.2f} GB/s"
            for name, (num_bytes, busy) in report.links.items()
            if name.startswith("disk")), flush=True)  # fmt: skip
    ts.zero.safe_get_local_fp32_param(model.norm.weight)  # waits for the last update, and until the disk has it
    return {
        "parameters": forecast.num_parameters,
        "width": width,
        "depth": depth,
        "rows": args.rows,
        "length": args.length,
        "machine_bytes": memory_of_machine(),
        "state_bytes": state_bytes,
        "bound_bytes": forecast.resident_bytes,
        "estimated_disk_bytes": forecast.disk_bytes,
        "estimate": str(forecast),
        "config": ds_config(args, width, "/disk"),
        "seconds": seconds,
        "steps": steps,
    }


def draw(run, path):
    """Memory over time with what it stays under, and the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    unit, name = (2**30, "GiB") if run["state_bytes"] > 2**31 else (2**20, "MiB")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(5, 3), layout="constrained")
    left.fill_between(*zip(*((s, b / unit) for s, b in run["samples"]), strict=True), color="#3b5b92", linewidth=0)
    lines = {"state_bytes": ("state of the training", "#e08a3c"), "machine_bytes": ("memory of the machine", "#2b2f36")}
    lines["bound_bytes"] = ("bound printed beforehand", "#4f9d69")
    for key, (label, colour) in lines.items():
        if key != "machine_bytes" or run[key] < 2 * run["state_bytes"]:
            left.axhline(run[key] / unit, color=colour, linewidth=1.4)
            left.annotate(f"{label}, {run[key] / unit:,.1f} {name}", (0.01, run[key] / unit), color=colour, fontsize=9,
                          xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points")  # fmt: skip
    top = max(run["state_bytes"], run["bound_bytes"], run["peak_bytes"])
    left.set(xlabel="seconds", ylabel=f"resident memory, {name}", ylim=(0, 1.15 * top / unit), xlim=(0, None))
    left.set_title(f"{run['parameters'] / 1e6:,.0f} M parameters", loc="left", fontsize=10)
    right.plot(range(1, len(run["steps"]) + 1), [s["loss"] for s in run["steps"]], "o-", color="#3b5b92", markersize=4)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="step", ylabel="loss, nats per byte", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, help="at least so many; by default 1.3 x the memory, of state")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2, help="windows of text a step")
    parser.add_argument("--length", type=int, default=512, help="bytes of a window")
    parser.add_argument("--offload", choices=("nvme", "cpu", "none"), default="nvme")
    parser.add_argument("--disk", type=Path, help="folder for the files; by default one in --out that goes afterwards")
    parser.add_argument("--out", type=Path, default=Path("bigger_than_memory"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ours = args.disk is None
    args.disk = args.disk or args.out / "disk"
    args.disk.mkdir(parents=True, exist_ok=True)
    args.parameters = args.parameters or default_parameters(args.disk)
    torch.manual_seed(0)
    log = MemoryLog()
    log.start()
    try:
        run = train(args, log)
        run |= {"peak_bytes": log.finish(), "samples": log.highest()}
    finally:
        if ours:
            shutil.rmtree(args.disk)
    (args.out / "run.json").write_text(json.dumps(run))
    draw(run, args.out / "memory.png")
    losses = [step["loss"] for step in run["steps"]]
    held = (
        f"peak resident {size(run['peak_bytes'])}, bound {size(run['bound_bytes'])}, state {size(run['state_bytes'])}"
    )
    assert run["peak_bytes"] <= run["bound_bytes"], f"the estimate was wrong: {held}"
    print(f"kept: {held}; loss {losses[0]:.3f} → {losses[-1]:.3f}; {args.out}/run.json, memory.png")


if __name__ == "__main__":
    main()
