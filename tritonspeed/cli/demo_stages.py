"""What each ZeRO stage holds on one rank: a few steps of it, its bytes measured beside the computed ones."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

import tritonspeed as ts
from tritonspeed.cli.demo_model import GPT, next_byte_loss
from tritonspeed.cli.demo_text import Corpus, random_windows
from tritonspeed.comm import Mesh
from tritonspeed.config import Config
from tritonspeed.config.keys import replace_at

NUM_STEPS = 3  # the first is slower than the others, and two are timed
NUM_MICRO_STEPS = 2  # per step, whatever the config says: with one, stages 1 and 2 hold the same bytes


def fresh_model() -> GPT:
    """The same initial values in every run."""
    torch.manual_seed(0)
    return GPT()


def try_stage(config: Config, stage: int, corpus: Corpus, mesh: Mesh) -> dict[str, Any]:
    """A few steps under ``stage``. Collective.

    Returns:
        stage; rest_bytes and peak_bytes, each {"measured": by category, "computed": by category}, of this rank; losses
        of this rank's micro-steps; micro_step_ms.

    Raises:
        ValueError: the config has no optimizer.
    """
    config = _with_micro_steps(replace_at(config, "zero_optimization.stage", stage), mesh.world)
    model = fresh_model()
    computed = ts.estimate(model, config, mesh.world)
    engine, optimizer, _, _ = ts.initialize(model=model, config=config)
    if optimizer is None:
        raise ValueError('the demo trains, and the config has no "optimizer" block: add one')
    losses, times_s = [], []
    for step in range(NUM_STEPS):
        start = time.perf_counter()
        for micro_step in range(NUM_MICRO_STEPS):
            inputs, targets = random_windows(
                corpus.train,
                engine.train_micro_batch_size_per_gpu(),
                model.config.max_bytes,
                seed=(step * NUM_MICRO_STEPS + micro_step) * mesh.world + mesh.rank,
            )
            loss = next_byte_loss(engine(inputs.to(engine.device)), targets.to(engine.device))
            engine.backward(loss)
            losses.append(float(loss.detach()))
            engine.step()
        times_s.append(time.perf_counter() - start)
    last = engine.last_step
    assert last is not None, "the last micro-step ended a step"
    report = {
        "stage": stage,
        "rest_bytes": {"measured": last.bytes_of, "computed": computed.rest_bytes},
        "peak_bytes": {"measured": last.peak_of, "computed": computed.peak_bytes},
        "losses": losses,
        "micro_step_ms": 1e3 * times_s[1] / NUM_MICRO_STEPS,
    }
    engine.destroy()
    del engine, optimizer, model
    gc.collect()
    return report


def _with_micro_steps(config: Config, world: int) -> Config:
    micro_batch = config.resolve(world).train_micro_batch_size_per_gpu
    config = replace_at(config, "train_batch_size", None)
    config = replace_at(config, "train_micro_batch_size_per_gpu", micro_batch)
    return replace_at(config, "gradient_accumulation_steps", NUM_MICRO_STEPS)
