"""What the TRL scripts share: a tokenizer of 61 words with a chat template, a model in a folder, data, and a record."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from tiny import record, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

WORDS = ["red", "blue", "green", "seven", "nine", "cat", "dog", "tree", "sings", "runs", "sleeps", "why", "then"]
WORDS += [f"w{n}" for n in range(43)]
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'user ' + message['content'] + ' ' }}"
    "{% else %}{{ 'assistant ' }}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT, model_max_length=64, **special)


def saved_model(out: str, seed: int = 0, scores: bool = False) -> str:
    """A folder with a tiny Llama and the tokenizer, as TRL loads models from. One per rank: nobody waits for another.

    Args:
        out: the run's folder.
        seed: of the weights.
        scores: a reward model, with one number per sequence.
    """
    folder = Path(out) / f"model-{seed}-{scores}-{os.environ['RANK']}"
    set_seed(seed)
    # weights that are larger than usual: generation has its favourites, and no rounding changes a sampled word
    config = tiny_config(initializer_range=0.2, **({"num_labels": 1} if scores else {}))
    (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def sentences(count: int, words: int, seed: int) -> list[str]:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, words), generator=generator)
    lengths = torch.randint(max(1, words // 2), words + 1, (count,), generator=generator)
    return [" ".join(WORDS[i] for i in row[:n]) for row, n in zip(picks, lengths, strict=True)]


def settings(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Arguments that every TRL config takes here: four steps, everything logged; gradient checkpointing is TRL's own
    default, and stays."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # where DeepSpeed is told so, its zero.Init finds no other ranks
        deepspeed.init_distributed("gloo")
    common = {"output_dir": args.out, "deepspeed": args.deepspeed, "use_cpu": True, "bf16": False, "report_to": []}
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    rates = {"learning_rate": 1e-2, "warmup_steps": 1, "max_grad_norm": 1.0}
    return {**common, **steps, **rates, "dataloader_pin_memory": False, **changes}


def steps_of(trainer: Any) -> list[dict[str, float]]:
    """Every number that the trainer has logged per step, but for the times."""
    timed = ("epoch", "step_time", "step")
    return [
        {key: float(value) for key, value in entry.items() if key not in timed and value is not None}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def finish(trainer: Any, args: argparse.Namespace, scores: bool = False, **metrics: Any) -> None:
    """Train; save; load what was saved, and record what it computes."""
    trainer.train()
    trainer.save_model(f"{args.out}/saved")
    if trainer.accelerator.process_index == 0:
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        from transformers.integrations import deepspeed as integration

        integration.unset_hf_deepspeed_config()  # an ordinary model again, on this rank alone
        loaded = kind.from_pretrained(f"{args.out}/saved")
        with torch.no_grad():
            logits = loaded(torch.arange(3, 19)[None]).logits
        record(args.out, steps_of(trainer), saved=logits.abs().mean().item(), **metrics)
