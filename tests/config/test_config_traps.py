"""The places where a config means something else than it seems, as far as a config alone decides them."""

import math

import pytest

from tritonspeed.config import load
from tritonspeed.config.keys import value_at

BATCH = {"train_micro_batch_size_per_gpu": 1}


def resolved(**tree):
    return load({**BATCH, **tree}).resolve(2)


def row(config, key):
    (found,) = [each for each in config.answers() if each.key == key]
    return found


def test_clipping_is_on_by_default_and_the_answer_says_since_when():
    config = resolved()
    assert config.gradient_clipping == 1.0
    assert not config.is_given("gradient_clipping")
    assert "since June 2026" in row(config, "gradient_clipping").note
    off = resolved(gradient_clipping=0)
    assert off.is_given("gradient_clipping")
    assert "not clipped" in row(off, "gradient_clipping").note
    auto = resolved(gradient_clipping="auto")
    assert (auto.gradient_clipping, auto.is_given("gradient_clipping")) == (1.0, False)


def test_adam_means_adamw_and_the_answer_says_so():
    config = resolved(optimizer={"type": "Adam"})
    assert config.optimizer.type == "Adam"
    assert "Adam means AdamW unless adam_w_mode is false" in row(config, "optimizer.type").note


def test_max_grad_norm_in_the_optimizer_is_an_error():
    with pytest.raises(ValueError, match="max_grad_norm.*set gradient_clipping: 0.5"):
        resolved(optimizer={"type": "AdamW", "params": {"max_grad_norm": 0.5}})


def test_warmup_max_lr_is_not_invented():
    config = resolved(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    assert config.scheduler.params == {"warmup_num_steps": 10}  # the schedule then takes the group's lr


def test_accumulation_alone_is_no_batch_size():
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 4 alone says nothing"):
        load({"gradient_accumulation_steps": 4}).resolve(2)


@pytest.mark.parametrize("steps", [math.inf, "inf", 1e9, 2000, None])
def test_steps_per_print_may_be_infinite(steps):
    assert resolved(steps_per_print=steps).steps_per_print == (None if steps is None else float(steps))


@pytest.mark.parametrize("name", ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"])
def test_float_sizes_are_whole_numbers_afterwards(name):
    config = resolved(zero_optimization={"stage": 3, name: 0.9 * 4096 * 4096})
    value = value_at(config, "zero_optimization." + name.removeprefix("stage3_"))
    assert (value, type(value)) == (15_099_494, int)


def test_sub_group_size_and_live_parameters_of_zero():
    zero = resolved(zero_optimization={"stage": 3, "sub_group_size": 0, "max_live_parameters": 0}).zero_optimization
    assert (zero.sub_group_size, zero.max_live_parameters) == (0, 0)


def test_bf16_checks_for_overflow_by_default():
    assert resolved(bf16={"enabled": True}).bf16.check_grad_overflow is True


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sums_of_gradients_are_honoured_at_every_stage(stage):
    config = resolved(gradient_allreduce_op="sum", zero_optimization={"stage": stage})
    assert config.gradient_allreduce_op == "sum"
    assert row(config, "gradient_allreduce_op").verdict == "honoured"


def test_dividing_before_the_exchange_is_answered_with_a_reason():
    config = resolved(gradient_predivide_factor=2, prescale_gradients=True)
    for key in ("gradient_predivide_factor", "prescale_gradients"):
        assert row(config, key).verdict == "inert"
        assert "fp32" in row(config, key).note


def test_leaf_modules_have_deepspeeds_defaults():
    leaf = resolved(zero_optimization={"stage": 3}).zero_optimization.leaf_module
    assert "MixtralSparseMoeBlock" in leaf.classes
    assert (leaf.names, leaf.name_suffixes) == ([], [])


def test_offload_options_without_a_device_do_not_count_as_offload():
    config = resolved(zero_optimization={"stage": 2, "offload_optimizer": {"pin_memory": True}})
    assert config.zero_optimization.offload_optimizer.device == "none"
    assert "acts only with" in row(config, "zero_optimization.offload_optimizer.pin_memory").note
