"""Which settings fit, ranked; and `ts.estimate` as a whole."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

import tritonspeed as ts
from tritonspeed.config import load
from tritonspeed.estimation import Forecast, machine_of, search
from tritonspeed.estimation.forecast import gathers_per_micro_step
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.order import Limits

CONFIG = {"train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
H100 = machine_of("H100")


def test_a_small_model_needs_nothing():
    best = search("params=100m", CONFIG, 8, H100)[0]
    assert best.fits
    assert (best.optimizer, best.parameters, best.checkpointing) == ("none", "none", False)


def test_what_does_not_fit_comes_last_and_says_why():
    found = search("llama70b", CONFIG, 8, H100)
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True)
    assert not fits[-1]
    assert "device memory" in found[-1].shortages[0]
    assert {each.stage for each in found} == {3}  # 2 × 70 GB of parameters are more than a device has
    assert {each.stage for each in search("llama8b", CONFIG, 8, H100)} == {0, 1, 2, 3}


def test_a_model_bigger_than_the_devices_is_offloaded():
    small = machine_of("4090", num_devices=1)
    best = search("params=7b", CONFIG, 1, small)[0]
    assert best.fits
    assert best.optimizer in ("cpu", "nvme")
    tight = machine_of("4090", num_devices=1, host_bytes=32 * 2**30)
    best = search("params=7b", CONFIG, 1, tight)[0]
    assert best.fits
    assert best.optimizer == "nvme"


def test_times_rise_down_the_list():
    seconds = [each.seconds for each in search("llama8b", CONFIG, 8, H100) if each.fits]
    assert all(later >= 0.97 * sooner for sooner, later in pairwise(seconds))


def test_the_block_is_a_config_that_asks_for_it():
    given = CONFIG | {"gradient_clipping": 1.0, "train_batch_size": 64}
    for each in search("params=1b", given, 8, H100):
        block = json.loads(each.text)
        merged = load({**CONFIG, "gradient_clipping": 1.0, **block}).resolve(8)
        zero = merged.zero_optimization
        assert (zero.stage, zero.offload_optimizer.device) == (each.stage, each.optimizer)
        assert zero.offload_param.device == each.parameters
        micro, accumulation = merged.train_micro_batch_size_per_gpu, merged.gradient_accumulation_steps
        assert micro * accumulation == 8  # samples of a step stay what they are
        if "nvme" in (each.optimizer, each.parameters):
            assert "/local_nvme" in each.text


def test_a_folder_and_other_keys_that_were_given_are_kept():
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/fast", "buffer_count": 7}}
    found = search("params=1b", CONFIG | {"zero_optimization": zero | {"overlap_comm": False}}, 8, H100)
    block = next(each for each in found if each.optimizer == "nvme").block["zero_optimization"]
    assert block["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast", "buffer_count": 7}
    assert block["overlap_comm"] is False


def test_estimate_is_one_call():
    found = ts.estimate("params=7e9", CONFIG, 16, nodes=2, machine=H100)
    assert isinstance(found, Forecast)
    assert found.total_peak_bytes == ts.estimate(ModelShape.of_count(7e9).build(), CONFIG, 16).total_peak_bytes
    assert found.work.tokens == 8 * 2048
    assert found.step.binding in found.link_bytes
    assert found.link_bytes["compute"] == pytest.approx(6 * 7e9 * 8 * 2048, rel=0.01)
    assert "it takes at least" in str(found)
    assert "compute binds" in str(found)
    assert ts.estimate("params=7e9", CONFIG, 16).step is None


def test_ranks_spread_over_the_nodes():
    with pytest.raises(ValueError, match="9 ranks do not spread evenly over 2 nodes"):
        ts.estimate("params=7e9", CONFIG, 9, nodes=2)


def options(**limits: int) -> ShardOptions:
    return ShardOptions(limits=Limits(**limits), param_persistence_threshold=0)


def test_gathers_follow_the_runs_own_limits():
    module = ModelShape.of_count(1e8).build()
    assert gathers_per_micro_step(module, options(max_reuse_distance=0, max_live_parameters=0)) == 2.0
    assert gathers_per_micro_step(module, options()) == pytest.approx(1.0, abs=0.01)  # all is kept: under 10⁹ elements
    some = gathers_per_micro_step(module, options(max_reuse_distance=40_000_000))
    assert 1.0 < some < 2.0
