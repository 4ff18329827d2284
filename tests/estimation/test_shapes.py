"""Shapes of models: counts that are published, whatever they are read from."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.zero.plan import plan_units

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
MIXTRAL = LLAMA | {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
}  # fmt: skip
PUBLISHED = {  # elements of the checkpoints that their makers published
    "Llama 3.1 8B": (LLAMA, 8_030_261_248),
    "Llama 2 7B": (LLAMA | {"intermediate_size": 11008, "vocab_size": 32000, "num_key_value_heads": 32}, 6_738_415_616),
    "Mistral 7B": (LLAMA | {"model_type": "mistral", "vocab_size": 32000}, 7_241_732_096),
    "Mixtral 8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen2.5 7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944,
         "vocab_size": 152064, "num_attention_heads": 28, "num_key_value_heads": 4}, 7_615_616_512),
    "Qwen3 8B": (
        {"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288,
         "vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}, 8_190_735_360),
    "Qwen3 30B-A3B": (QWEN3_MOE, 30_532_122_624),
    "Qwen1.5 MoE": (
        {"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632,
         "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
         "num_experts_per_tok": 4, "vocab_size": 151936, "num_attention_heads": 16}, 14_315_784_192),
    "Gemma 2 2B": (
        {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216,
         "vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}, 2_614_341_888),
    "GPT-2": (GPT2, 124_439_808),
    "Pythia 6.9B": (
        {"model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 16384,
         "num_attention_heads": 32, "vocab_size": 50432, "tie_word_embeddings": False}, 6_857_302_016),
    "OPT 350M": (
        {"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096, "num_attention_heads": 16,
         "max_position_embeddings": 2048, "vocab_size": 50272, "word_embed_proj_dim": 512,
         "do_layer_norm_before": False}, 331_196_416),
    "BERT base": (
        {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
         "num_attention_heads": 12, "max_position_embeddings": 512, "vocab_size": 30522, "type_vocab_size": 2},
        109_482_240),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_gives_the_published_count(name):
    config, want = PUBLISHED[name]
    shape = ModelShape.of(config)
    assert shape.num_params == want
    module = shape.build()
    assert sum(p.numel() for p in module.parameters()) == want  # a tied head counts once
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize(("config", "active"), [(MIXTRAL, 12_879_925_248), (QWEN3_MOE, 3_353_032_704)])
def test_a_token_meets_only_its_experts(config, active):
    assert ModelShape.of(config).num_active_params == active  # "12.9 B", "A3B"


def test_the_stand_in_has_the_units_of_the_model():
    shape = ModelShape.of(LLAMA)
    units = {unit.name: sum(p.numel() for _, p in unit.parameters) for unit in plan_units(shape.build())}
    assert [name for name in units if name.startswith("model.layers.")] == [f"model.layers.{i}" for i in range(32)]
    assert units["model.embed_tokens"] == units["lm_head"] == 4096 * 128256
    assert shape.build().config.hidden_size == 4096


@pytest.mark.parametrize("num", [1e4, 3e5, 1e6, 2.5e7, 1e9, 7e9, 7e10, 1.75e11, 1e12, 1e13])
def test_a_count_alone_becomes_a_plausible_transformer(num):
    shape = ModelShape.of(f"params={num:g}")
    assert shape.num_params == pytest.approx(num, rel=0.01)
    assert f"{shape.num_blocks} blocks" in shape.assumed
    assert shape.sizes.hidden <= 2 * shape.sizes.ffn


def test_how_a_count_may_be_written():
    assert ModelShape.of("params=7b") == ModelShape.of("params=7e9") == ModelShape.of_count(7_000_000_000)
    assert ModelShape.of("params=350M").num_params == pytest.approx(350e6, rel=0.01)


@pytest.mark.parametrize("source", ["params=many", "params=12", "params=nan", "params=-7e9", "no_such_folder", ""])
def test_what_is_no_model_is_refused(source):
    with pytest.raises(ValueError, match="params="):
        ModelShape.of(source)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_a_module_is_its_own_shape():
    module = Small()
    module.blocks[0].requires_grad_(False)
    shape = ModelShape.of(module)
    assert shape.build() is module
    assert (shape.num_params, shape.num_trainable) == (50 * 8 + 3 * 72, 50 * 8 + 2 * 72)
    assert shape.num_blocks == 3
    assert shape.activation_bytes(16) is None


def test_a_folder_of_safetensors_is_read_by_its_headers(tmp_path):
    tensors = {f"model.layers.{i}.mlp.weight": torch.zeros(8, 16) for i in range(4)}
    tensors["model.embed_tokens.weight"] = torch.zeros(100, 8)
    names = list(tensors)
    for number, part in enumerate((names[:2], names[2:])):
        path = tmp_path / f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, path)
        with path.open("r+b") as file:  # without data: only headers may be read
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
    shape = ModelShape.of(tmp_path)
    assert shape.num_params == sum(prod(t.shape) for t in tensors.values())
    assert shape.num_blocks == 4
    assert ModelShape.of(tmp_path / "model-1.safetensors").num_params == 2 * 128 + 800


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        ModelShape.of(tmp_path)


def test_a_config_is_read_from_file_folder_dict_and_object(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))

    class Config:
        def to_dict(self):
            return GPT2

    counts = [ModelShape.of(source).num_params for source in (tmp_path, tmp_path / "config.json", GPT2, Config())]
    assert counts == [124_439_808] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 0}, "names no hidden_size"), ({"hidden_size": "wide"}, "'wide'"),
     ({"vocab_size": None}, "vocab_size"),
     ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention"), ({"num_hidden_layers": 2.5}, "2.5")],
)  # fmt: skip
def test_a_config_without_a_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelShape.of(LLAMA | change)


def test_what_is_not_known_is_assumed_and_said():
    shape = ModelShape.of(LLAMA | {"model_type": "brand_new", "hidden_act": "silu"})
    assert shape.num_params == 8_030_261_248
    assert "brand_new" in shape.assumed
    assert ModelShape.of(LLAMA).assumed == ""


def test_checkpointing_saves_activations():
    shape = ModelShape.of(GPT2 | {"vocab_size": 1})
    whole, kept = shape.activation_bytes(1024), shape.activation_bytes(1024, checkpointing=True)
    # 16-bit elements per token: 6·768 + 2·768 + 2·3072 a block; with checkpoints 768 a block and one block whole
    assert whole - 8 * 1024 == 12 * 1024 * 2 * (8 * 768 + 2 * 3072)
    assert kept == 12 * 1024 * 2 * 768 + 1024 * 2 * (8 * 768 + 2 * 3072)
