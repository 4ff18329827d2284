"""The optimizer and scheduler blocks."""

from dataclasses import dataclass
from typing import Any

from tritonspeed.config.keys import key
from tritonspeed.config.optimizers import refused_optimizer


@dataclass(frozen=True)
class Optimizer:
    """DeepSpeed's `optimizer`. `params` is passed on to the optimizer once it is checked."""

    type: str | None = key(
        None,
        "the optimizer, built by name and run on its shards; Adam means AdamW unless adam_w_mode is false",
        refuse=refused_optimizer,
    )
    params: dict[str, Any] = key(
        {}, "its parameters", auto="lr 0.001, betas [0.9, 0.999], eps 1e-8, weight_decay 0 for Adam; else torch's"
    )
    legacy_fusion: bool = key(False, "choice of kernel", inert="one launch updates a flat shard")


@dataclass(frozen=True)
class Scheduler:
    """DeepSpeed's `scheduler`: one of its five learning rate schedules."""

    type: str | None = key(None, "the learning rate schedule, stepped after each optimizer step that was not skipped")
    params: dict[str, Any] = key(
        {}, "its parameters", auto="the schedule's defaults; warmup_max_lr the optimizer's lr; total_num_steps is asked"
    )
