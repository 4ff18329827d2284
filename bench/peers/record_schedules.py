"""Record what DeepSpeed's five learning-rate schedules do, as the oracle of tests/optim/test_schedules.py.

    VENV/bin/python bench/peers/record_schedules.py OUT.json [--every-step]

VENV is the peers' environment (setup.sh). Nothing of this project is imported. For each case an optimizer with the
given groups is built, then the schedule, which is stepped 200 times; learning rates and betas are those that stand in
the optimizer's groups, at t = -1 (before any step), at the first 25 iterations and at every seventh after.
"""

import argparse
import json
from pathlib import Path

import torch

NUM_STEPS = 200
DENSE_STEPS, STRIDE = 25, 7  # every step would be 100 KB; --every-step records them for a check by hand

ADAM, SGD = "Adam", "SGD"
CASES = [
    # (schedule, its params, optimizer, learning rates of the groups)
    ("WarmupLR", {"warmup_num_steps": 30}, ADAM, [3e-4]),
    ("WarmupLR", {"warmup_min_lr": 1e-5, "warmup_max_lr": 2e-3, "warmup_num_steps": 17}, ADAM, [3e-4]),
    ("WarmupLR", {"warmup_num_steps": 40, "warmup_type": "linear"}, SGD, [0.1, 0.01]),
    ("WarmupLR", {"warmup_min_lr": [0.0, 1e-6], "warmup_max_lr": [1e-3, 5e-3], "warmup_num_steps": 1}, SGD, [0.1, 1.0]),
    ("WarmupLR", {"warmup_num_steps": 30, "last_batch_iteration": 9}, ADAM, [3e-4]),
    ("WarmupDecayLR", {"total_num_steps": 150, "warmup_num_steps": 20}, ADAM, [3e-4]),
    (
        "WarmupDecayLR",
        {
            "total_num_steps": 180,
            "warmup_min_lr": 2e-5,
            "warmup_max_lr": [1e-2, 3e-2],
            "warmup_num_steps": 33,
            "warmup_type": "linear",
        },
        SGD,
        [1.0, 2.0],
    ),
    ("WarmupDecayLR", {"total_num_steps": 10, "warmup_max_lr": 0.05, "warmup_num_steps": 25}, ADAM, [3e-4]),
    ("WarmupCosineLR", {"total_num_steps": 170, "warmup_num_steps": 25}, ADAM, [6e-4]),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 190,
            "warmup_min_ratio": 0.1,
            "warmup_num_steps": 12,
            "cos_min_ratio": 0.05,
            "warmup_type": "linear",
        },
        SGD,
        [0.3, 0.7],
    ),
    ("WarmupCosineLR", {"total_num_steps": 5, "warmup_num_steps": 9}, ADAM, [6e-4]),
    ("LRRangeTest", {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 13}, SGD, [0.1]),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": [1e-4, 2e-3],
            "lr_range_test_step_size": 11,
            "lr_range_test_step_rate": 2.5,
            "lr_range_test_staircase": True,
        },
        ADAM,
        [0.1, 0.2],
    ),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 40}, ADAM, [1e-3]),
    (
        "OneCycle",
        {
            "cycle_min_lr": [1e-4, 3e-4],
            "cycle_max_lr": [1e-2, 5e-2],
            "decay_lr_rate": 0.3,
            "cycle_first_step_size": 21,
            "cycle_second_step_size": 37,
            "decay_step_size": 10,
            "cycle_min_mom": [0.7, 0.85],
            "cycle_max_mom": 0.95,
            "decay_mom_rate": 0.01,
        },
        ADAM,
        [1e-3, 1e-3],
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 30,
            "cycle_second_step_size": 50,
            "cycle_first_stair_count": 4,
            "cycle_second_stair_count": 7,
            "decay_step_size": 5,
            "decay_lr_rate": 0.1,
        },
        ADAM,
        [1e-3],
    ),
    (
        "OneCycle",
        {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-1, "cycle_first_step_size": 30, "cycle_momentum": False},
        SGD,
        [1e-3],
    ),
]


def record(schedules, name: str, params: dict, optimizer_name: str, lrs: list[float], every_step: bool) -> dict:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = getattr(torch.optim, optimizer_name)(groups, lr=1e-3)
    schedule = getattr(schedules, name)(optimizer, **params)
    rows = []
    for step in range(NUM_STEPS + 1):
        if every_step or step <= DENSE_STEPS or step % STRIDE == 0 or step == NUM_STEPS:
            row = {"t": schedule.last_batch_iteration, "lr": [group["lr"] for group in optimizer.param_groups]}
            if name == "OneCycle" and optimizer_name == ADAM:
                row["betas"] = [list(group["betas"]) for group in optimizer.param_groups]
            rows.append(row)
        if step < NUM_STEPS:
            optimizer.step()
            schedule.step()
    return {"type": name, "params": params, "optimizer": optimizer_name, "lrs": lrs, "rows": rows}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--every-step", action="store_true")
    chosen = arguments.parse_args()

    import deepspeed
    from deepspeed.runtime import lr_schedules

    cases = [record(lr_schedules, *case, chosen.every_step) for case in CASES]
    head = {"source": f"deepspeed {deepspeed.__version__}, deepspeed.runtime.lr_schedules", "cases": []}
    lines = ",\n".join(json.dumps(case) for case in cases)  # one line for each case, so that a diff shows which moved
    chosen.out.write_text(json.dumps(head)[:-2] + "\n" + lines + "\n]}\n")
    print(f"{len(cases)} cases → {chosen.out}")


if __name__ == "__main__":
    main()
