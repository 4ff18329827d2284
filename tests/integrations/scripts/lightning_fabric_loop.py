"""Fabric with DeepSpeedStrategy: a loop of one's own, a checkpoint in its middle, loaded into another model.

With ``--ddp`` the same loop under Fabric's own DDP: what the numbers are to be.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from plain_gpt import PlainGPT, token_loss, token_rows
from tiny import arguments, record
from torch.utils.data import DataLoader, TensorDataset

args = arguments(package="lightning.fabric", ddp=False, steps=4, accumulation=2).parse_args()
fabric_package = import_module(args.package)
config = json.loads(Path(args.deepspeed).read_text())


def strategy() -> Any:
    """DeepSpeed's, which asks for GPUs: this machine need not have any."""
    if args.ddp:
        return "ddp"
    module = import_module(f"{args.package}.strategies.deepspeed")
    module.CUDAAccelerator = import_module(f"{args.package}.accelerators").CPUAccelerator
    module._validate_device_index_selection = lambda devices: None
    return module.DeepSpeedStrategy(config={**config, "gradient_accumulation_steps": args.accumulation})


fabric = fabric_package.Fabric(accelerator="cpu", devices=2, strategy=strategy())
fabric.launch()


def ready(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    with fabric.init_module() if hasattr(fabric, "init_module") else nullcontext():  # since Lightning 2.1
        model = PlainGPT(tied=True)
    return fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))


def train(model: Any, optimizer: Any, batches: list[Any]) -> list[dict[str, float]]:
    seen = []
    for index, (tokens,) in enumerate(batches):
        loss = token_loss(model(tokens), tokens)
        last = (index + 1) % args.accumulation == 0
        if args.ddp:
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(loss / args.accumulation)
            if last:
                fabric.clip_gradients(model, optimizer, max_norm=config["gradient_clipping"])
                optimizer.step()
                optimizer.zero_grad()
        else:  # DeepSpeed accumulates, clips and zeroes
            fabric.backward(loss, model=model)
            optimizer.step()
        seen.append({"loss": fabric.all_reduce(loss.detach()).item()})
    return seen


def evaluate(model: Any, tokens: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return token_loss(model(tokens), tokens).item()


count = args.steps * args.accumulation * 2
batches = list(fabric.setup_dataloaders(DataLoader(TensorDataset(token_rows(2 * count)), batch_size=2)))
middle = len(batches) // 2
model, optimizer = ready(0)
steps = train(model, optimizer, batches[:middle])
folder = str(Path(args.out) / "fabric.ckpt")
fabric.save(folder, {"model": model, "optimizer": optimizer, "position": middle})
rest = train(model, optimizer, batches[middle:])

again, again_optimizer = ready(1)
state: dict[str, Any] = {"model": again, "optimizer": again_optimizer, "position": 0}
fabric.load(folder, state)
resumed = train(again, again_optimizer, batches[state["position"] :])
if fabric.global_rank == 0:
    Path(args.out).mkdir(exist_ok=True)
valid = token_rows(8, seed=2)
metrics = {"valid_loss": evaluate(again, valid), "position": state["position"], "resumed_the_same": resumed == rest}
if fabric.global_rank == 0:
    record(args.out, steps + rest, **metrics)
torch.distributed.destroy_process_group()
