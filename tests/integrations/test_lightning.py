"""Lightning's DeepSpeedStrategy, in its Trainer and in Fabric: the numbers of Lightning's DDP, at every stage the same.

Real DeepSpeed cannot be asked: on a CPU it fails under Lightning. `recorded/lightning_*-ddp.json` is what DDP gives
(``python -m bench.peers.matrix --record``).
"""

from __future__ import annotations

import json

import pytest
from script_cases import LIGHTNING, RECORDED
from script_runs import differences, run_case


@pytest.mark.parametrize("script", ["fit", "fabric_loop"])
def test_the_stages_have_ddps_numbers(script, tmp_path):
    cases = [case for case in LIGHTNING if case.script == f"lightning_{script}.py"]
    expected = json.loads((RECORDED / f"lightning_{script}-ddp.json").read_text())
    records = []
    for case in cases:
        (tmp_path / case.name).mkdir()
        record = run_case(case, tmp_path / case.name)
        found = differences(case, record, expected)
        assert not found, f"{case.name} against Lightning's DDP:\n" + "\n".join(found)
        records.append(record)
    first, second = records
    assert first["steps"] == second["steps"]
    assert first["metrics"] == second["metrics"]
    metrics = first["metrics"]
    if script == "fit":  # one file made of a checkpoint, read again
        assert metrics["converted"] and metrics["global_step_kept"] == metrics["global_step"]
        assert metrics["test_loss_converted"] == metrics["test_loss"]
    else:
        assert metrics["resumed_the_same"]
