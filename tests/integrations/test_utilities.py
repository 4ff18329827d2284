"""DeepSpeed's small helpers: what scripts expect of each."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import tritonspeed as ts
from tritonspeed.integrations import groups, parameters, utilities

CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def engine(stage: int) -> ts.Engine:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return ts.initialize(model=nn.Linear(3, 5), config={**CONFIG, "zero_optimization": zero})[0]


def test_on_device_builds_shapes_in_a_type() -> None:
    with utilities.OnDevice(dtype=torch.bfloat16, device="meta"):
        inside = nn.Linear(3, 5)
    assert inside.weight.is_meta and inside.weight.dtype == torch.bfloat16
    with utilities.OnDevice(dtype=torch.bfloat16, enabled=False):
        assert nn.Linear(3, 5).weight.dtype == torch.float32
    with pytest.raises(RuntimeError), utilities.OnDevice(dtype=torch.float16):
        raise RuntimeError
    assert not nn.Linear(3, 5).weight.is_meta and torch.get_default_dtype() == torch.float32


def test_a_repeating_loader_begins_again() -> None:
    loader = utilities.RepeatingLoader([1, 2, 3])
    assert [next(loader) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert iter(loader) is loader


def test_a_nested_value_is_moved() -> None:
    inner = torch.ones(2)
    moved = utilities.move_to_device({"a": [inner, (inner, 3)]}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == 3
    assert not inner.is_meta
    kept = utilities.move_to_device([inner], "cpu", lambda item: isinstance(item, torch.Tensor))
    assert kept[0] is inner


@pytest.mark.parametrize(("stage", "is_two", "is_three"), [(0, False, False), (1, True, False), (3, False, True)])
def test_an_optimizer_is_known_by_its_stage(stage: int, is_two: bool, is_three: bool) -> None:
    optimizer = engine(stage).optimizer
    assert isinstance(optimizer, utilities.DeepSpeedZeroOptimizer) is is_two
    assert isinstance(optimizer, utilities.DeepSpeedZeroOptimizer_Stage3) is is_three
    assert not isinstance(3, utilities.DeepSpeedZeroOptimizer)
    with pytest.raises(NotImplementedError, match=r"DeepSpeedZeroOptimizer is built by initialize\(\)"):
        utilities.DeepSpeedZeroOptimizer(optimizer)
    assert utilities.ZeroStageEnum(stage).value == stage


def test_parameters_are_whole_while_a_text_is_generated() -> None:
    parameters.show()
    sharded = engine(3)
    weight = sharded.module.weight
    assert weight.ds_status is parameters.ZeroParamStatus.NOT_AVAILABLE
    with utilities.unwrap_model_for_generation(sharded) as model:
        assert model is sharded and weight.ds_status is parameters.ZeroParamStatus.AVAILABLE
        assert model(torch.ones(1, 3)).isfinite().all()
    assert weight.ds_status is parameters.ZeroParamStatus.NOT_AVAILABLE


def test_things_are_said_once_and_at_a_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tritonspeed"):
        for _ in range(2):
            utilities.warning_once("rare")
            utilities.log_dist_once("first", (0,))
        utilities.log_dist_once("elsewhere", (7,))
        utilities.see_memory_usage("quiet")
        utilities.see_memory_usage("after loading", force=True)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["rare", "first", "after loading"]
    other = logging.getLogger("tests.utilities")
    utilities.set_log_level_from_string("ERROR", other)
    assert other.level == logging.ERROR
    with pytest.raises(ValueError, match="log level 'loud': there is debug, info"):
        utilities.set_log_level_from_string("loud")


def test_a_seed_is_every_generators() -> None:
    utilities.set_random_seed(3)
    first = torch.rand(2)
    utilities.set_random_seed(3)
    assert torch.equal(torch.rand(2), first)


def test_alone_every_axis_has_one_rank() -> None:
    assert groups.get_data_parallel_world_size() == groups.get_model_parallel_world_size() == 1
    assert groups.get_data_parallel_rank() == groups.get_tensor_model_parallel_src_rank() == 0
    assert groups.get_model_parallel_group() is None
    assert utilities.has_moe_layers(nn.Linear(1, 1)) == (False, 0)
