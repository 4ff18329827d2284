"""zero.Init with parts on the host and on disk: the same values, no more memory than what is open, no files left."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, Plain, one_pass, sgd
from models import Net
from safetensors.torch import load_file, save_file
from test_meta import GPTStyle, assert_initialised, num_bytes_alive
from tolerances import tolerance
from torch import nn

import tritonspeed as ts
import tritonspeed.zero.init as zero_init
from tritonspeed.offload import Tier
from tritonspeed.zero.group import group_of, place_of


def config(folder: Any, device: str = "nvme", stage: int = 3, max_in_cpu: int = 0) -> dict[str, Any]:
    """Of a run whose parameters are offloaded."""
    offload = {"device": device, "nvme_path": str(folder), "max_in_cpu": max_in_cpu}
    zero = {"stage": stage, "offload_param": offload, "stage3_max_live_parameters": "auto"}
    return {"train_batch_size": 2, "zero_optimization": zero}


def tiers_of(model: nn.Module) -> set[Tier]:
    return {place_of(p)[1].shard_tier for p in model.parameters() if group_of(p) is not None}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def built_and_trained(folder: str, device: str) -> None:
    world = dist.get_world_size()
    plain = Plain(Case(lambda: GPTStyle(tied=True)), world)
    torch.manual_seed(dist.get_rank())
    with ts.zero.Init(config_dict_or_path=config(folder, device)):
        model = GPTStyle(tied=True)
    assert tiers_of(model) == {Tier.of(device)}
    assert bool(files_in(Path(folder))) is (device == "nvme")
    assert_initialised(model, tied=True)
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    model, optimizer = ts.zero.shard(model, sgd(model.parameters()), stage=3, options=options)
    for step in range(2):
        loss = one_pass(model, dist.get_rank(), step)
        optimizer.step()
        torch.testing.assert_close(loss, plain.step(step)[dist.get_rank()], **tolerance(torch.float32, 4096))
    gc.collect()
    dist.barrier()
    assert list(Path(folder).iterdir()) == [], "what built the model is gone, and its files"


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_trained_after_it(ranks: Any, tmp_path: Path, device: str) -> None:
    ranks(2, built_and_trained, str(tmp_path), device)


class Deep(nn.Module):
    """Blocks that are made, then written by a top-level ``apply``; notes what is alive meanwhile."""

    def __init__(self, width: int, depth: int, held: list[int]) -> None:
        super().__init__()
        self.held = held
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(nn.Sequential(nn.Linear(width, width), nn.Tanh()))
            held.append(num_bytes_alive())
        self.apply(self.write)

    def write(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 2.0)
            nn.init.zeros_(module.bias)
            self.held.append(num_bytes_alive())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_bigger_than_what_may_be_open_is_built_and_moved_unit_by_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, depth, held = 128, 12, []
    unit_bytes = 4 * (width * width + width)
    settings = config(tmp_path)
    settings["zero_optimization"]["stage3_max_live_parameters"] = 2 * unit_bytes // 4
    gc.collect()  # what other tests have left
    before = num_bytes_alive()
    with ts.zero.Init(config_dict_or_path=settings):
        model = Deep(width, depth, held)
    assert len(held) == 2 * depth and max(held) - before < 3.5 * unit_bytes, "two open and one arriving"
    assert num_bytes_alive() - before < 0.1 * unit_bytes
    assert len(files_in(tmp_path)) == depth

    counts, usual = [], zero_init.Bucket.disown

    def noted(self: Any, parameters: Any) -> None:
        usual(self, parameters)
        counts.append((num_bytes_alive(), len(files_in(tmp_path))))

    monkeypatch.setattr(zero_init.Bucket, "disown", noted)
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    offload = ts.Offload(optimizer="nvme", parameters="nvme", path=tmp_path, max_in_cpu=0)
    model, optimizer = ts.zero.shard(
        model, ts.optim.AdamW(model.parameters()), stage=3, precision="bf16", options=options, offload=offload
    )
    assert len(counts) == depth
    assert max(alive for alive, _ in counts) - before < 3.5 * unit_bytes, "the unit that moves, in both dtypes"
    model(torch.ones(1, width, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    weight = model.get_parameter("blocks.0.0.weight")
    with ts.zero.GatheredParameters(weight):
        assert 1.9 < weight.float().mean() < 2.1
    model._tritonspeed.destroy()


def test_a_checkpoint_goes_to_disk_unit_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the meta device, values in files, state on disk: in memory is one unit, whatever the depth."""
    width, depth = 128, 12
    unit_bytes = 4 * (width * width + width)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])
    values = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    save_file(values, tmp_path / "model.safetensors")
    ts.zero.load_safetensors(model, tmp_path)
    sharding, counts = import_module("tritonspeed.zero.shard"), []
    usual = sharding.materialise

    def noted(*args: Any, **kwargs: Any) -> None:
        usual(*args, **kwargs)
        counts.append(num_bytes_alive())

    monkeypatch.setattr(sharding, "materialise", noted)
    gc.collect()
    before = num_bytes_alive()
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    offload = ts.Offload(optimizer="nvme", parameters="nvme", path=tmp_path, max_in_cpu=0)
    model, _ = ts.zero.shard(
        model, ts.optim.AdamW(model.parameters()), precision="bf16", options=options, offload=offload
    )
    assert len(counts) == depth + 1
    assert max(counts) - before < 1.1 * unit_bytes and num_bytes_alive() - before < 0.1 * unit_bytes
    for name, p in model.named_parameters():
        assert torch.equal(ts.zero.safe_get_local_fp32_param(p), values[name].flatten()), name
    model._tritonspeed.destroy()


def load_and_train(folder: str) -> None:
    """A checkpoint goes into a model that was built on disk, and on to disk for training."""
    path = Path(folder)
    values = {name: torch.randn_like(value) for name, value in Net(tied=True).state_dict().items()}
    values.pop("head.weight")
    if dist.get_rank() == 0:
        save_file(values, path / "model.safetensors")
    dist.barrier()
    with ts.zero.Init(config_dict_or_path=config(path / "disk")):
        model = Net(tied=True)
    ts.zero.load_safetensors(model, path)
    offload = ts.Offload(optimizer="nvme", parameters="nvme", path=path / "disk", max_in_cpu=0)
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    model, optimizer = ts.zero.shard(
        model, ts.optim.AdamW(model.parameters(), lr=0.0), precision="bf16", options=options, offload=offload
    )
    saved = load_file(path / "model.safetensors")
    for _ in range(2):  # as built; then again, over masters that have been committed
        got = {n: ts.zero.safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
        torch.testing.assert_close(got, saved, rtol=0, atol=0)
        one_pass(model, 0, 0)
        optimizer.step()
        ts.zero.load_safetensors(model, path)
    with ts.zero.GatheredParameters(model.parameters()):
        torch.testing.assert_close(
            {n: p.detach() for n, p in model.named_parameters()},
            {n: value.bfloat16() for n, value in saved.items()},
            rtol=0,
            atol=0,
        )
    model._tritonspeed.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_to_disk_and_again_after_a_step(ranks: Any, tmp_path: Path, world: int) -> None:
    (tmp_path / "disk").mkdir()
    ranks(world, load_and_train, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "tier"),
    [
        ({}, Tier.DEVICE),
        ({"remote_device": "cpu"}, Tier.HOST),
        ({"remote_device": "none", "config_dict_or_path": "nvme"}, Tier.DEVICE),
        ({"config": "cpu"}, Tier.HOST),
        ({"config_dict_or_path": "nvme"}, Tier.DISK),
        ({"remote_device": "nvme", "config_dict_or_path": "cpu"}, Tier.DISK),
        ({"config_dict_or_path": "stage 2"}, Tier.DEVICE),
    ],
)
def test_what_says_where_parts_wait(tmp_path: Path, settings: dict[str, Any], tier: Tier) -> None:
    configs = {device: config(tmp_path, device) for device in ("cpu", "nvme")}
    configs["stage 2"] = config(tmp_path, "nvme", stage=2)
    settings = {k: configs[v] if k.startswith("config") else v for k, v in settings.items()}
    with ts.zero.Init(**settings, mem_efficient_linear=False, pin_memory=False):
        model = nn.Sequential(nn.Linear(3, 4))
    assert tiers_of(model) == {tier}
    with ts.zero.GatheredParameters(model.parameters()):
        assert not any(p.isnan().any() for p in model.parameters())


def test_some_wait_on_the_host_and_the_rest_on_disk(tmp_path: Path) -> None:
    with ts.zero.Init(config_dict_or_path=config(tmp_path, max_in_cpu=2 * 1024)):
        model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)])
    assert [place_of(m.weight)[1].shard_tier for m in model] == 2 * [Tier.HOST] + 2 * [Tier.DISK]


def test_files_go_with_a_model_that_is_never_trained(tmp_path: Path) -> None:
    with ts.zero.Init(config_dict_or_path=config(tmp_path)):
        model = nn.Sequential(nn.Linear(3, 4))
    assert len(files_in(tmp_path)) == 1
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_two_models_at_once(tmp_path: Path) -> None:
    models = []
    for value in (1.0, 2.0):
        with ts.zero.Init(config_dict_or_path=config(tmp_path)):
            models.append(nn.Sequential(nn.Linear(3, 4)))
            nn.init.constant_(models[-1][0].weight, value)
    for model, value in zip(models, (1.0, 2.0), strict=True):
        with ts.zero.GatheredParameters(model.parameters()):
            assert (model[0].weight == value).all()


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a folder on the disk: pass config_dict_or_path"):
        ts.zero.Init(remote_device="nvme")
    with pytest.raises(ValueError, match="offload to 'tape': the tiers are"):
        ts.zero.Init(remote_device="tape")
    with pytest.raises(ValueError, match="two configs"):
        ts.zero.Init(config_dict_or_path=config(tmp_path), config=config(tmp_path, "cpu"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'remote_devise'"):
        ts.zero.Init(remote_devise="cpu")
    with (
        pytest.raises(ValueError, match="is the disk mounted"),
        ts.zero.Init(config_dict_or_path=config(tmp_path / "not" / "there")),
    ):
        nn.Sequential(nn.Linear(3, 4))
    assert not zero_init.is_building()
