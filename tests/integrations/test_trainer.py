"""Hugging Face's Trainer, as it is, on two ranks."""

from __future__ import annotations

import pytest
from script_cases import TRAINER


@pytest.mark.parametrize("case", TRAINER, ids=lambda case: case.name)
def test_trainer_has_deepspeeds_numbers(case, as_recorded):
    as_recorded(case)
