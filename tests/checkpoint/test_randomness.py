"""Random generators go on where they stood, through the JSON of a checkpoint."""

import json
import random

import numpy as np
import pytest
import torch

from tritonspeed import checkpointing
from tritonspeed.checkpoint.randomness import random_state, set_random_state
from tritonspeed.checkpoint.tree import decode, encode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged():
    before, regions = random_state(CPU), checkpointing.get_cuda_rng_tracker().get_states()
    yield
    set_random_state(before)
    checkpointing.get_cuda_rng_tracker().set_states(regions)


def draw():
    states = checkpointing.get_cuda_rng_tracker()
    drawn = [torch.rand(3).tolist(), torch.randn(()).item(), np.random.rand(3).tolist(), np.random.randn()]
    drawn += [random.random(), random.gauss(0, 1)]
    if states.get_states():
        with states.fork():
            drawn.append(torch.rand(2).tolist())
    return drawn


def through_json(state):
    content, tensors = encode(state, "random")
    return decode(json.loads(json.dumps(content)), tensors)


@pytest.mark.parametrize("regions", [False, True])
def test_draws_after_a_restore_are_the_draws_after_the_save(regions):
    if regions:
        checkpointing.model_parallel_cuda_manual_seed(5)
    draw()  # half of a pair of normal numbers waits in numpy's and Python's generators
    state = through_json(random_state(CPU))
    wanted = [draw(), draw()]
    draw()
    set_random_state(state, CPU)
    assert [draw(), draw()] == wanted


def test_what_is_absent_is_left_alone():
    state = random_state(CPU)
    first = draw()
    set_random_state({"numpy": state["numpy"]})
    drawn = draw()
    assert drawn[2:4] == first[2:4]
    assert drawn[0] != first[0] and drawn[4] != first[4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", "x"),
        ("torch", torch.zeros(5056)),
        ("numpy", {"bit_generator": "MT19937"}),
        ("numpy", {"bit_generator": "PCG64", "state": {}}),
        ("python", {"version": 3, "words": np.zeros(3, np.uint32), "gauss": None}),
        ("python", {"version": 9, "words": np.zeros(625, np.uint32), "gauss": None}),
        ("python", [1]),
        ("regions", {"device": "cuda" if torch.cuda.is_available() else "cpu", "states": {"a": torch.zeros(2)}}),
    ],
)
def test_what_is_no_state_is_refused_and_nothing_is_set(name, value):
    state = {**random_state(CPU), name: value}
    draw()
    before = through_json(random_state(CPU))
    with pytest.raises(ValueError, match=f"random state '{name}' is not one of its generator"):
        set_random_state(state)
    wanted = draw()
    set_random_state(before)
    assert draw() == wanted


def test_a_gpu_s_state_is_left_alone_where_there_is_none():
    set_random_state({"cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)


@pytest.mark.gpu
def test_the_device_s_generator_goes_on():
    device = torch.device("cuda", 0)
    state = through_json(random_state(device))
    wanted = torch.rand(4, device=device).tolist()
    set_random_state(state, device)
    assert torch.rand(4, device=device).tolist() == wanted
