"""Train a model under a hard limit on memory, in a process of its own: `under_limit.py <folder> [--no-offload]`.

Prints one line of JSON: what `estimate` said before anything was built, and what came of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tritonspeed as ts
from tritonspeed.kernels.host_step import use_host_step

VOCAB, WIDTH, DEPTH, LENGTH, STEPS = 512, 768, 34, 64, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def config(folder: str, offloads: bool) -> dict:
    """Stage 3 in bf16; masters, moments and parameters in files, read and written a million elements at a time."""
    zero: dict = {"stage": 3, "sub_group_size": 2**20, "stage3_max_live_parameters": 20_000_000}
    zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1}
    if offloads:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": folder, "buffer_count": 3}
        zero["offload_param"] = {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "zero_optimization": zero,
    }


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--limit-bytes", type=int, help="instead of the estimate's")
    parser.add_argument("--no-offload", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("tritonspeed").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    use_host_step("chunked")  # a compiler's 140 MiB would be a tenth of the limit, and its 10 s a third of the test's
    with torch.device("meta"):
        model = Model()
    tokens = torch.randint(VOCAB, (1, LENGTH + 1))
    batch = tokens[:, :-1], tokens[:, 1:]
    settings = config(arguments.folder, not arguments.no_offload)
    wanted = ts.estimate(model, settings, 1, inputs=batch, device="cpu")
    limit = arguments.limit_bytes or wanted.resident_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    engine, *_ = ts.initialize(model=model, config=settings)
    built = status_bytes("VmHWM")
    losses = []
    for _ in range(STEPS):
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found = {
        "said": str(wanted).splitlines(),
        "num_parameters": wanted.num_parameters,
        "bound_bytes": wanted.resident_bytes,
        "disk_bytes": wanted.disk_bytes,
        "limit_bytes": limit,
        "built_peak_bytes": built,
        "peak_bytes": status_bytes("VmHWM"),
        "data_bytes": status_bytes("VmData"),
        "files_bytes": sum(f.stat().st_size for f in Path(arguments.folder).rglob("*.safetensors")),
        "losses": losses,
    }
    engine.destroy() if arguments.no_offload else engine.optimizer.late.finish()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
