"""Phases as in RLHF: an actor that generates while its states are away, a reference that only answers, a critic.

Policy gradient with a penalty for leaving the reference; the reward is the share of even tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from plain_gpt import PlainGPT, token_rows
from tiny import record
from torch.nn import functional

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out", required=True)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
deepspeed.init_distributed()
rank = dist.get_rank()
config = json.loads(Path(args.deepspeed_config).read_text())


def prepared(seed: int, trained: bool) -> Any:
    torch.manual_seed(seed)
    own = {k: v for k, v in config.items() if trained or k != "optimizer"}
    model = PlainGPT()
    return deepspeed.initialize(model=model, model_parameters=model.parameters() if trained else None, config=own)[0]


def generate(engine: Any, prompts: torch.Tensor, count: int) -> torch.Tensor:
    engine.eval()
    tokens = prompts
    with torch.no_grad():
        for _ in range(count):  # the likeliest token: the same on every machine
            tokens = torch.cat([tokens, engine(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def log_probabilities(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = engine(tokens)[:, :-1].log_softmax(-1)
    return logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)


actor, reference, critic = prepared(0, True), prepared(0, False), prepared(1, True)
steps = []
for step in range(3):
    prompts = token_rows(2, length=4, seed=10 * step + rank)
    if hasattr(critic, "offload_states"):
        critic.offload_states()
    tokens = generate(actor, prompts, 8)
    critic.reload_states()
    with torch.no_grad():
        known = log_probabilities(reference, tokens)
        values = critic(tokens)[:, :-1, 0]
    reward = (tokens[:, 1:] % 2 == 0).float()
    actor.train()
    said = log_probabilities(actor, tokens)
    penalty = (known - said).exp() - (known - said) - 1
    loss = -(said * (reward - values)).mean() + 0.1 * penalty.mean()
    actor.backward(loss)
    actor.step()
    critic.train()
    critic_loss = functional.mse_loss(critic(tokens)[:, :-1, 0], reward)
    critic.backward(critic_loss)
    critic.step()
    both = {"actor": actor, "critic": critic}
    norms = {f"{name}_norm": float(engine.get_global_grad_norm()) for name, engine in both.items()}
    steps.append({"loss": loss.item(), "critic_loss": critic_loss.item(), "penalty": penalty.mean().item(), **norms})
total = torch.tensor([steps[-1]["loss"]])
dist.all_reduce(total, op=dist.ReduceOp.SUM)
if rank == 0:
    record(args.out, steps, total=total.item(), even=reward.mean().item())
