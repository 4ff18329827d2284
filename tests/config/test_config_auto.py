""" "auto" without Hugging Face: the note's rules where there is one, DeepSpeed's defaults elsewhere."""

import itertools

import pytest
import torch

from tritonspeed.config import ModelFacts, load
from tritonspeed.config.config import Config
from tritonspeed.config.keys import specs, value_at

BATCH = {"train_batch_size": "auto"}
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


@pytest.mark.parametrize(
    ("hidden", "expected"), [(768, (589_824, 530_841, 7_680)), (3584, (12_845_056, 11_560_550, 35_840))]
)
def test_sizes_follow_the_hidden_size(hidden, expected):
    tree = {**BATCH, "zero_optimization": {"stage": 3, **dict.fromkeys(SIZES, "auto")}}
    zero = load(tree).resolve(2, ModelFacts(hidden_size=hidden)).zero_optimization
    assert (zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold) == expected


def test_sizes_without_a_hidden_size_are_the_defaults():
    config = load({**BATCH, "zero_optimization": {"stage": 3, **dict.fromkeys(SIZES, "auto")}}).resolve(2)
    zero = config.zero_optimization
    assert (zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold) == (5e8, 5e7, 1e5)
    assert "no hidden size known" in config.note("zero_optimization.reduce_bucket_size")


def test_given_sizes_stay():
    tree = {**BATCH, "zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}
    zero = load(tree).resolve(2, ModelFacts(hidden_size=768)).zero_optimization
    assert (zero.reduce_bucket_size, zero.prefetch_bucket_size) == (7, 50_000_000)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, "bfloat16", "half"])
@pytest.mark.parametrize(("fp16", "bf16"), list(itertools.product([True, False, "auto", None], repeat=2)))
def test_precision_follows_the_model_only_where_nobody_chose(fp16, bf16, dtype):
    tree = {**BATCH, "fp16": {"enabled": fp16}, "bf16": {"enabled": bf16}}
    if fp16 is True and bf16 is True:
        with pytest.raises(ValueError, match="fp16.enabled and bf16.enabled are all true"):
            load(tree).resolve(1)
        return
    config = load(tree).resolve(1, ModelFacts(dtype=dtype))
    is_bf16, is_fp16 = dtype in (torch.bfloat16, "bfloat16"), dtype in (torch.float16, "half")
    assert config.bf16.enabled is (bf16 is True or (bf16 == "auto" and is_bf16 and fp16 is not True))
    assert config.fp16.enabled is (fp16 is True or (fp16 == "auto" and is_fp16 and bf16 is not True))


def test_autocast_excludes_both():
    tree = {**BATCH, "torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}, "bf16": {"enabled": "auto"}}
    config = load(tree).resolve(1, ModelFacts(dtype="bf16"))
    assert (config.bf16.enabled, config.torch_autocast.dtype) == (False, "bf16")
    with pytest.raises(ValueError, match="bf16.enabled and torch_autocast.enabled"):
        load({**tree, "bf16": {"enabled": True}}).resolve(1)


def test_adams_parameters_take_deepspeeds_defaults():
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    config = load({**BATCH, "optimizer": {"type": "AdamW", "params": params}}).resolve(1)
    assert config.optimizer.params == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_schedule_parameters():
    warm = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    tree = {**BATCH, "scheduler": {"type": "WarmupDecayLR", "params": warm}}
    assert load(tree).resolve(1).scheduler.params == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.001,
        "warmup_num_steps": 1000,
    }
    tree["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-4}}
    config = load(tree).resolve(1)
    assert config.scheduler.params["warmup_max_lr"] == 3e-4
    assert "set the number of optimizer steps" in config.note("scheduler.params.total_num_steps")


VALUES = [spec for spec in specs(Config).values() if spec.block is None and not spec.is_open and spec.name != "type"]


@pytest.mark.parametrize("spec", VALUES, ids=lambda spec: spec.path)
def test_auto_is_accepted_everywhere_and_leaves_nothing_behind(spec):
    tree = {"train_micro_batch_size_per_gpu": 1}
    inner = tree
    *blocks, name = spec.path.split(".")
    for block in blocks:
        inner = inner.setdefault(block, {})
    if spec.path == "optimizer.legacy_fusion":
        inner["type"] = "AdamW"
    inner[name] = "auto"
    config = load(tree).resolve(2, ModelFacts(hidden_size=8))
    value = value_at(config, spec.path)
    assert value != "auto"
    from_others = ("train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu")
    if spec.path not in from_others and not spec.key.auto:
        assert value == spec.default


def test_overlap_comm_is_on_iff_stage_3():
    for stage in range(4):
        zero = {"stage": stage}
        assert load({**BATCH, "zero_optimization": zero}).resolve(1).zero_optimization.overlap_comm is (stage == 3)
        for given in (True, False):
            config = load({**BATCH, "zero_optimization": {**zero, "overlap_comm": given}}).resolve(1)
            assert config.zero_optimization.overlap_comm is given
