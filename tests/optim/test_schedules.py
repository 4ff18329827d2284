"""The five schedules against DeepSpeed's recorded values, and what stands around them.

recorded_schedules.json is written by bench/peers/record_schedules.py where DeepSpeed is installed.
"""

import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tritonspeed.optim.schedules import (
    SCHEDULES,
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

CASES = json.loads((Path(__file__).parent / "recorded_schedules.json").read_text())["cases"]
# The same float64 operations in the same order; only log and cos may differ between C libraries, by an ulp or two.
REL_TOL = 4 * sys.float_info.epsilon


def make_optimizer(lrs=(1e-3,), name="Adam"):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return getattr(torch.optim, name)(groups, lr=1e-3)


def group_lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def build(case):
    optimizer = make_optimizer(case["lrs"], case["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # totals shorter than the warm-up are among the cases
        return optimizer, SCHEDULES[case["type"]](optimizer, **case["params"])


def close(got, expected):
    return len(got) == len(expected) and all(
        math.isclose(a, b, rel_tol=REL_TOL, abs_tol=0.0) for a, b in zip(got, expected, strict=True)
    )


def case_id(case):
    return f"{case['type']}-{'-'.join(case['params'])}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_deepspeed_over_200_steps(case):
    optimizer, schedule = build(case)
    rows = {row["t"]: row for row in case["rows"]}
    first = min(rows)
    assert max(rows) - first == 200
    for t in range(first, max(rows) + 1):
        if t > first:
            schedule.step()
        assert schedule.last_batch_iteration == t
        if t not in rows:
            continue
        assert close(group_lrs(optimizer), rows[t]["lr"]), (t, group_lrs(optimizer), rows[t]["lr"])
        for group, betas in zip(optimizer.param_groups, rows[t].get("betas", []), strict=False):
            assert close(group["betas"], betas), (t, group["betas"], betas)


def test_every_schedule_is_recorded():
    assert {case["type"] for case in CASES} == set(VALID_LR_SCHEDULES)
    assert VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_resumes_from_its_state(case):
    optimizer, schedule = build(case)
    for _ in range(57):
        schedule.step()
    resumed_optimizer, resumed = build(case)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for _ in range(3):  # equal at once, not only after the next step
        assert group_lrs(resumed_optimizer) == group_lrs(optimizer)
        assert resumed.get_last_lr() == schedule.get_last_lr()
        assert [g.get("betas") for g in resumed_optimizer.param_groups] == [
            g.get("betas") for g in optimizer.param_groups
        ]
        schedule.step()
        resumed.step()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_lrs_at_looks_ahead_without_touching_the_optimizer(case):
    optimizer, schedule = build(case)
    before = group_lrs(optimizer)
    ahead = [schedule.lrs_at(t) for t in range(schedule.last_batch_iteration + 1, 90)]
    assert group_lrs(optimizer) == before
    for lrs in ahead:
        schedule.step()
        assert group_lrs(optimizer) == lrs == schedule.get_lr() == schedule.get_last_lr()


def test_the_first_training_step_runs_at_the_minimum():
    optimizer = make_optimizer([0.5, 0.7])
    schedule = WarmupLR(optimizer, warmup_min_lr=[0.1, 0.2], warmup_num_steps=10)
    assert group_lrs(optimizer) == [0.1, 0.2] == schedule.get_last_lr()
    assert schedule.last_batch_iteration == -1
    schedule.step()  # t = 0: log(1) = 0, so the second training step runs at the minimum too
    assert group_lrs(optimizer) == [0.1, 0.2]
    schedule.step()
    assert all(low < lr for low, lr in zip([0.1, 0.2], group_lrs(optimizer), strict=True))


def test_warmup_without_a_maximum_ends_at_the_optimizers_own_rate():
    optimizer = make_optimizer([3e-4, 7e-5])
    WarmupLR(optimizer, warmup_num_steps=5).step(5)
    assert group_lrs(optimizer) == [3e-4, 7e-5]
    WarmupDecayLR(optimizer, total_num_steps=20, warmup_max_lr=None, warmup_num_steps=5).step(5)
    assert group_lrs(optimizer) == [3e-4, 7e-5]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 2.0])
def test_a_warmup_shorter_than_two_steps_counts_as_two(num_steps):
    schedule = WarmupLR(make_optimizer([1.0]), warmup_num_steps=num_steps)
    assert [schedule.lrs_at(t) for t in (0, 1, 2)] == [[0.0], [1.0], [1.0]]


def test_a_given_iteration_is_jumped_to():
    optimizer = make_optimizer([1.0])
    schedule = WarmupLR(optimizer, warmup_num_steps=100, warmup_type="linear")
    schedule.step(50)
    assert group_lrs(optimizer) == [0.5] and schedule.state_dict() == {"last_batch_iteration": 50}


def test_a_tensor_rate_is_written_in_place():
    optimizer = make_optimizer([torch.tensor(0.25)])
    lr = optimizer.param_groups[0]["lr"]
    schedule = WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    assert lr.item() == 0.0
    schedule.step(3)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == 0.1875
    assert schedule.get_last_lr() == [0.1875]


def test_one_cycle_sets_betas_at_once_and_leaves_them_alone_when_told_to():
    optimizer = make_optimizer()
    schedule = OneCycle(optimizer, 1e-4, 1e-2, cycle_first_step_size=10)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99) and schedule.get_mom() == [(0.8, 0.99)]
    optimizer = make_optimizer()
    assert OneCycle(optimizer, 1e-4, 1e-2, cycle_momentum=False).get_mom() is None
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_one_cycle_says_that_there_are_no_betas():
    with pytest.warns(UserWarning, match="SGD has no betas"):
        schedule = OneCycle(make_optimizer(name="SGD"), 1e-4, 1e-2)
    schedule.step()
    assert "betas" not in schedule.optimizer.param_groups[0]


@pytest.mark.parametrize("make", [lambda o: WarmupDecayLR(o, 5), lambda o: WarmupCosineLR(o, 5)])
def test_a_total_shorter_than_the_warmup_is_said(make):
    with pytest.warns(UserWarning, match="total_num_steps 5 is less than warmup_num_steps 1000"):
        make(make_optimizer())


def test_no_rate_is_reported_before_one_was_set():
    optimizer = make_optimizer([0.3])
    schedule = WarmupLR(optimizer, warmup_num_steps=10, last_batch_iteration=4)
    assert group_lrs(optimizer) == [0.3]
    with pytest.raises(ValueError, match="last_batch_iteration=4.*call step"):
        schedule.get_last_lr()
    schedule.step()
    assert schedule.get_last_lr() == group_lrs(optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: WarmupLR(o, warmup_max_lr=[1.0, 2.0, 3.0]), "warmup_max_lr has 3 values.* 2 parameter groups"),
        (lambda o: WarmupLR(o, warmup_num_steps=-1), "warmup_num_steps is -1"),
        (lambda o: WarmupLR(o, warmup_num_steps=2.5), "warmup_num_steps is 2.5"),
        (lambda o: WarmupLR(o, warmup_type="exp"), "warmup_type is 'exp'"),
        (lambda o: LRRangeTest(o, lr_range_test_step_size=0), "lr_range_test_step_size is 0"),
        (lambda o: OneCycle(o, 1e-4, 1e-2, cycle_first_step_size=0), "cycle_first_step_size 0 must be positive"),
        (lambda o: OneCycle(o, 1e-4, 1e-2, cycle_second_step_size=-3), "cycle_second_step_size -3"),
        (lambda o: WarmupLR(object()), "param_groups, got object"),
        (lambda o: WarmupLR(o).load_state_dict({"epoch": 3}), "not a schedule's state.*epoch"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_optimizer([0.1, 0.2]))
