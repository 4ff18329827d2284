"""One checkpoint of ours with something of everything, as two ranks have left it, and what is in it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from handmade import spread, write

from tritonspeed.checkpoint import ParameterFacts

PARAMETERS = {
    "embed.weight": ParameterFacts((37, 13), torch.bfloat16, aliases=("head.weight",)),
    "up.weight": ParameterFacts((27, 13), torch.bfloat16),
    "up.bias": ParameterFacts((27,), torch.bfloat16),
    "scale": ParameterFacts((), torch.float32),
    "none": ParameterFacts((0, 3), torch.bfloat16),
    "old": ParameterFacts((9, 2), torch.bfloat16, trainable=False),
}
BUFFERS = {"mean": torch.arange(3.0).bfloat16(), "count": torch.tensor(7)}
STEP = 12


def values():
    """{kind: {name: flat values}}: masters, moments of all but ``scale``, frozen parameters, and of one parameter
    16-bit values that are not its rounded master."""
    generator = torch.Generator().manual_seed(5)

    def random_of(names, dtype=torch.float32):
        return {n: torch.randn(PARAMETERS[n].shape, generator=generator).reshape(-1).to(dtype) for n in names}

    trained = [n for n, f in PARAMETERS.items() if f.trainable and n != "none"]
    return {
        "master": random_of(trained),
        "exp_avg": random_of([n for n in trained if n != "scale"]),
        "exp_avg_sq": random_of([n for n in trained if n != "scale"], torch.bfloat16),
        "parameters": random_of(["old", "up.bias"], torch.bfloat16),
    }


def state_of(rank: int, accumulated: int = 0):
    """A rank's own; rank 0's has the run's."""
    own = {
        "random": {"torch": torch.arange(5, dtype=torch.uint8) + rank},
        "data": {"position": 4 + rank},
        "client_state": {"rank": rank, "best": float("inf")},
        "buffers": BUFFERS,
    }
    run = {
        "global_steps": STEP, "global_samples": 96, "micro_steps": 24, "skipped_steps": 1, "world": 2,
        "accumulation": 2, "micro_batch": 2, "num_accumulated": accumulated, "optimizer": "AdamW",
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["embed.weight", "up.weight", "up.bias"]},
                         {"lr": 0.2, "betas": (0.9, 0.99), "params": ["scale", "none"]}],
        "scaler": {"dynamic": True, "scale": 64.0, "num_updates": 12, "last_overflow": -1, "hysteresis_left": 2,
                   "num_overflows_in_a_row": 0},
        "scheduler": {"last_batch_iteration": 11}, "client_state": {"best": 3},
    }  # fmt: skip
    return {**own, "run": run} if rank == 0 else own


def make(path: Path, extra=(), accumulated: int = 0) -> Path:
    """Write it to ``path``; ``extra`` are further kinds."""
    ranks = spread({**values(), **dict(extra)}, 2, random.Random(1))
    for number, rank in enumerate(ranks):
        rank.state = state_of(number, accumulated)
        rank.scalars = [({"step": 11.0}, ("embed.weight", "up.weight", "up.bias"))]
    return write(path, PARAMETERS, ranks, step=STEP)
