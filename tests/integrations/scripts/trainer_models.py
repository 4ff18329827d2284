"""Tiny models of several families, from their configs alone; seed before."""

from __future__ import annotations

from typing import Any

import deepspeed
from tiny import VOCABULARY, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a model of 20 to 40 thousand parameters.

    Args:
        family: "llama", "gpt2" (its head is its embedding), "mixtral" (mixture of experts), "bert", "t5" or "bart".
        changes: to the config.
    """
    if family == "llama":
        return tiny_config(**changes)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2Config(**{**_TOKENS, **sizes, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **changes})
    if family == "mixtral":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralConfig(**{**_TOKENS, **sizes, **heads, **changes})
    if family == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertConfig(**{**_TOKENS, **sizes, **dropout, "num_attention_heads": 2, "num_labels": 3, **changes})
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        return T5Config(**{**_TOKENS, **sizes, "decoder_start_token_id": 0, **changes})
    assert family == "bart", family
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    return BartConfig(**{**_TOKENS, **sizes, **heads, "dropout": 0.0, "decoder_start_token_id": 2, **changes})


def kind_of(family: str) -> Any:
    """The Auto class of a family."""
    if family == "bert":
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if family in ("t5", "bart") else AutoModelForCausalLM


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model with the weights that it starts with; built under zero.Init at stage 3."""
    if not deepspeed.comm.is_initialized():  # Accelerate on a CPU starts a group of which real DeepSpeed is not told
        deepspeed.init_distributed()
    return kind_of(family).from_config(config_of(family, **changes))
