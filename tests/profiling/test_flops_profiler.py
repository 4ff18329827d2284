"""DeepSpeed's standalone names: their figures, their strings, and models left as they were."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tritonspeed.profiling.flops_profiler import (
    FlopsProfiler,
    duration_to_string,
    flops_to_string,
    get_model_profile,
    macs_to_string,
    number_to_string,
    params_to_string,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x).relu().mean((-1, -2))
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


CONV, BLOCK, HEAD = 2 * 16 * 16 * 8 * 27, 2 * 8 * 8, 2 * 8 * 10  # multiply-accumulates of a batch of 2
MACS = CONV + 2 * BLOCK + HEAD
DEEPSPEEDS_MACS = 111_008  # get_model_profile of DeepSpeed 0.19.8, of the same model
PARAMS = 8 * 27 + 8 + 2 * 72 + 90


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_is_profiled_by_its_input_shape(caplog, tmp_path):
    model = Net()
    with caplog.at_level(logging.INFO, "tritonspeed"):
        flops, macs, params = get_model_profile(model, (2, 3, 16, 16), as_string=False, warm_up=3)
    assert (flops, macs, params) == (2 * MACS, MACS, PARAMS)
    assert macs == DEEPSPEEDS_MACS
    text = caplog.text
    assert "blocks (ModuleList)" in text and "largest classes" in text and "share of the bound" in text
    assert hooks_of(model) == 0 and not model.training
    out = tmp_path / "new" / "flops.txt"
    named = get_model_profile(model, args=[torch.ones(2, 3, 16, 16)], warm_up=0, output_file=str(out), detailed=False)
    assert named == (f"{round(2 * MACS / 1e3, 2):g} K", f"{round(MACS / 1e3, 2):g} KMACs", str(PARAMS))
    assert "blocks" not in out.read_text() and "share of the bound" in out.read_text()


def test_a_profiler_is_started_read_stopped_and_ended():
    model, x = Net(), torch.ones(2, 3, 16, 16)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(x)
    assert profiler.get_total_flops() == 2 * MACS
    profiler.stop_profile()
    model(x)
    assert profiler.get_total_macs() == MACS and profiler.get_total_params(as_string=True) == str(PARAMS)
    assert profiler.get_total_duration() > 0 and profiler.get_total_duration(as_string=True).endswith("s")
    rows = {row.name: row for row in profiler.profile.rows}
    assert rows["blocks"].macs == 2 * BLOCK and rows["blocks"].params == 144
    assert rows["blocks"].seconds == rows["blocks.0"].seconds + rows["blocks.1"].seconds > 0
    profiler.end_profile()
    assert profiler.get_total_flops() == 0 and hooks_of(model) == 0
    profiler.start_profile()
    profiler.reset_profile()
    model(x)
    profiler.stop_profile()
    assert profiler.get_total_flops() == 2 * MACS


def test_ignored_classes_count_with_what_is_around_them():
    model = Net()
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=[nn.Linear])
    model(torch.ones(2, 3, 16, 16))
    profiler.stop_profile()
    rows = {row.name: row for row in profiler.profile.rows}
    assert rows["head"].macs == 0 and rows[""].macs == MACS


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="input_shape="):
        get_model_profile(Net())
    with pytest.raises(ValueError, match="'backward'"):
        get_model_profile(Net(), (2, 3, 16, 16), mode="backward")


# as DeepSpeed 0.19.8's functions of these names give them
NUMBERS = [
    (0, "0 "),
    (81, "81 "),
    (1234, "1.23 K"),
    (5e6, "5 M"),
    (7.125e9, "7.12 G"),
    (2e15, "2000 T"),
    (0.0042, "4.2 m"),
]


@pytest.mark.parametrize(("number", "text"), [*NUMBERS, (3e-6, "3 u")])
def test_numbers_are_written_as_deepspeed_writes_them(number, text):
    assert number_to_string(number) == text
    assert macs_to_string(number) == f"{text}MACs" and flops_to_string(number) == f"{text}FLOPS"
    assert duration_to_string(number) == f"{text}s"
    assert params_to_string(number) == text.replace("G", "B").strip()
