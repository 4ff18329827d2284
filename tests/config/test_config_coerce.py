"""Values: numbers as people write them, and what is no number."""

import math

import pytest
import torch

from tritonspeed.config import load
from tritonspeed.config.coerce import dtype_name, nearest
from tritonspeed.config.keys import value_at

BATCH = {"train_batch_size": 8}


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def loaded(path, value):
    return value_at(load(nested(path, value)), path)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("zero_optimization.reduce_bucket_size", 5e8, 500_000_000),
        ("zero_optimization.prefetch_bucket_size", 0.9 * 4095 * 4095, 15_092_122),
        ("zero_optimization.sub_group_size", 0, 0),
        ("zero_optimization.max_live_parameters", "1e9", 1_000_000_000),
        ("zero_optimization.stage", "3", 3),
        ("zero_optimization.stage", 2.0, 2),
        ("train_batch_size", 32.0, 32),
        ("gradient_clipping", 1, 1),
        ("steps_per_print", math.inf, math.inf),
        ("steps_per_print", "Infinity", math.inf),
        ("steps_per_print", 10, 10),
        ("zero_optimization.overlap_comm", "True", True),
        ("wall_clock_breakdown", 1, True),
        ("fp16.loss_scale", 1024, 1024),
        ("fp16.min_loss_scale", 0.5, 0.5),
        ("communication_data_type", "FP32", "fp32"),
        ("communication_data_type", torch.bfloat16, "bf16"),
        ("data_types.grad_accum_dtype", "torch.float16", "fp16"),
        ("gradient_allreduce_op", "SUM", "sum"),
        ("checkpoint.tag_validation", "FAIL", "Fail"),
        ("zero_optimization.leaf_module.names", "mlp", ["mlp"]),
        ("zero_optimization.overlap_comm", None, None),
        ("zero_optimization.reduce_bucket_size", None, 500_000_000),
    ],
)
def test_accepted_as(path, value, expected):
    got = loaded(path, value)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("zero_optimization.stage", 4, "one of 0, 1, 2, 3"),
        ("zero_optimization.stage", True, "one of 0, 1, 2, 3"),
        ("train_batch_size", 32.5, "whole number"),
        ("train_batch_size", True, "a number"),
        ("zero_optimization.reduce_bucket_size", -1, "at least 0"),
        ("zero_optimization.reduce_bucket_size", math.inf, "finite"),
        ("zero_optimization.reduce_bucket_size", math.nan, "a number"),
        ("zero_optimization.offload_optimizer.ratio", 1.5, "at most 1"),
        ("gradient_clipping", "much", "a number"),
        ("gradient_clipping", -1, "at least 0"),
        ("gradient_clipping", math.inf, "finite"),
        ("fp16.loss_scale", True, "a number"),
        ("fp16.loss_scale", -1, "at least 0"),
        ("wall_clock_breakdown", "yes", "true or false"),
        ("wall_clock_breakdown", 2, "true or false"),
        ("communication_data_type", "int8", "fp32, fp16, bf16"),
        ("gradient_allreduce_op", "max", "mean, sum"),
        ("fp16", True, "must be a block"),
        ("fp16", "auto", "must be a block"),
        ("amp", True, "must be a block"),
        ("optimizer", "AdamW", "must be a block"),
        ("zero_optimization.offload_param", "cpu", "must be a block"),
        ("zero_optimization.leaf_module.classes", [1], "list of strings"),
        ("tensorboard.job_name", 3, "a string"),
    ],
)
def test_refused_with_key_value_and_remedy(path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        loaded(path, value)
    assert f"{path} = {value!r}" in str(caught.value)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtype_names_cover_torchs(dtype):
    of_torch = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert dtype_name(of_torch) == dtype_name(str(of_torch)) == dtype_name(dtype.upper()) == dtype
    assert dtype_name(torch.float64) is None


def test_nearest_name():
    assert nearest("overlap_com", ["overlap_comm", "stage"]) == ", did you mean 'overlap_comm'?"
    assert nearest("zzz", ["overlap_comm", "stage"]) == ""
