"""Where chunks are cut: never where a number could follow the cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import tritonspeed as ts
from tritonspeed.zero.chunk import cuts


@pytest.mark.parametrize("max_elems", [1, 100, 4096, 4996, 10_000, 10**9])
@pytest.mark.parametrize(("start", "end"), [(0, 64), (0, 40_960), (64, 30_016), (20_480, 24_640), (1088, 9280)])
def test_cuts_split_no_block_and_leave_no_small_rest(start: int, end: int, max_elems: int) -> None:
    found = cuts(start, end, max_elems)
    assert (found[0], found[-1]) == (start, end) and found == sorted(found)
    assert all(at % 1024 == 0 for at in found[1:-1])
    sizes = [to - at for at, to in pairwise(found)]
    assert len(sizes) == 1 or min(sizes) >= 4096  # smaller tensors are not kept in 8 bits
    assert max(sizes) < max(max_elems, 4096) + 1024 + 4096


def test_a_size_cuts() -> None:
    assert cuts(64, 30_016, 4996) == [64, 6144, 11_264, 16_384, 21_504, 30_016]
    assert cuts(64, 30_016, 0) == [64, 30_016]


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("max_elems", [1, 6001])
def test_a_group_that_begins_inside_a_block_has_the_same_bits_however_it_is_cut(state: str, max_elems: int) -> None:
    start, end = 2 * 1024 + 64, 20_000
    generator = torch.Generator().manual_seed(0)
    values, *gradients = torch.randn(4, end - start, generator=generator)
    results = []
    for bounds in (cuts(start, end, 0), cuts(start, end, max_elems)):
        chunks = [nn.Parameter(values[at - start : to - start].clone()) for at, to in pairwise(bounds)]
        optimizer = ts.optim.AdamW(chunks, lr=0.1, state=state, stochastic_rounding=True)
        copies = [torch.empty_like(chunk, dtype=torch.bfloat16) for chunk in chunks]
        for grad in gradients:
            for chunk, copy, (at, to) in zip(chunks, copies, pairwise(bounds), strict=True):
                part = grad[at - start : to - start]
                optimizer.step_flat_(chunk, part, param_out=copy, first_element=at, place=0)
        results.append((torch.cat([chunk.detach() for chunk in chunks]), torch.cat(copies)))
    assert len(bounds) > 2
    assert all(got.equal(want) for got, want in zip(results[1], results[0], strict=True))
