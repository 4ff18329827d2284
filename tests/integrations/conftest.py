"""``as_recorded``: a case of script_cases, run here, and its figures held against real DeepSpeed's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from script_cases import RECORDED, Case
from script_runs import differences, run_case


@pytest.fixture
def as_recorded(tmp_path: Path) -> Callable[[Case], dict[str, Any]]:
    """Run a case; its figures are real DeepSpeed's. Returns the record, for what else there is to see."""

    def run(case: Case) -> dict[str, Any]:
        record = run_case(case, tmp_path)
        if not case.no_peer:
            found = differences(case, record, json.loads((RECORDED / f"{case.name}.json").read_text()))
            assert not found, f"{case.name} against real DeepSpeed:\n" + "\n".join(found)
        return record

    return run
