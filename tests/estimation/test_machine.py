"""Machines: the table, and what is measured here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tritonspeed.estimation.calibrate import calibrate
from tritonspeed.estimation.machine import GPUS, LINKS, Machine, machine_of
from tritonspeed.tuning.timing import PEAKS


@pytest.mark.parametrize("gpu", GPUS)
def test_the_table_is_whole(gpu):
    machine = machine_of(gpu)
    assert all(machine.speed_of(link) > 0 for link in LINKS)
    assert machine.flops_per_s["bf16"] > machine.flops_per_s["fp32"]
    assert machine.device_bytes < machine.host_bytes < machine.disk_bytes
    assert machine.device_memory_bytes_per_s > machine.host_memory_bytes_per_s > machine.to_device_bytes_per_s


def test_a_card_is_found_by_the_drivers_name_and_peaks_stand_once():
    machine = machine_of("nvidia h100 80gb hbm3")
    assert machine == machine_of("h100")
    assert machine.flops_per_s["bf16"] == PEAKS["NVIDIA H100 80GB HBM3"].bf16_tflop_per_s * 1e12


def test_what_is_known_better_is_set():
    assert machine_of("H100", host_bytes=128 * 2**30).host_bytes == 128 * 2**30
    with pytest.raises(ValueError, match="host_bytes is 0"):
        machine_of("H100", host_bytes=0)
    with pytest.raises(ValueError, match="efficiency is 1.5"):
        machine_of("H100", efficiency=1.5)
    with pytest.raises(ValueError, match="'Voodoo 2' is not in the table: one of H100"):
        machine_of("Voodoo 2")


def test_what_a_node_shares():
    gpu = machine_of("H100")
    shared = {link for link in LINKS if gpu.is_per_node(link)}
    assert shared == {"network_between", "host_memory", "disk_read", "disk_write"}
    cpu = dataclasses.replace(gpu, shares_memory=True)
    assert {link for link in LINKS if cpu.is_per_node(link)} == shared | {"compute", "device_memory", "network_inside"}


def test_calibrate_measures_this_machine(tmp_path):
    machine = calibrate(tmp_path, seconds=0.5)
    for link in LINKS:
        assert machine.speed_of(link) > 1e6, link
    figures = {field.name for field in dataclasses.fields(Machine)} - {"name", "num_devices", "shares_memory", "how"}
    assert set(machine.how) == figures  # each with how it was got
    assert machine.shares_memory is not torch.cuda.is_available()
    assert not list(tmp_path.iterdir())


def test_calibrate_refuses_what_it_cannot_measure(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        calibrate(tmp_path / "absent")
    with pytest.raises(ValueError, match="0 seconds"):
        calibrate(tmp_path, seconds=0)


def measure(folder: str) -> Machine:
    return calibrate(folder, seconds=0.5)


def test_ranks_time_their_network_and_agree(ranks, tmp_path):
    first, second = ranks(2, measure, str(tmp_path))
    assert first == second
    assert "2 ranks on 1 hosts" in first.how["network_inside_bytes_per_s"]
    assert "not measured" in first.how["network_between_bytes_per_s"]
