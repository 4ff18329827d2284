"""Scripts that call ``deepspeed.initialize`` themselves, as DeepSpeed's tutorials do."""

from __future__ import annotations

import pytest
from script_cases import RAW


@pytest.mark.parametrize("case", RAW, ids=lambda case: case.name)
def test_a_tutorials_script_has_deepspeeds_numbers(case, as_recorded):
    record = as_recorded(case)
    if "resumed" in record["metrics"]:
        assert record["metrics"]["resumed"] == [step["loss"] for step in record["steps"][3:]]
        assert record["metrics"]["eval_loss_resumed"] == record["metrics"]["eval_loss"]
