"""The closed forms against a run: bytes that two ranks really receive, bytes that go to disk and come from there."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from models import Net, batch

import tritonspeed as ts
from tritonspeed import comm
from tritonspeed.estimation.links import achieved
from tritonspeed.estimation.machine import BETWEEN, INSIDE, machine_of

WITHIN = 0.03  # padding of pages and boundaries, which the closed forms do not know
WARM_UP_STEPS = 2  # the first learns the order of units, the second follows it


def model() -> Net:
    return Net(vocab=512, width=256, depth=3)


def config(stage: int, accumulation: int = 1, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }


class Received:
    """Bytes that come to this rank from others: what it gathers, and what is summed into its slice."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._gather, self._scatter = comm.all_gather_, comm.reduce_scatter

    def __enter__(self) -> Received:
        comm.all_gather_, comm.reduce_scatter = self.gather, self.scatter
        return self

    def __exit__(self, *error: object) -> None:
        comm.all_gather_, comm.reduce_scatter = self._gather, self._scatter

    def _count(self, mesh: comm.Mesh, whole: Any) -> None:
        self.num_bytes += whole.nbytes * (mesh.world - 1) // mesh.world

    def gather(self, mesh, whole, *args, **kwargs):
        self._count(mesh, whole)
        return self._gather(mesh, whole, *args, **kwargs)

    def scatter(self, mesh, whole, *args, **kwargs):
        self._count(mesh, whole)
        return self._scatter(mesh, whole, *args, **kwargs)


def measure(settings: dict[str, Any]) -> tuple[int, dict[str, tuple[int, float]]]:
    """(bytes received, links) in a step that follows others, its late updates included."""
    engine, *_ = ts.initialize(model=model(), config=settings)
    rank, received = dist.get_rank() if dist.is_initialized() else 0, Received()

    def step(number: int) -> None:
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*batch(rank, 10 * number + micro, vocab=512)))
            engine.step()

    def links_since() -> dict[str, tuple[int, float]]:
        for bucket in engine.sharded.buckets:
            bucket.settle()
        return engine.sharded.homes.traffic()

    for number in range(WARM_UP_STEPS):
        step(number)
    links_since()
    with received:
        step(WARM_UP_STEPS)
    of_step, late = engine.last_step.links, links_since()
    links = {}
    for name, (num_bytes, seconds) in late.items():
        before = of_step.get(name, (0, 0.0))
        links[name] = (before[0] + num_bytes, before[1] + seconds)
    engine.destroy()
    return received.num_bytes, links


TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


@pytest.mark.parametrize(
    ("stage", "accumulation", "zero"),
    [(0, 1, {}), (0, 3, {}), (1, 1, {}), (1, 3, {}), (2, 1, {}), (2, 3, {}), (3, 1, TIGHT), (3, 2, TIGHT), (3, 1, {})],
)
def test_what_two_ranks_receive(ranks, stage, accumulation, zero):
    settings = config(stage, accumulation, **zero)
    want = ts.estimate(model(), settings, 2, device="cpu").link_bytes
    assert BETWEEN not in want
    for received, _ in ranks(2, measure, settings):
        assert received == pytest.approx(want[INSIDE], rel=WITHIN)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_goes_to_disk_and_comes_back(ranks, tmp_path, accumulation):
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    parameters = {**place, "max_in_cpu": 0}
    settings = config(3, accumulation, offload_optimizer=place, offload_param=parameters, **TIGHT)
    want = ts.estimate(model(), settings, 2, device="cpu").link_bytes
    for _, links in ranks(2, measure, settings):
        assert links["disk read"][0] == pytest.approx(want["disk_read"], rel=WITHIN)
        assert links["disk write"][0] == pytest.approx(want["disk_write"], rel=WITHIN)
        rows = {row.link: row for row in achieved(links, machine_of("H100"))}
        assert {"disk_read", "disk_write"} <= set(rows)
        assert all(row.bytes_per_s > 0 for row in rows.values())
