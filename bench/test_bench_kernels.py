"""Every case of the kernel suite under pytest-benchmark: ours is what it times, the peers stand in ``extra_info``.

    pytest bench/ --benchmark-enable --benchmark-only

Without a GPU the shapes are a small model's and the references run: a smoke of the suite, not a measurement.
`python -m bench run` is the careful version: more rounds, real models, losses first, pictures.
"""

import functools

import pytest
import torch

from bench.suite import Suite
from tritonspeed.tuning.case import Case
from tritonspeed.tuning.cases import all_cases
from tritonspeed.tuning.shapes import MODELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL, DTYPE = ("llama8b", torch.bfloat16) if DEVICE.type == "cuda" else ("tiny", torch.float32)
CASES = [case for family in all_cases([MODELS[MODEL]], DTYPE).values() for case in family]


@functools.cache
def suite() -> Suite:
    return Suite.on(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_case(benchmark, case: Case) -> None:
    rows = suite().measure(MODEL, case, rounds=3)
    assert rows and rows[0].is_ours, suite().absent
    for row in rows:
        benchmark.extra_info[row.variant] = {"median_us": row.median_us, "error": row.error}
    inputs = case.make(DEVICE, 0)
    benchmark.pedantic(case.run, args=(inputs,), rounds=3)
