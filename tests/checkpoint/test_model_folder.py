"""The folder that from_pretrained opens: filled by any number of ranks in any order, the same to the byte."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tritonspeed.checkpoint import Record
from tritonspeed.checkpoint.model_folder import ModelFolder, configs_of, model_folder_of, weights_kind
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.page_file import PageFile, Piece
from tritonspeed.zero.layout import lay_out

FACTS = {
    "embed.weight": ParameterFacts((37, 13), torch.bfloat16, aliases=("head.weight",)),
    "block.up.weight": ParameterFacts((27, 13), torch.bfloat16),
    "block.up.bias": ParameterFacts((27,), torch.bfloat16),
    "scale": ParameterFacts((), torch.bfloat16),
    "none": ParameterFacts((0, 3), torch.bfloat16),
    "norm.weight": ParameterFacts((13,), torch.float32),
    "adapter[0:5]": ParameterFacts((5,), torch.bfloat16),  # a name like a part's
    "old": ParameterFacts((9, 2), torch.bfloat16, trainable=False),
}
BUFFERS = {"mean": torch.arange(3.0), "count": torch.tensor(7)}


class Values:
    """A checkpoint of FACTS in memory."""

    path = "memory"
    parameters = FACTS

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.masters = {n: torch.randn(f.shape, generator=generator) for n, f in FACTS.items()}

    def kinds(self, name):
        return frozenset({"exp_avg", "master" if FACTS[name].trainable else "parameters"})

    def read(self, kind, name, lo, hi):
        assert kind in self.kinds(name) - {"exp_avg"}
        return self.masters[name].reshape(-1)[lo:hi]

    def wanted(self):
        return {n: v.to(FACTS[n].dtype) for n, v in self.masters.items()}


def records_of(values, rank, world, rounded=()):
    """As ``collect`` makes them: own slice of every bucket. Buckets in ``rounded`` have parameters beside masters,
    which alone are right."""
    found = []
    for dtype, trainable in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)):
        names = [n for n, f in FACTS.items() if (f.dtype, f.trainable) == (dtype, trainable)]
        bucket, layout = f"{dtype} {trainable}", lay_out([(n, FACTS[n].shape) for n in names], dtype.itemsize, world)
        flat = torch.full((layout.numel,), 99.0)
        for span in layout.spans:
            flat[span.offset : span.end] = values.masters[span.name].reshape(-1)
        contents = {"exp_avg": flat + 1, "master": flat + 1 if bucket in rounded else flat}
        if not trainable:
            contents = {"parameters": flat.to(dtype)}
        elif bucket in rounded:
            contents["parameters"] = flat.to(dtype)
        found += [record_of(bucket, kind, content, layout, rank) for kind, content in contents.items()]
    return found


def record_of(bucket, kind, content, layout, rank):
    lo, hi = layout.interval(rank)
    pieces = tuple(
        Piece.of(p.span.name, p.span.shape, p.in_interval, p.in_span, p.in_span + p.numel)
        for p in layout.pieces(lo, hi)
    )
    file = PageFile(bucket, kind, content.dtype, hi - lo, pieces, rank, layout.world)
    return Record(file, lambda i, j: content[lo + i : lo + j])


def load_folder(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("max_shard_bytes", [None, 400])
def test_ranks_fill_it_in_any_order(tmp_path, world, max_shard_bytes, monkeypatch) -> None:
    monkeypatch.setattr("tritonspeed.checkpoint.model_folder.PART_ELEMS", 11)
    values, configs = Values(), {"config.json": "{}\n"}
    for rank in reversed(range(world)):  # rank 0, with headers and sizes, comes last
        folder = ModelFolder(FACTS, BUFFERS if rank == 0 else dict(BUFFERS), configs, max_shard_bytes)
        folder.write(tmp_path / "model", records_of(values, rank, world, {"torch.bfloat16 True"}), rank)
    assert_same(load_folder(tmp_path / "model"), values.wanted() | BUFFERS)
    model_folder_of(values, buffers=BUFFERS, configs=configs, max_shard_bytes=max_shard_bytes).write_from(
        values, tmp_path / "again"
    )
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert ("model.safetensors.index.json" in files) == (max_shard_bytes is not None)
    for file in files:
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_ranks_fill_it_at_once(tmp_path) -> None:
    values, world = Values(), 8
    folder = ModelFolder(FACTS, BUFFERS, max_shard_bytes=300)
    threads = [
        threading.Thread(target=folder.write, args=(tmp_path / "model", records_of(values, rank, world), rank))
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_same(load_folder(tmp_path / "model"), values.wanted() | BUFFERS)


def test_frozen_ones_may_be_left_out(tmp_path) -> None:
    values = Values()
    folder = ModelFolder(FACTS, exclude_frozen=True)
    folder.write(tmp_path / "model", records_of(values, 0, 1), 0)
    assert_same(load_folder(tmp_path / "model"), {n: v for n, v in values.wanted().items() if n != "old"})


def test_in_another_dtype_and_told_how_far(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tritonspeed.checkpoint.model_folder.PART_ELEMS", 100)
    values, told = Values(), []
    folder = model_folder_of(values, dtype=torch.float16)
    folder.write_from(values, tmp_path / "model", told.append)
    assert_same(load_folder(tmp_path / "model"), {n: v.half() for n, v in values.masters.items()})
    assert sum(told) == folder.plan.num_bytes == sum(2 * v.numel() for v in values.masters.values())
    assert max(told) == 200


def test_a_checkpoint_without_values_is_said(tmp_path) -> None:
    values = Values()
    values.kinds = lambda name: frozenset({"exp_avg"}) if name == "old" else frozenset({"master"})
    with pytest.raises(ValueError, match=r"memory has no values of 'old' \(exp_avg\).*leave them out"):
        model_folder_of(values).write_from(values, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert weights_kind(values, "scale") == "master"


def test_a_name_is_a_parameter_or_a_buffer() -> None:
    with pytest.raises(ValueError, match=r"\['scale'\] are parameters and buffers both"):
        ModelFolder(FACTS, {"scale": torch.zeros(1)})


def test_configs_of_models(caplog) -> None:
    config = SimpleNamespace(to_json_string=lambda: '{"model_type": "llama", "dtype": null, "n": 3}')
    model = nn.Linear(1, 1)
    assert configs_of(model) == {}
    model.config = config
    found = configs_of(model, torch.bfloat16)
    assert json.loads(found.pop("config.json")) == {
        "model_type": "llama", "dtype": "bfloat16", "n": 3, "architectures": ["Linear"],
    }  # fmt: skip
    assert found == {}
    model.config, model.generation_config = {"n": 4}, SimpleNamespace(to_dict=lambda: {"top_k": 5})
    found = configs_of(model, torch.bfloat16)
    assert {file: json.loads(text) for file, text in found.items()} == {
        "config.json": {"n": 4}, "generation_config.json": {"top_k": 5},
    }  # fmt: skip
    model.config, model.generation_config = {"n": object()}, object()
    assert configs_of(model) == {}
    assert "config.json is not written: Linear.config is no JSON" in caplog.text


def facts_of(model):
    """As a sharded model's: first names, and the others as aliases."""
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return {first: ParameterFacts(tuple(p.shape), p.dtype, True, tuple(rest)) for p, (first, *rest) in names.items()}


def saved_buffers(model):
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name in names}


def record_of_all(model):
    """One rank, one bucket: everything."""
    named = list(model.named_parameters())
    layout = lay_out([(n, p.shape) for n, p in named], 4, 1)
    flat, pieces = torch.zeros(layout.numel), []
    for (_, p), span in zip(named, layout.spans, strict=True):
        flat[span.offset : span.end] = p.detach().reshape(-1).float()
        pieces.append(Piece.of(span.name, span.shape, span.offset))
    return Record(PageFile("all", "master", torch.float32, layout.numel, tuple(pieces)), lambda i, j: flat[i:j])


TRANSFORMERS = "from_pretrained is transformers' own: pip install 'tritonspeed[test]'"
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
}  # fmt: skip
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [None, 5000])
def test_from_pretrained_opens_it(tmp_path, name, max_shard_bytes) -> None:
    transformers = pytest.importorskip("transformers", reason=TRANSFORMERS)
    model_class, config_class, sizes = MODELS[name]
    sizes = {"vocab_size": 61, **({} if name in ("gpt2", "t5") else SIZES), **sizes}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).bfloat16()
    configs = configs_of(model, torch.bfloat16)
    folder = ModelFolder(facts_of(model), saved_buffers(model), configs, max_shard_bytes)
    folder.write(tmp_path, [record_of_all(model)], 0)

    loaded, info = type(model).from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    wanted = model.state_dict()
    assert_same(loaded.state_dict(), wanted)
    auto = transformers.AutoConfig.from_pretrained(tmp_path)
    assert auto.architectures == [model_class]
    assert (tmp_path / "generation_config.json").exists()
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes is not None)
