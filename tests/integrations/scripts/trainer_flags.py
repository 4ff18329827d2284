"""The command line of the Trainer scripts: TrainingArguments' flags, as users' scripts take them, and a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser

COMMON = {
    "use_cpu": True,
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
}


@dataclass
class Run:
    """What the scripts take besides TrainingArguments."""

    out: str
    model: str = "llama"
    samples: int = 64
    generate: bool = False
    resume: str = ""
    resize_again: bool = False


def parse(kind: type, run: type = Run) -> tuple[Any, Any]:
    """(the run's own flags, ``kind`` of TrainingArguments), with small defaults."""
    parser = HfArgumentParser((run, kind))
    parser.set_defaults(**COMMON)
    own, settings = parser.parse_args_into_dataclasses()
    settings.output_dir = own.out
    return own, settings
