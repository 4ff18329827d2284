"""``checkpoint.save_model``: model/ beside a checkpoint is what modules compute with, whatever the stage and tier."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import make, settings
from models import Net, batch
from safetensors.torch import load_file
from torch import nn

import tritonspeed as ts
from tritonspeed.checkpoint.stored import verify

ADAMW = {"lr": 1e-2, "weight_decay": 0.01}


class Model(nn.Module):
    """Tied, frozen, with buffers that are saved and that are not, and with a config."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(tied=True)
        self.net.blocks[1].up.weight.requires_grad_(False)
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.config = SimpleNamespace(to_json_string=lambda: '{"model_type": "tiny"}')

    def forward(self, *inputs: Any) -> Any:
        return self.net(*inputs)


def train(engine: ts.Engine, steps: int) -> None:
    for i in range(steps):
        engine.backward(engine(*batch(engine.mesh.rank, i)))
        engine.step()


def written(folder: str, config: dict[str, Any], exclude_frozen: bool) -> None:
    engine = make(config, Model)
    train(engine, 3)
    whole = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    engine.save_checkpoint(folder, tag="t", exclude_frozen_parameters=exclude_frozen)
    train(engine, 2)  # goes on while a thread writes
    engine.wait_for_checkpoint()
    engine.destroy()
    if dist.get_rank():
        return
    model = Path(folder) / "t" / "model"
    found = load_file(model / "model.safetensors")
    assert found.keys() == whole.keys() - {"net.head.weight"}
    for name, value in found.items():
        assert value.dtype == whole[name].dtype and value.equal(whole[name]), name
    said = (model / "config.json").read_text()
    assert '"architectures": [\n    "Model"\n  ]' in said and '"dtype"' in said
    assert verify(Path(folder) / "t") == 3


@pytest.mark.parametrize("more", ["sync", "async", "rounded at random", "frozen ones left out"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_is_what_modules_compute_with(ranks: Any, tmp_path: Path, stage: int, more: str) -> None:
    checkpoint = {"save_model": True, "async_save": more == "async"}
    params = {**ADAMW, "stochastic_rounding": more == "rounded at random"}
    config = settings(stage, 1, "bf16", optimizer={"type": "AdamW", "params": params}, checkpoint=checkpoint)
    ranks(2, written, str(tmp_path), config, more == "frozen ones left out")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_from_disk(ranks: Any, tmp_path: Path, stage: int, is_async: bool) -> None:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(tmp_path / "disk")}
    if stage == 3:
        zero["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path / "disk"), "max_in_cpu": 0}
    config = settings(
        stage, 1, "bf16", zero_optimization=zero, optimizer={"type": "AdamW", "params": ADAMW},
        checkpoint={"save_model": True, "async_save": is_async},
    )  # fmt: skip
    ranks(2, written, str(tmp_path), config, False)


def test_a_model_alone(tmp_path: Path) -> None:
    """In fp32, by one rank, without ranks."""
    engine = make(settings(3, checkpoint={"save_model": True}), Model)
    engine.save_checkpoint(tmp_path)
    whole = engine.module_state_dict()
    found = load_file(tmp_path / "global_step0" / "model" / "model.safetensors")
    assert all(
        found[name].equal(whole[name]) and found[name].dtype == torch.float32 for name in found if name != "seen"
    )
    assert (tmp_path / "zero_to_fp32.py").exists()
    engine.destroy()


def pretrained(folder: str, stage: int, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32
        ),
        "MixtralForCausalLM": lambda: transformers.MixtralConfig(**sizes, **heads, num_local_experts=3),
    }[name]()
    kind = getattr(transformers, name)
    engine = make(settings(stage, 1, "bf16", checkpoint={"save_model": True}), lambda: kind(config))
    tokens = torch.arange(14).view(2, 7) + 7 * dist.get_rank()
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(folder, tag="t")
    whole = engine.module_state_dict()
    engine.destroy()
    loaded, info = kind.from_pretrained(Path(folder) / "t" / "model", dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    found = loaded.state_dict()
    assert found.keys() == whole.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16 and value.equal(whole[name]), name


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM"])
@pytest.mark.parametrize("stage", [2, 3])
def test_from_pretrained_opens_it(ranks: Any, tmp_path: Path, stage: int, name: str) -> None:
    pytest.importorskip("transformers", reason="from_pretrained is transformers' own: pip install 'tritonspeed[test]'")
    ranks(2, pretrained, str(tmp_path), stage, name)
