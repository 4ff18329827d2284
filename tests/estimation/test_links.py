"""The closed forms: against a worked table by hand, the papers' figures, and what a real run sends."""

from __future__ import annotations

import math

import pytest

from tritonspeed.estimation.links import achieved, time_of, tokens_to_hide
from tritonspeed.estimation.machine import BETWEEN, INSIDE, LINKS, machine_of
from tritonspeed.estimation.traffic import Workload, bytes_of, total_bytes
from tritonspeed.offload import Tier
from tritonspeed.zero.stages import STAGES

GB = 1e9
TOKENS = 32_768
NODE = machine_of("H100", efficiency=495 / 989)  # 490 GB/s of memory, PCIe 55, disks 48 and 26
SINGLE = machine_of(
    "H100", efficiency=495 / 989, num_devices=1, host_memory_bytes_per_s=245 * GB, disk_read_bytes_per_s=10 * GB,
    disk_write_bytes_per_s=5 * GB,
)  # fmt: skip


def offloaded(params, world, tier=Tier.HOST, **more):
    return Workload(params, TOKENS, STAGES[3], world=world, ranks_per_node=world, optimizer=tier, **more)


# parameters, machine, ranks: compute, update in host memory, PCIe each way, disk read, disk write, all in seconds
WORKED = [
    (7e9, NODE, 8, (2.78, 0.40, 0.03, 1.75, 3.23)),
    (70e9, NODE, 8, (27.8, 4.0, 0.32, 17.5, 32.3)),
    (7e9, SINGLE, 1, (2.78, 0.80, 0.25, 8.4, 16.8)),
]


@pytest.mark.parametrize(("params", "machine", "world", "want"), WORKED)
def test_the_worked_table(params, machine, world, want):
    step = time_of(offloaded(params, world, Tier.DISK), machine)
    update_s = bytes_of(offloaded(params, world))["optimizer"]["host_memory"] * world
    update_s = (update_s - 2 * params) / machine.host_memory_bytes_per_s  # without the copy to the device
    pcie_s = step.seconds_of["to_host"]
    assert step.seconds_of["to_device"] == pytest.approx(pcie_s)
    got = (step.seconds_of["compute"], update_s, pcie_s, step.seconds_of["disk_read"], step.seconds_of["disk_write"])
    for found, expected in zip(got, want, strict=True):
        assert found == pytest.approx(expected, rel=0.03, abs=0.005)  # the table's own two digits


@pytest.mark.parametrize(("machine", "world", "disk", "memory"), [(NODE, 8, 38e3, 4.7e3), (SINGLE, 1, 198e3, 9.4e3)])
def test_tokens_that_hide_the_optimizer_under_the_whole_step(machine, world, disk, memory):
    params = 7e9
    step = time_of(offloaded(params, world, Tier.DISK), machine)
    assert tokens_to_hide(step.seconds_of["disk_write"], params, machine) == pytest.approx(disk, rel=0.01)
    update_s = 28 * params / machine.host_memory_bytes_per_s
    assert tokens_to_hide(update_s, params, machine) == pytest.approx(memory, rel=0.01)


@pytest.mark.parametrize(("machine", "world", "want"), [(NODE, 8, 750), (SINGLE, 1, 6000)])
def test_tokens_that_hide_offloaded_parameters(machine, world, want):
    work = offloaded(7e9, world, parameters=Tier.HOST)
    fetched_s = time_of(work, machine).seconds_of["to_device"]
    assert tokens_to_hide(fetched_s, 7e9, machine) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(("stage", "accumulation", "per_param"), [
    (0, 1, 6), (0, 4, 8), (1, 1, 4), (1, 4, 6), (2, 1, 4), (2, 4, 10), (3, 1, 6), (3, 4, 24),
])  # fmt: skip
def test_what_a_rank_receives(stage, accumulation, per_param):
    """ZeRO's volumes: 2Ψ elements at stages 1 and 2, 3Ψ at stage 3. Ours at stage 0 gathers fp32 sums."""
    work = Workload(1e9, 1, STAGES[stage], world=64, ranks_per_node=8, accumulation=accumulation)
    totals = total_bytes(work)
    assert totals[INSIDE] + totals[BETWEEN] == pytest.approx(per_param * 1e9 * 63 / 64)
    # what comes from other nodes enters a node once: 7 of 8 nodes' shares, for eight ranks
    assert 8 * totals[BETWEEN] == pytest.approx(per_param * 1e9 * 7 / 8)


def test_one_node_has_no_network_between_and_one_rank_none_at_all():
    assert BETWEEN not in total_bytes(Workload(1e9, 1, STAGES[3], world=8, ranks_per_node=8))
    assert INSIDE not in total_bytes(Workload(1e9, 1, STAGES[3], world=8, ranks_per_node=1))
    assert not {INSIDE, BETWEEN} & set(total_bytes(Workload(1e9, 1, STAGES[3])))


def test_an_element_of_the_update_is_28_bytes_and_on_disk_12_each_way():
    work = Workload(1, 1, STAGES[0])
    assert work.update_bytes == 28  # read 4+4+4+2, write 4+4+4+2
    assert work.state_bytes == 12
    assert Workload(1, 1, STAGES[0], moment_bytes=4).update_bytes == 20  # two bf16 moments
    assert Workload(1, 1, STAGES[0], compute_bytes=4, dtype="fp32").update_bytes == 28  # no rounded copy, 4 of gradient
    assert Workload(1, 1, STAGES[0], accumulation=2).update_bytes == 30  # gradients summed in fp32


def test_gradients_cross_once_as_16_bits_and_so_do_parameters():
    totals = total_bytes(Workload(1e9, 1, STAGES[2], optimizer=Tier.HOST))
    assert totals["to_host"] == totals["to_device"] == 2e9
    assert "device_memory" not in totals


def test_a_part_stays_on_the_device():
    totals = total_bytes(Workload(1e9, 1, STAGES[2], optimizer=Tier.HOST, ratio=0.25))
    assert totals["to_host"] == 0.5e9
    assert totals["device_memory"] == pytest.approx(0.75e9 * 28)


def test_parameters_on_disk_are_read_for_every_gather_and_written_once():
    work = offloaded(8e9, 8, Tier.DISK, parameters=Tier.DISK, accumulation=3)
    totals = total_bytes(work)
    assert totals["disk_read"] == pytest.approx(12e9 + 4 * 3 * 1e9)
    assert totals["disk_write"] == pytest.approx(12e9 + 2e9)
    half = total_bytes(offloaded(8e9, 8, Tier.DISK, parameters=Tier.DISK, accumulation=3, cached=0.5))
    assert half["disk_read"] == pytest.approx(12e9 + 2 * 3 * 1e9)


def test_where_memory_is_shared_nothing_crosses():
    work = Workload(1e9, 1, STAGES[3], optimizer=Tier.HOST, parameters=Tier.HOST, shares_memory=True)
    assert set(total_bytes(work)) == {"compute", "host_memory"}
    assert total_bytes(work)["host_memory"] == 28e9


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_overlapped_is_backward_and_the_longer_of_forward_and_optimizer(tier):
    for tokens in (10, TOKENS, 1_000_000):
        work = Workload(7e9, tokens, STAGES[3], world=8, ranks_per_node=8, optimizer=tier)
        step = time_of(work, NODE)
        forward, backward, optimizer = (step.phase_seconds[name] for name in ("forward", "backward", "optimizer"))
        assert step.serial_seconds == pytest.approx(forward + backward + optimizer)
        assert step.overlapped_seconds == pytest.approx(backward + max(forward, optimizer))
        assert step.seconds == step.overlapped_seconds


def test_a_link_that_both_use_is_waited_for_twice():
    step = time_of(offloaded(7e9, 8, Tier.DISK, parameters=Tier.DISK, gathers=3), NODE)
    forward, optimizer = step.phase_seconds["forward"], step.phase_seconds["optimizer"]
    assert step.overlapped_seconds >= step.phase_seconds["backward"] + max(forward, optimizer)
    slow = machine_of("H100", disk_read_bytes_per_s=1 * GB)
    step = time_of(offloaded(7e9, 8, Tier.DISK, parameters=Tier.DISK), slow)
    reads = bytes_of(offloaded(7e9, 8, Tier.DISK, parameters=Tier.DISK))
    both = 8 * (reads["forward"]["disk_read"] + reads["optimizer"]["disk_read"]) / GB
    assert step.overlapped_seconds == pytest.approx(step.phase_seconds["backward"] + both)
    assert step.binding == "disk_read"


def test_enough_tokens_hide_the_offload_and_fewer_do_not():
    hide = time_of(offloaded(7e9, 8, Tier.DISK), NODE).tokens_to_hide
    assert hide == pytest.approx(3 * 38e3, rel=0.01)  # under forward alone, a third of the step
    for share, hidden in ((1.01, True), (0.9, False)):
        work = Workload(7e9, share * hide, STAGES[3], world=8, ranks_per_node=8, optimizer=Tier.DISK)
        step = time_of(work, NODE)
        assert (step.seconds == pytest.approx(step.seconds_of["compute"])) is hidden


def test_only_stage_3_hides_it():
    for number in (0, 1, 2):
        work = Workload(7e9, TOKENS, STAGES[number], world=8, ranks_per_node=8, optimizer=Tier.HOST)
        step = time_of(work, NODE)
        assert step.tokens_to_hide is None
        assert step.seconds == step.serial_seconds


def test_a_disk_of_one_lane_adds_reading_and_writing():
    work = offloaded(7e9, 8, Tier.DISK)
    both = time_of(work, machine_of("H100", disk_is_duplex=False)).phase_seconds["optimizer"]
    assert both == pytest.approx(12 * 7e9 / 48e9 + 12 * 7e9 / 26e9)


def test_recomputing_adds_a_forward():
    plain, again = (total_bytes(Workload(7e9, 1e6, STAGES[2], recomputes=r))["compute"] for r in (False, True))
    assert (plain, again) == (6 * 7e9 * 1e6, 8 * 7e9 * 1e6)


def test_ranks_that_do_not_fit_the_nodes_are_refused():
    with pytest.raises(ValueError, match="12 ≠ nodes × 8"):
        Workload(1, 1, STAGES[0], world=12, ranks_per_node=8)
    with pytest.raises(ValueError, match="16 ranks on a node, but H100 has 8 devices"):
        time_of(Workload(1, 1, STAGES[0], world=16, ranks_per_node=16), machine_of("H100"))


def test_achieved_over_bound():
    links = {"disk read": (24e9, 1.0), "host_memory": (49e9, 0.2), "to_host": (0, 0.0)}
    rows = {row.link: row for row in achieved(links, NODE, ranks_per_node=2)}
    assert set(rows) == {"disk_read", "host_memory"}
    assert rows["disk_read"].bound_bytes_per_s == 24e9  # half of the node's
    assert rows["disk_read"].share == pytest.approx(1.0)
    assert rows["host_memory"].share == pytest.approx(1.0)
    assert str(rows["disk_read"]) == "disk read: 22.35 GiB in 1.00 s, 24.00 of 24.00 GB/s (100%)"
    with pytest.raises(ValueError, match="carrier_pigeon"):
        achieved({"carrier_pigeon": (1, 1.0)}, NODE)


def test_every_link_has_a_speed():
    for link in LINKS:
        assert math.isfinite(NODE.speed_of(link))
        assert NODE.speed_of(link) > 0
