"""Spellings since 2020, each with the key it means today and the words the answer shows."""

import pytest

from tritonspeed.config import load
from tritonspeed.config.keys import value_at

BATCH = {"train_micro_batch_size_per_gpu": 1}

OLD = [
    # config, key as written, path today, value today
    ({"zero_optimization": True}, "zero_optimization", "zero_optimization.stage", 1),
    ({"zero_optimization": False}, "zero_optimization", "zero_optimization.stage", 0),
    (
        {"zero_optimization": True, "allgather_size": 2e8},
        "allgather_size",
        "zero_optimization.allgather_bucket_size",
        2e8,
    ),
    (
        {"zero_optimization": {"allgather_size": 2e8}},
        "zero_optimization.allgather_size",
        "zero_optimization.allgather_bucket_size",
        2e8,
    ),
    ({"fp32_allreduce": True}, "fp32_allreduce", "communication_data_type", "fp32"),
    ({"fp32_allreduce": False}, "fp32_allreduce", "communication_data_type", None),
    ({"bfloat16": {"enabled": True}}, "bfloat16.enabled", "bf16.enabled", True),
    (
        {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "zero_optimization.gather_16bit_weights_on_model_save",
        True,
    ),
    (
        {"zero_optimization": {"cpu_offload": False}},
        "zero_optimization.cpu_offload",
        "zero_optimization.offload_optimizer.device",
        "none",
    ),
    (
        {"zero_optimization": {"cpu_offload_param": False}},
        "zero_optimization.cpu_offload_param",
        "zero_optimization.offload_param.device",
        "none",
    ),
    (
        {"zero_optimization": {"cpu_offload_use_pin_memory": False}},
        "zero_optimization.cpu_offload_use_pin_memory",
        "zero_optimization.offload_optimizer.pin_memory",
        False,
    ),
    ({"aio": {"thread_count": 4}}, "aio.thread_count", "aio.intra_op_parallelism", 4),
]


@pytest.mark.parametrize(("tree", "written", "path", "value"), OLD, ids=[row[1] for row in OLD])
def test_old_spelling_is_mapped(tree, written, path, value):
    config = load({**BATCH, **tree}).resolve(1)
    assert value_at(config, path) == value
    rows = [each for each in config.answers() if each.key == written]
    assert {each.verdict for each in rows} == {"mapped"}
    assert any(path in each.note for each in rows)


@pytest.mark.parametrize(
    ("old", "block"),
    [
        ("cpu_offload", "offload_optimizer"),
        ("cpu_offload_param", "offload_param"),
        ("cpu_offload_params", "offload_param"),
    ],
)
def test_old_offload_switch_is_mapped_to_the_host(old, block):
    config = load({**BATCH, "zero_optimization": {"stage": 3, old: True}}).resolve(1)
    assert getattr(config.zero_optimization, block).device == "cpu"
    (row,) = [each for each in config.answers() if each.key == f"zero_optimization.{old}"]
    assert row.verdict == "mapped"
    assert f"zero_optimization.{block}.device" in row.note


def test_a_refusal_names_the_spelling_that_was_written():
    tree = {**BATCH, "zero_optimization": {"stage": 1, "cpu_offload": True}, "optimizer": {"type": "lamb"}}
    with pytest.raises(ValueError, match="zero_optimization.cpu_offload = True: now zero_optimization.offload_optim"):
        load(tree).resolve(1)


STAGE3_NAMES = [
    ("prefetch_bucket_size", 7),
    ("param_persistence_threshold", 7),
    ("model_persistence_threshold", 7),
    ("max_live_parameters", 7),
    ("max_reuse_distance", 7),
    ("gather_16bit_weights_on_model_save", True),
    ("module_granularity_threshold", 7),
    ("use_all_reduce_for_fetch_params", True),
    ("allgather_sequential", True),
    ("partition_stream_chunk_size", 7),
]


@pytest.mark.parametrize(("name", "value"), STAGE3_NAMES)
def test_with_and_without_stage3_are_one_key(name, value):
    short = load({**BATCH, "zero_optimization": {"stage": 3, name: value}})
    long = load({**BATCH, "zero_optimization": {"stage": 3, "stage3_" + name: value}})
    assert short == long
    assert getattr(long.zero_optimization, name) == value
    assert "mapped" not in {each.verdict for each in long.resolve(1).answers()}  # both are current names


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            ["max_live_parameters = 1", "stage3_max_live_parameters = 2"],
        ),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, ["bf16", "bfloat16"]),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "nvme"}}},
            ["cpu_offload = True", "offload_optimizer.device = 'nvme'"],
        ),
        ({"fp32_allreduce": True, "communication_data_type": "fp16"}, ["fp32_allreduce", "'fp16'"]),
    ],
)
def test_two_spellings_that_disagree_are_refused_with_both_values(tree, words):
    with pytest.raises(ValueError) as caught:
        load(tree)
    assert all(word in str(caught.value) for word in words)


def test_two_spellings_that_agree_are_fine():
    tree = {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 1.0}}
    assert load(tree).zero_optimization.max_live_parameters == 1
    tree = {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    assert load(tree).zero_optimization.offload_optimizer.pin_memory is False


@pytest.mark.parametrize("old", ["cpu_offload", "cpu_offload_use_pin_memory"])
def test_an_old_switch_is_a_switch(old):
    with pytest.raises(ValueError, match=f"{old} = 'cpu' must be true or false"):
        load({"zero_optimization": {old: "cpu"}})
    assert load({"zero_optimization": {old: None}}) == load({})
