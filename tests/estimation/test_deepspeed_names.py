"""DeepSpeed's names: its signatures, our figures."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn

from tritonspeed import estimation
from tritonspeed.estimation import deepspeed_names as names

SIGNATURES = {  # of DeepSpeed 0.19
    "estimate_zero2_model_states_mem_needs": "total_params num_gpus_per_node=1 num_nodes=1 cpu_offload=True"
    " additional_buffer_factor=1.5",
    "estimate_zero3_model_states_mem_needs": "total_params largest_layer_params num_gpus_per_node=1 num_nodes=1"
    " cpu_offload=True cpu_offload_params=True zero_init=True additional_buffer_factor=1.5",
    "estimate_zero2_model_states_mem_needs_all_live": "model num_gpus_per_node=1 num_nodes=1"
    " additional_buffer_factor=1.5",
    "estimate_zero2_model_states_mem_needs_all_cold": "total_params num_gpus_per_node=1 num_nodes=1"
    " additional_buffer_factor=1.5",
    "estimate_zero3_model_states_mem_needs_all_live": "model num_gpus_per_node=1 num_nodes=1"
    " additional_buffer_factor=1.5",
    "estimate_zero3_model_states_mem_needs_all_cold": "total_params largest_layer_params num_gpus_per_node=1"
    " num_nodes=1 additional_buffer_factor=1.5",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(estimation, name)).parameters.values()
    empty = inspect.Parameter.empty
    got = [p.name if p.default is empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(got) == SIGNATURES[name]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(8))


def test_live_is_logged_and_returned(caplog):
    with caplog.at_level(logging.INFO, "tritonspeed"), torch.device("meta"):
        text = names.estimate_zero3_model_states_mem_needs_all_live(Model(), num_gpus_per_node=2)
    assert caplog.messages == [text]
    rows = text.splitlines()[2:]
    assert [row.split("| ")[-1] for row in rows] == [
        "offload_param=cpu, offload_optimizer=cpu, zero_init=1",
        "offload_param=cpu, offload_optimizer=cpu, zero_init=0",
        "offload_param=none, offload_optimizer=cpu, zero_init=1",
        "offload_param=none, offload_optimizer=cpu, zero_init=0",
        "offload_param=none, offload_optimizer=none, zero_init=1",
        "offload_param=none, offload_optimizer=none, zero_init=0",
    ]
    assert "8,396,800 parameters, 1 node(s) of 2" in text


def test_cold_is_live_on_an_assumed_shape():
    text = names.estimate_zero2_model_states_mem_needs_all_cold(1_000_000_000, num_gpus_per_node=4)
    assert len(text.splitlines()) == 4
    device = [float(row.split("|")[1]) for row in text.splitlines()[2:]]
    assert device[0] < device[1]  # the optimizer went to the host


def test_stage_2_without_offload_is_two_bytes_and_sixteen_over_the_ranks():
    host, device = names.estimate_zero2_model_states_mem_needs(1e9, 8, 1, cpu_offload=False)
    assert device == pytest.approx((2 + 16 / 8) * 1e9, rel=0.25)  # and a gradient on its way
    assert host == pytest.approx(1.5 * 8 * 4 * 1e9, rel=0.01)  # each rank builds it whole, in fp32


def test_offload_moves_twelve_bytes_to_the_host():
    args = {"num_gpus_per_node": 8, "additional_buffer_factor": 1.0}
    host, device, largest = names.estimate_zero3_model_states_mem_needs(1e9, 5e7, **args)
    _, resident, _ = names.estimate_zero3_model_states_mem_needs(
        1e9, 5e7, cpu_offload=False, cpu_offload_params=False, **args
    )
    assert largest == 4 * 5e7
    assert host >= 12e9
    assert device < resident
