"""A training step of each system under pytest-benchmark; `bench.systems.compare` is the careful version.

    pytest bench/ --benchmark-enable --benchmark-only

Each case is a run of two gloo ranks in processes of its own, so the benchmark's time is of the whole run, start
included; the figures that count stand in its `extra_info`: the median step in seconds and the resident peak in bytes.
DeepSpeed takes part where this environment has it.
"""

import statistics
import sys
from importlib.util import find_spec

import pytest

from bench.systems.compare import ENTRIES, Entry, arguments_for
from bench.systems.launch import run
from bench.systems.model import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name.replace(" ", "-"))
def test_step(benchmark, entry: Entry, shape: str) -> None:
    if entry.system == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is in the peers' environment: bench/peers/setup.sh")
    result = benchmark.pedantic(run, args=(sys.executable, arguments_for(entry, shape, steps=5)), rounds=1)
    benchmark.extra_info["median_step_s"] = statistics.median(result["step_s"])
    benchmark.extra_info["resident_peak_bytes"] = result["resident_peak_bytes"]
    assert result["losses"][0] == pytest.approx(8.37, abs=0.1), "the same model and data everywhere"
