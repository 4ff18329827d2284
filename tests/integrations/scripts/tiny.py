"""What the scripts of this folder share: tiny models and data made from a config and a seed, and a record of the run.

The scripts say `deepspeed` where they say anything: they run as they are under real DeepSpeed and under tritonspeed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # scripts without Hugging Face run where it is not installed
    from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def arguments(**more: Any) -> argparse.ArgumentParser:
    """What every script takes: its ds_config.json, and a folder to write to. `more` are flags with their defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", help="path of the ds_config.json")
    parser.add_argument("--out", required=True, help="folder of what the script writes; record.json is the figures")
    parser.add_argument("--local_rank", type=int, default=0)
    for name, default in more.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of 30 thousand parameters; seed before."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_config(**changes))


def tiny_config(**changes: Any) -> LlamaConfig:
    """Its config."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes})


def token_samples(count: int, length: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """(length,) random tokens, each its own label."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def steps_of(trainer: Any) -> list[dict[str, float]]:
    """What a Trainer has logged step by step."""
    kept = ("loss", "grad_norm", "learning_rate")
    return [
        {key: float(entry[key]) for key in kept if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def record(out: str, steps: list[dict[str, float]], **metrics: Any) -> None:
    """Write the figures of the run; call it on rank 0.

    Args:
        out: the folder.
        steps: one dict per optimizer step: loss, grad_norm, learning_rate, ...
        metrics: single figures of the whole run: eval_loss, ...
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "record.json").write_text(json.dumps({"steps": steps, "metrics": metrics}, indent=1))
