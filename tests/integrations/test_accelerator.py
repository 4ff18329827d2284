"""get_accelerator(): every question of DeepSpeed's has an answer of the device that is here, or an error by name."""

from __future__ import annotations

import pytest
import torch

from tritonspeed.integrations.accelerator import Accelerator, get_accelerator

QUESTIONS = """
use_host_timers resolves_data_dependency handles_memory_backpressure is_synchronized_device device_name
current_device current_device_name device_count synchronize random get_rng_state initial_seed current_stream
default_stream empty_cache memory_allocated max_memory_allocated reset_max_memory_allocated memory_cached
max_memory_cached reset_max_memory_cached memory_stats reset_peak_memory_stats memory_reserved max_memory_reserved
total_memory available_memory is_available range_pop communication_backend_name is_triton_supported is_bf16_supported
is_fp16_supported supported_dtypes is_current_stream_capturing create_graph BFloat16Tensor ByteTensor DoubleTensor
FloatTensor HalfTensor IntTensor LongTensor visible_devices_envs export_envs get_compile_backend
"""


@pytest.mark.parametrize("name", QUESTIONS.split())
def test_it_answers(name: str) -> None:
    getattr(get_accelerator(), name)()


def test_what_is_not_provided_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"get_accelerator\(\)\.create_op_builder is not provided"):
        get_accelerator().create_op_builder("CPUAdamBuilder")
    assert not hasattr(get_accelerator(), "create_op_builder")


def test_its_device_is_where_tensors_go() -> None:
    here = get_accelerator()
    tensor = torch.ones(2, device=here.device())
    assert here.on_accelerator(tensor) and here.current_device_name().startswith(here.device_name())
    assert torch.equal(here.LongTensor([1, 2]), torch.tensor([1, 2], device=here.device_name()))
    assert here.lazy_call(lambda: 3) == 3
    env: dict[str, str] = {}
    here.set_visible_devices_envs(env, [0, 2])
    assert env == {"CUDA_VISIBLE_DEVICES": "0,2"}
    assert isinstance(here, Accelerator) and get_accelerator() is here


def test_its_generator_is_the_devices() -> None:
    here = get_accelerator()
    here.manual_seed(3)
    state = here.get_rng_state()
    first = torch.rand(2, device=here.device_name())
    here.set_rng_state(state)
    assert torch.equal(torch.rand(2, device=here.device_name()), first)


def test_memory_is_in_order() -> None:
    here = get_accelerator()
    held = torch.ones(1000, device=here.device_name())
    assert 0 < here.memory_allocated() <= here.max_memory_allocated() <= here.total_memory()
    assert here.memory_stats()["allocated_bytes.all.current"] >= held.nbytes
