"""Offload through the engine: what a ds_config.json asks for, what is skipped, what fails, what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import make, said, settings
from models import Net, batch

import tritonspeed as ts
from tritonspeed.estimation import machine_of
from tritonspeed.offload.disk import DiskFlat

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}
TIERS = ("none", "cpu", "nvme")


def wide() -> Net:
    return Net(vocab=211, width=129, depth=2)


def config(tier: str, folder: str, stage: int = 3, **more: Any) -> dict[str, Any]:
    """The optimizer's part in a tier, and at stage 3 the parameters too."""
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if tier != "none":
        path = {"nvme_path": f"{folder}/{tier}-{stage}"} if tier == "nvme" else {}
        zero["offload_optimizer"] = {"device": tier, **path}
        if stage == 3:
            zero["offload_param"] = {"device": tier, "max_in_cpu": 0, **path}
    return settings(stage, optimizer=ADAMW, zero_optimization=zero, **more)


def train(given: dict[str, Any], steps: int = 6, poison: int | None = None) -> tuple[list, dict[str, torch.Tensor]]:
    """Reports of ``steps`` steps, and the weights; in step ``poison`` one gradient of one rank is not finite."""
    engine = make(given, wide)
    reports = []
    for step in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*batch(dist.get_rank(), 10 * step + micro))
            if step == poison and dist.get_rank() == dist.get_world_size() - 1:
                loss = loss * float("inf")
            engine.backward(loss)
            if micro == 0:
                engine.eval()
                with torch.no_grad():
                    engine(*batch(7, step))  # an evaluation between two backwards touches every unit
                engine.train()
            engine.step()
        reports.append(engine.last_step)
    found = engine.module_state_dict()
    engine.destroy()
    return reports, found


def tiers(folder: str, stage: int, more: dict[str, Any], poison: int | None) -> dict[str, Any]:
    return {tier: train(config(tier, folder, stage, **more), poison=poison) for tier in TIERS}


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": {"enabled": True}},
        {"bf16": {"enabled": True}, "gradient_accumulation_steps": 3},
        {"fp16": {"enabled": True, "initial_scale_power": 8}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.02}}},
    ],
    ids=["bf16", "bf16, accumulated", "fp16", "fp32, scheduled"],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_config_decides_where_state_lives_and_no_number_follows(ranks, tmp_path, stage, more):
    """Overflowing steps are skipped alike, and a schedule that has moved on is not seen by an update that runs late."""
    poison = 2 if "fp16" in more or "bf16" in more else None
    for got in ranks(2, tiers, str(tmp_path), stage, more, poison):
        reports, weights = got["none"]
        assert [r.skipped for r in reports] == [i == poison for i in range(len(reports))]
        for tier in TIERS[1:]:
            others, other_weights = got[tier]
            for a, b in zip(reports, others, strict=True):
                assert (a.loss, a.lr, a.skipped) == (b.loss, b.lr, b.skipped), tier
                assert a.grad_norm == b.grad_norm or (a.skipped and b.skipped), tier
            assert all(other_weights[n].equal(weights[n]) for n in weights), tier


def test_a_report_says_what_is_where(ranks, tmp_path):
    got = ranks(2, tiers, str(tmp_path), 3, {"bf16": {"enabled": True}}, None)[0]
    num = sum(p.numel() for p in wide().parameters()) / 2
    none, host, disk = (got[tier][0][-1] for tier in TIERS)
    assert none.host_bytes == none.disk_bytes == 0 and none.links == {}
    assert host.host_bytes == pytest.approx(12 * num, rel=0.05) and host.bytes_of["optimizer"] == 0
    assert disk.disk_bytes == pytest.approx((2 * 12 + 2) * num, rel=0.05) and disk.bytes_of["optimizer"] == 0
    assert {"disk read", "disk write"} <= set(disk.links)
    assert "disk" in str(disk) and "host" not in str(none)


def moved(folder: str, steps: int = 6) -> dict[str, int]:
    """Bytes over each link in all steps; which of them a step's report has follows the clock, their sum does not."""
    given = config("nvme", folder, bf16={"enabled": True})
    given["zero_optimization"]["stage3_max_reuse_distance"] = 0  # nothing stays from forward to backward
    engine = make(given, wide)
    links = []
    for number in range(steps):
        engine.backward(engine(*batch(dist.get_rank(), number)))
        engine.step()
        links.append(engine.last_step.links)
    engine.optimizer.late.finish()
    links.append(engine.sharded.homes.traffic())
    engine.destroy()
    return {link: sum(each.get(link, (0, 0.0))[0] for each in links) for link in ("disk read", "disk write")}


def test_reports_count_every_byte_that_went_to_disk(ranks, tmp_path):
    num, steps = sum(p.numel() for p in wide().parameters()) / 2, 6
    for got in ranks(2, moved, str(tmp_path), steps):
        # masters in every step, moments from the second on, a parameter in forward and backward
        assert got["disk read"] == pytest.approx((4 * steps + 8 * (steps - 1) + 2 * 2 * steps) * num, rel=0.05)
        # masters and parameters once at first, and all of it in every step
        assert got["disk write"] == pytest.approx((4 + 2 + (12 + 2) * steps) * num, rel=0.05)


def links(folder: str) -> tuple[list[str], list[str]]:
    """What is achieved against a machine of given speeds, and of this one, as lines."""
    engine = make(config("nvme", folder, bf16={"enabled": True}), wide)
    with pytest.raises(ValueError, match="none was made yet"):
        engine.achieved()
    for step in range(3):
        engine.backward(engine(*batch(0, step)))
        engine.step()
    slow = replace(machine_of("H100"), disk_read_bytes_per_s=1.0, disk_write_bytes_per_s=1.0)
    rows = engine.achieved(slow)
    assert all(row.share > 1 for row in rows if "disk" in row.link)  # anything is faster than a byte a second
    found = [row.link for row in rows], [str(row) for row in engine.achieved()]
    engine.destroy()
    return found


def test_the_engine_says_what_its_links_achieved(ranks, tmp_path):
    names, lines = ranks(1, links, str(tmp_path))[0]
    assert names == ["host_memory", "disk_read", "disk_write"]
    assert len(lines) == 3 and all("%" in line for line in lines)


def full(folder: str) -> tuple[str, str, dict[str, Any]]:
    """What is raised when the disk is full in the third step, and what the folder holds then."""
    engine = make(config("nvme", folder, bf16={"enabled": True}), wide)
    store, raised = DiskFlat.store, None

    def refuse(self: DiskFlat, lo: int, values: torch.Tensor) -> Any:
        if engine.optimizer.num_steps == 3 and self.contents.kind == "exp_avg":
            raise OSError(28, "No space left on device")
        return store(self, lo, values)

    DiskFlat.store = refuse
    try:
        for step in range(5):
            engine.backward(engine(*batch(0, step)))
            engine.step()
    except RuntimeError as error:
        raised = error
    finally:
        DiskFlat.store = store
    record = json.loads(next(Path(folder).rglob("committed.json")).read_text())
    return str(raised), repr(raised.__cause__ if raised else None), record


def test_a_full_disk_is_an_error_and_the_committed_step_stays(ranks, tmp_path):
    raised, cause, record = ranks(1, full, str(tmp_path))[0]
    assert "last committed step" in raised
    assert "No space left" in cause
    assert record["step"] == 2


def explained(folder: str) -> tuple[str, list[str]]:
    with said() as lines:
        engine = make(config("nvme", folder), wide)
    text = engine.explain()
    engine.destroy()
    return text, lines


def test_the_plan_says_where_units_live(ranks, tmp_path):
    text, _ = ranks(1, explained, str(tmp_path))[0]
    assert "disk + disk" in text


@pytest.mark.parametrize("stage", [2, 3])
def test_two_runs_do_not_share_a_folder(tmp_path, stage):
    first = make(config("nvme", str(tmp_path), stage), wide)
    with pytest.raises(ValueError, match="another run holds"):
        make(config("nvme", str(tmp_path), stage), wide)
    first.destroy()
    make(config("nvme", str(tmp_path), stage), wide).destroy()


def test_a_tier_that_a_stage_does_not_have_is_answered():
    with pytest.raises(ValueError, match="nvme_path"):
        make(
            settings(2, optimizer=ADAMW, zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}}), wide
        )
    assert ts.Offload(optimizer="disk", path=".").optimizer is ts.offload.Tier.DISK
    with pytest.raises(ValueError, match="the tiers are"):
        ts.Offload(optimizer="tape")
