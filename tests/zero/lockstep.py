"""The same training twice: plain PyTorch in one process with every rank's data, and sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import Net, batch
from torch import Tensor, nn

import tritonspeed as ts

CLIP = 0.5
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "ours": lambda parameters: ts.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01),
    "rounded": lambda parameters: ts.optim.AdamW(parameters, lr=1e-2, stochastic_rounding=True),
    "8bit": lambda parameters: ts.optim.AdamW(parameters, lr=1e-2, state="8bit"),
    "lion": lambda parameters: ts.optim.Lion(parameters, lr=1e-3),
    "adagrad": lambda parameters: ts.optim.Adagrad(parameters, lr=1e-2),
    "lamb": lambda parameters: ts.optim.Lamb(parameters, lr=1e-2, weight_decay=0.01),
    "muon": lambda parameters: ts.optim.Muon(parameters, muon_lr=0.02, adam_lr=1e-2),
    "muon in fp32": lambda parameters: ts.optim.Muon(parameters, muon_lr=0.02, adam_lr=1e-2, ns_dtype="fp32"),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def options(**given: Any) -> ts.zero.ShardOptions:
    """Options that shard everything; keywords of ``Limits`` go there."""
    limits = {
        k: given.pop(k) for k in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance") if k in given
    }
    return ts.zero.ShardOptions(**{"param_persistence_threshold": 0, **given, "limits": ts.zero.Limits(**limits)})


def plain_training(
    world: int,
    steps: int,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float32,
    make: Callable[[], nn.Module] = Net,
    optimizer: str = "adamw",
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """(mean losses, gradient norms, final masters) of ``steps`` steps over the data of all ``world`` ranks.

    16-bit dtypes keep fp32 masters; each rank's gradient is computed in the dtype, the sum over ranks in fp32.
    """
    torch.manual_seed(0)
    model = make()
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in model.named_parameters()}
    stepper = OPTIMIZERS[optimizer](masters.values())
    model.to(dtype)
    losses, norms = [], []
    for step in range(steps):
        total = {n: torch.zeros_like(m) for n, m in masters.items()}
        mean = 0.0
        for micro in range(accumulation):
            for rank in range(world):
                loss = model(*batch(rank, step * accumulation + micro))
                (loss / accumulation).backward()
                mean += loss.item() / (world * accumulation)
                for n, p in model.named_parameters():
                    total[n] += p.grad.float()
                model.zero_grad()
        for n, master in masters.items():
            master.grad = total[n] / world
        norms.append(nn.utils.clip_grad_norm_(masters.values(), CLIP).item())
        stepper.step()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(masters[n])
        losses.append(mean)
    return losses, norms, {n: m.detach() for n, m in masters.items()}


def sharded_training(
    stage: int,
    steps: int,
    accumulation: int = 1,
    precision: str | None = None,
    given: dict[str, Any] | None = None,
    make: Callable[[], nn.Module] = Net,
    optimizer: str = "ours",
) -> tuple[list[float], list[float], dict[str, Tensor | None]]:
    """What ``plain_training`` returns, of this rank in a sharded run (losses are the mean over ranks)."""
    torch.manual_seed(0)
    model = make()
    inner = OPTIMIZERS[optimizer](model.parameters())
    model, stepper = ts.zero.shard(model, inner, stage, precision, CLIP, options(**(given or {})))
    reducer = model._tritonspeed.reducer
    reducer.num_accumulated = accumulation
    losses, norms = [], []
    for step in range(steps):
        mean = torch.zeros((), dtype=torch.float64)
        for micro in range(accumulation):
            reducer.sending = model._tritonspeed.stage.shards_gradients or micro == accumulation - 1
            loss = model(*batch(dist.get_rank(), step * accumulation + micro))
            (loss / accumulation).backward()
            mean += loss.detach().double() / accumulation
        stepper.step()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        norms.append(stepper.last.grad_norm)
    masters = {n: ts.zero.safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
    return losses, norms, masters
