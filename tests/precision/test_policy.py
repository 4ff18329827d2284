"""The dtype policy: the table of its docstring, every spelling, every refused combination."""

from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace

import pytest
import torch

from tritonspeed.precision import Policy, parse_dtype

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def config(fp16=False, bf16=False, autocast=False, dtype=None, accumulate=None, communicate=None):
    return SimpleNamespace(
        fp16=SimpleNamespace(enabled=fp16),
        bf16=SimpleNamespace(enabled=bf16),
        torch_autocast=SimpleNamespace(enabled=autocast, dtype=dtype),
        data_types=SimpleNamespace(grad_accum_dtype=accumulate),
        communication_data_type=communicate,
    )


@pytest.mark.parametrize(
    ("given", "param", "compute", "reduce", "accumulate", "autocast"),
    [
        ({}, FP32, FP32, FP32, FP32, None),
        ({"bf16": True}, BF16, BF16, BF16, FP32, None),
        ({"fp16": True}, FP16, FP16, FP16, FP32, None),
        ({"autocast": True}, FP32, BF16, FP32, FP32, BF16),
        ({"autocast": True, "dtype": "fp16"}, FP32, FP16, FP32, FP32, FP16),
        ({"autocast": True, "dtype": "bfloat16", "communicate": "bf16"}, FP32, BF16, BF16, FP32, BF16),
        ({"bf16": True, "communicate": "fp32"}, BF16, BF16, FP32, FP32, None),
        ({"bf16": True, "accumulate": "bf16"}, BF16, BF16, BF16, BF16, None),
        ({"fp16": True, "accumulate": "fp32", "communicate": "BF16"}, FP16, FP16, BF16, FP32, None),
    ],
)
def test_from_config(given, param, compute, reduce, accumulate, autocast):
    assert Policy.from_config(config(**given)) == Policy(param, compute, reduce, accumulate, FP32, FP32, autocast)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_of_equals_from_config(precision):
    given = {} if precision == "fp32" else {precision: True}
    assert Policy.of(precision) == Policy.from_config(config(**given))


def test_autocast_by_name_equals_from_config():
    assert Policy.with_autocast(BF16) == Policy.from_config(config(autocast=True, dtype="bf16"))


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        (Policy.of("fp16"), True),
        (Policy.with_autocast("fp16"), True),
        (Policy.of("bf16"), False),
        (Policy.with_autocast("bf16"), False),
        (Policy.of("fp32"), False),
    ],
)
def test_only_fp16_needs_a_loss_scale(policy, needs):
    assert policy.needs_loss_scale is needs


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("fp32", FP32),
        ("float", FP32),
        ("torch.float32", FP32),
        ("bf16", BF16),
        ("BFloat16", BF16),
        ("torch.bfloat16", BF16),
        ("half", FP16),
        ("float16", FP16),
        (FP16, FP16),
    ],
)
def test_spellings(spelling, dtype):
    assert parse_dtype(spelling, "key") == dtype


@pytest.mark.parametrize("value", ["int8", "fp8", "", torch.float64, torch.int32])
def test_what_is_no_training_dtype_is_refused_with_its_key(value):
    with pytest.raises(ValueError, match="data_types.grad_accum_dtype is"):
        parse_dtype(value, "data_types.grad_accum_dtype")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": True, "bf16": True}, "fp16.enabled and bf16.enabled are both true.*bf16 alone"),
        ({"bf16": True, "autocast": True}, 'bf16.enabled are both true.*"torch_autocast".*alone'),
        ({"fp16": True, "autocast": True}, 'fp16.enabled are both true.*"torch_autocast".*alone'),
        ({"bf16": "auto"}, "bf16.enabled is 'auto'.*resolve"),
        ({"bf16": True, "accumulate": "fp16"}, "grad_accum_dtype fp16 goes with neither.*bf16 nor fp32"),
        ({"accumulate": "bf16"}, "grad_accum_dtype bf16 goes with neither"),
        ({"autocast": True, "dtype": "fp32"}, "torch_autocast.dtype is fp32"),
        ({"communicate": "int8"}, "communication_data_type is 'int8'"),
    ],
)
def test_contradictions_are_refused_with_a_remedy(given, message):
    with pytest.raises(ValueError, match=message):
        Policy.from_config(config(**given))


def test_it_is_frozen_and_names_no_low_precision_master():
    policy = Policy.of("bf16")
    with pytest.raises(FrozenInstanceError):
        policy.param = FP32
    assert {field.name for field in fields(policy) if getattr(policy, field.name) == FP32} == {
        "accumulate",
        "master",
        "state",
    }
