"""On a GPU: backward has a thread of its own, kernels are Triton's; counts are those of a CPU, times are events."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tritonspeed.kernels import linear_cross_entropy
from tritonspeed.profiling.flops_count import ModuleWatch
from tritonspeed.profiling.flops_step import model_shape
from tritonspeed.profiling.flops_table import FlopsProfile

pytestmark = pytest.mark.gpu
WIDTH, INNER, CLASSES, ROWS = 64, 128, 96, 32


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.head = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, x, target):
        return linear_cross_entropy(self.down(self.up(x).relu()), self.head, target)


def test_counts_times_and_bounds_on_a_gpu():
    model = Model().cuda()
    x, target = torch.randn(ROWS, WIDTH).cuda(), torch.randint(CLASSES, (ROWS,)).cuda()
    watch = ModuleWatch(model)
    with watch.count():
        model(x, target).backward()
    watch.remove()
    product = 2 * ROWS * WIDTH * INNER
    assert watch.counts.forward == {"up": product, "down": product, "": 3 * 2 * ROWS * WIDTH * CLASSES}
    assert watch.counts.backward == {"up": product, "down": 2 * product}, "nobody wants the gradient of x"
    seconds = watch.seconds()
    assert 0 < seconds["up"] < seconds[""]
    shape = model_shape(model, torch.device("cuda", 0), torch.bfloat16)
    profile = FlopsProfile(shape, watch.counts, seconds, {"forward": seconds[""]}, step=1)
    assert profile.bound() is None or "% of" in profile.table()
