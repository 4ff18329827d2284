"""From a Hugging Face ``config.json`` to the names and shapes of the checkpoint's tensors; no library, no network.

Families: decoders like Llama (Mistral, Qwen 2 and 3, Gemma, Phi-3, OLMo, and their mixtures of experts), GPT-2,
GPT-NeoX, OPT, BERT and RoBERTa. A family that is not known but names its sizes is taken for Llama's or
GPT-NeoX's, and ``assumed`` says so. Experts are one tensor for all of a block's, (E, out, in), as they are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tensors = dict[str, tuple[int, ...]]

_NAMES = {  # ours → the key in a config.json, the first that is there
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_used": ("num_experts_per_tok",),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size",),
    "token_types": ("type_vocab_size",),
    "embedding": ("word_embed_proj_dim",),
}
_NEEDED = ("hidden", "layers", "vocab")
_FOREIGN = {  # blocks of another make, which a formula for the usual ones would miss by far
    "kv_lora_rank": "latent attention",
    "ssm_cfg": "state-space blocks",
    "state_size": "state-space blocks",
    "is_encoder_decoder": "an encoder and a decoder",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a transformer, in elements.

    Attributes:
        family: the ``model_type``.
        hidden, layers, heads, kv_heads, head_dim, ffn, vocab, positions: as everywhere.
        experts, experts_used, expert_ffn: routed experts of a block, those that a token meets, their inner width; 0
            where there are none.
        shared_ffn: inner width of the expert that every token meets; 0 where there is none.
        token_types, embedding: kinds of sentence (BERT); width of the embedding, where it is not ``hidden`` (OPT).
        tied: the head is the embedding.
        assumed: what was not said and so assumed, in words; empty where nothing was.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    token_types: int = 0
    embedding: int = 0
    tied: bool = False
    assumed: str = ""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Sizes:
        """The sizes in a config.json.

        Raises:
            ValueError: a size is missing or no positive whole number, or the blocks are of another make.
        """
        config = config.get("text_config") or config  # models of text and images keep the decoder one level down
        foreign = next((what for key, what in _FOREIGN.items() if config.get(key)), None)
        family = str(config.get("model_type") or "")
        if foreign is not None:
            raise ValueError(
                f"config of {family or 'a model'}: {foreign}, whose tensors no formula here gives: pass the folder with"
                " its safetensors, the module itself (built on the meta device), or params=7e9"
            )
        found = {ours: next((config[k] for k in keys if config.get(k)), None) for ours, keys in _NAMES.items()}
        for name, value in found.items():
            if name in _NEEDED and value is None:
                raise ValueError(f"config names no {_NAMES[name][0]}: a model's shape needs {_spell(_NEEDED)}")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"config: {_NAMES[name][0]} is {value!r}, must be a whole number of at least 1")
        sizes: dict[str, int] = {name: value for name, value in found.items() if value is not None}
        assumed = [] if family in TENSORS_OF else [f"blocks like {_nearest(config)}'s ({family or 'no model_type'})"]
        family = family if family in TENSORS_OF else _nearest(config)
        sizes.setdefault("heads", max(1, sizes["hidden"] // 128))
        sizes.setdefault("kv_heads", 1 if config.get("multi_query") else sizes["heads"])
        sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
        if "ffn" not in sizes and "expert_ffn" not in sizes:
            sizes["ffn"] = 4 * sizes["hidden"]
            assumed += [] if family == "gpt2" else ["an inner width of 4 × hidden"]
        sizes.setdefault("ffn", sizes.get("expert_ffn", 0))
        if sizes.get("experts", 0) > 0:
            sizes.setdefault("expert_ffn", sizes["ffn"])
            sizes.setdefault("experts_used", 2)
        tied = config.get("tie_word_embeddings")
        return cls(family, **sizes, tied=family in _TIED if tied is None else bool(tied), assumed=", ".join(assumed))


def _spell(names: tuple[str, ...]) -> str:
    return ", ".join(_NAMES[name][0] for name in names)


def _nearest(config: Mapping[str, Any]) -> str:
    """The family that an unknown config resembles: RMS norms and gates are Llama's."""
    gated = "rms_norm_eps" in config or config.get("hidden_act") in ("silu", "swish")
    return "llama" if gated else "gpt_neox"


def _linear(name: str, out: int, into: int, bias: bool = False) -> Tensors:
    found: Tensors = {f"{name}.weight": (out, into)}
    return found | {f"{name}.bias": (out,)} if bias else found


def _norm(name: str, width: int, bias: bool = False) -> Tensors:
    found: Tensors = {f"{name}.weight": (width,)}
    return found | {f"{name}.bias": (width,)} if bias else found


def _blocks(prefix: str, sizes: Sizes, block: Callable[[int], Tensors]) -> Tensors:
    return {f"{prefix}.{i}.{name}": shape for i in range(sizes.layers) for name, shape in block(i).items()}


def _llama(s: Sizes, config: Mapping[str, Any]) -> Tensors:
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    out_bias = bool(config.get("attention_bias"))
    in_bias = out_bias or s.family.startswith("qwen2")
    head_norms = s.family.startswith(("qwen3", "gemma3"))
    num_dense = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or 1

    def feed_forward(i: int) -> Tensors:
        if not s.experts or i < num_dense or (i + 1) % step or i in (config.get("mlp_only_layers") or ()):
            names = {"gate_proj": (s.ffn, s.hidden), "up_proj": (s.ffn, s.hidden), "down_proj": (s.hidden, s.ffn)}
            bias = bool(config.get("mlp_bias"))
            return {k: v for name, shape in names.items() for k, v in _linear(f"mlp.{name}", *shape, bias).items()}
        found: Tensors = {
            "mlp.gate.weight": (s.experts, s.hidden),
            "mlp.experts.gate_up_proj": (s.experts, 2 * s.expert_ffn, s.hidden),
            "mlp.experts.down_proj": (s.experts, s.hidden, s.expert_ffn),
        }
        if s.shared_ffn:
            found |= {f"mlp.shared_expert.{name}.weight": (s.shared_ffn, s.hidden) for name in ("gate_proj", "up_proj")}
            found["mlp.shared_expert.down_proj.weight"] = (s.hidden, s.shared_ffn)
            found["mlp.shared_expert_gate.weight"] = (1, s.hidden)
        return found

    def block(i: int) -> Tensors:
        found = _linear("self_attn.q_proj", queries, s.hidden, in_bias)
        found |= _linear("self_attn.k_proj", keys, s.hidden, in_bias)
        found |= _linear("self_attn.v_proj", keys, s.hidden, in_bias)
        found |= _linear("self_attn.o_proj", s.hidden, queries, out_bias)
        if head_norms:
            found |= _norm("self_attn.q_norm", s.head_dim) | _norm("self_attn.k_norm", s.head_dim)
        found |= feed_forward(i) | _norm("input_layernorm", s.hidden) | _norm("post_attention_layernorm", s.hidden)
        if s.family in ("gemma2", "gemma3", "gemma3_text"):
            found |= _norm("pre_feedforward_layernorm", s.hidden) | _norm("post_feedforward_layernorm", s.hidden)
        return found

    outside = {"model.embed_tokens.weight": (s.vocab, s.hidden)}
    return outside | _blocks("model.layers", s, block) | _norm("model.norm", s.hidden)


def _gpt2(s: Sizes, config: Mapping[str, Any]) -> Tensors:
    block = _norm("ln_1", s.hidden, True) | _norm("ln_2", s.hidden, True)
    wide = {"attn.c_attn": 3 * s.hidden, "attn.c_proj": s.hidden, "mlp.c_fc": s.ffn}
    for name, out in wide.items():  # stored (in, out)
        block |= {f"{name}.weight": (s.hidden, out), f"{name}.bias": (out,)}
    block |= {"mlp.c_proj.weight": (s.ffn, s.hidden), "mlp.c_proj.bias": (s.hidden,)}
    outside = {"transformer.wte.weight": (s.vocab, s.hidden), "transformer.wpe.weight": (s.positions, s.hidden)}
    return outside | _blocks("transformer.h", s, lambda i: block) | _norm("transformer.ln_f", s.hidden, True)


def _neox(s: Sizes, config: Mapping[str, Any]) -> Tensors:
    block = _linear("attention.query_key_value", 3 * s.hidden, s.hidden, True)
    block |= _linear("attention.dense", s.hidden, s.hidden, True)
    block |= _linear("mlp.dense_h_to_4h", s.ffn, s.hidden, True) | _linear("mlp.dense_4h_to_h", s.hidden, s.ffn, True)
    block |= _norm("input_layernorm", s.hidden, True) | _norm("post_attention_layernorm", s.hidden, True)
    outside = {"gpt_neox.embed_in.weight": (s.vocab, s.hidden)}
    return outside | _blocks("gpt_neox.layers", s, lambda i: block) | _norm("gpt_neox.final_layer_norm", s.hidden, True)


def _opt(s: Sizes, config: Mapping[str, Any]) -> Tensors:
    block: Tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= _linear(f"self_attn.{name}", s.hidden, s.hidden, True)
    block |= _linear("fc1", s.ffn, s.hidden, True) | _linear("fc2", s.hidden, s.ffn, True)
    block |= _norm("self_attn_layer_norm", s.hidden, True) | _norm("final_layer_norm", s.hidden, True)
    width = s.embedding or s.hidden
    offset = 2  # rows that OPT keeps before the first position
    found = {
        "model.decoder.embed_tokens.weight": (s.vocab, width),
        "model.decoder.embed_positions.weight": (s.positions + offset, s.hidden),
    }
    if width != s.hidden:
        found |= _linear("model.decoder.project_in", s.hidden, width)
        found |= _linear("model.decoder.project_out", width, s.hidden)
    if config.get("do_layer_norm_before", True):
        found |= _norm("model.decoder.final_layer_norm", s.hidden, True)
    return found | _blocks("model.decoder.layers", s, lambda i: block)


def _bert(s: Sizes, config: Mapping[str, Any]) -> Tensors:
    block: Tensors = {}
    for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        block |= _linear(name, s.hidden, s.hidden, True)
    block |= _linear("intermediate.dense", s.ffn, s.hidden, True) | _linear("output.dense", s.hidden, s.ffn, True)
    block |= _norm("attention.output.LayerNorm", s.hidden, True) | _norm("output.LayerNorm", s.hidden, True)
    found = {
        "embeddings.word_embeddings.weight": (s.vocab, s.hidden),
        "embeddings.position_embeddings.weight": (s.positions, s.hidden),
        "embeddings.token_type_embeddings.weight": (s.token_types or 2, s.hidden),
    }
    found |= _norm("embeddings.LayerNorm", s.hidden, True)
    return found | _blocks("encoder.layer", s, lambda i: block) | _linear("pooler.dense", s.hidden, s.hidden, True)


_LLAMAS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3",
    "gemma3_text", "phi3", "olmo", "olmoe",
)  # fmt: skip
TENSORS_OF: dict[str, Callable[[Sizes, Mapping[str, Any]], Tensors]] = {
    **dict.fromkeys(_LLAMAS, _llama),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "opt": _opt,
    "bert": _bert,
    "roberta": _bert,
}
_TIED = ("gpt2", "opt", "gemma", "gemma2", "gemma3", "gemma3_text")  # where a config does not say
_HEADLESS = ("bert", "roberta")


def tensors_of(config: Mapping[str, Any]) -> tuple[Sizes, Tensors, dict[str, str]]:
    """What a checkpoint of a config holds.

    Args:
        config: a config.json as a dict.

    Returns:
        (the sizes; name → shape of every tensor; name → name of those that are another one).

    Raises:
        ValueError: see ``Sizes.read``.
    """
    sizes = Sizes.read(config)
    found = TENSORS_OF[sizes.family](sizes, config.get("text_config") or config)
    if sizes.family in _HEADLESS:
        return sizes, found, {}
    embedding = next(iter(found))
    head = "embed_out.weight" if sizes.family == "gpt_neox" else "lm_head.weight"
    if sizes.tied:
        return sizes, found, {head: embedding}
    return sizes, found | {head: found[embedding]}, {}
