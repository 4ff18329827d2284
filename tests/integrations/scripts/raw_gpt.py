"""A GPT as DeepSpeed's guides train one: built under zero.Init, with its own optimizer and schedule, looked into."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from plain_gpt import PlainGPT, token_loss, token_rows
from tiny import record

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out", required=True)
parser.add_argument("--optimizer", default="cpu", choices=["cpu", "fused", "torch"])
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
deepspeed.init_distributed()
rank, world = dist.get_rank(), dist.get_world_size()
config = json.loads(Path(args.deepspeed_config).read_text())
deepspeed.checkpointing.configure(None, deepspeed_config=args.deepspeed_config)


def build(seed: int) -> Any:
    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = PlainGPT(call=deepspeed.checkpointing.checkpoint)
    with deepspeed.zero.GatheredParameters(model.head.weight, modifier_rank=0):
        if rank == 0:
            torch.nn.init.normal_(model.head.weight, std=0.02)
    decayed = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    chosen = {"cpu": DeepSpeedCPUAdam, "fused": FusedAdam, "torch": torch.optim.AdamW}[args.optimizer]
    optimizer = chosen(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = WarmupLR(optimizer, warmup_min_lr=0, warmup_max_lr=3e-3, warmup_num_steps=3, warmup_type="linear")
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def train(engine: Any, first: int, count: int) -> list[dict[str, float]]:
    steps = []
    for step in range(first, first + count):
        engine.train()
        gradient = loss = torch.zeros(())
        for micro in range(engine.gradient_accumulation_steps()):
            tokens = token_rows(2, seed=1000 * step + 10 * micro + rank).to(engine.device)
            loss = token_loss(engine(tokens), tokens)
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                gradient = safe_get_full_grad(engine.module.blocks[0].out.weight)
            engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        state = safe_get_full_optimizer_state(engine.module.blocks[0].out.weight, "exp_avg")
        whole = safe_get_full_fp32_param(engine.module.head.weight)
        steps.append(
            {
                "loss": mean.item() / world,
                "grad_norm": float(engine.get_global_grad_norm()),
                "learning_rate": engine.get_lr()[0],
                "gradient": gradient.double().norm().item(),
                "exp_avg": state.double().norm().item(),
                "head": whole.double().norm().item(),
            }
        )
    return steps


def evaluate(engine: Any) -> float:
    engine.eval()
    tokens = token_rows(8, seed=7).to(engine.device)
    with torch.no_grad():
        return token_loss(engine(tokens), tokens).item()


engine = build(0)
steps = train(engine, 0, 3)
engine.save_checkpoint(args.out, tag="three", client_state={"step": 3, "words": ["a", "b"]})
steps += train(engine, 3, 2)
metrics: dict[str, Any] = {"eval_loss": evaluate(engine), "type": engine.zero_optimization_stage()}

again = build(1)
path, client_state = again.load_checkpoint(args.out)
metrics |= {"client_step": client_state["step"], "words": client_state["words"], "tag_in_path": "three" in path}
resumed = train(again, 3, 2)
metrics["resumed"] = [step["loss"] for step in resumed]
metrics["eval_loss_resumed"] = evaluate(again)
dist.barrier()
if rank == 0:
    record(args.out, steps, **metrics)
