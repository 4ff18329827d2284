"""Rounding: the random words, the mean of stochastic rounding, and what must survive it."""

import pytest
import torch
from lanes import interpreted

from tritonspeed.kernels._triton import INTERPRETED, tl, triton
from tritonspeed.kernels.rounding import philox_reference, round_nearest, round_stochastic_reference

# no denormals: the CPU's own conversion flushes them (AVX-512)
SPECIAL = [0.0, -0.0, 1.0, float("inf"), -float("inf"), 3.3895314e38, -3.3895314e38, 65504.0]


@triton.jit
def _round_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, round_nearest(x, out_ptr.dtype.element_ty, INTERPRET), mask=offsets < n)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearest_is_torchs_under_the_interpreter_too(dtype: torch.dtype) -> None:
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-126 * (1 + 2**-8)])  # ties: to even
    x = torch.cat([torch.randn(3000), torch.tensor([*SPECIAL, float("nan")]), halfway])
    out = torch.empty_like(x, dtype=dtype)
    _round_kernel[(1,)](x, out, x.numel(), BLOCK=4096, INTERPRET=INTERPRETED)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@interpreted
def test_the_words_are_tritons() -> None:
    @triton.jit
    def words_kernel(out_ptr, first, seed, BLOCK: tl.constexpr):
        counter = first + tl.arange(0, BLOCK).to(tl.int64)
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=7)
        at = out_ptr + tl.arange(0, BLOCK) * 4
        tl.store(at, w0.to(tl.int64))
        tl.store(at + 1, w1.to(tl.int64))
        tl.store(at + 2, w2.to(tl.int64))
        tl.store(at + 3, w3.to(tl.int64))

    first, seed = 2**32 - 5, 2**40 + 12345  # the counter's high word changes on the way
    out = torch.empty(64, 4, dtype=torch.int64)
    words_kernel[(1,)](out, first, seed, BLOCK=64)
    want = torch.stack(philox_reference(seed, torch.arange(first, first + 64)), dim=1)
    assert torch.equal(out, want)


def test_the_words_are_published_ones() -> None:
    """Random123's known answer for philox4x32-7, all counters and keys zero."""
    words = philox_reference(0, torch.zeros(1, dtype=torch.int64))
    assert [hex(word.item()) for word in words] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    low, step, n = 1.0, 2**-7, 1 << 16
    for quarters in (1, 2, 3):
        x = torch.full((n,), low + step * quarters / 4)
        rounded = round_stochastic_reference(x, seed=3)
        assert set(rounded.tolist()) == {low, low + step}
        share_up = (rounded > low).double().mean().item()
        # a share of n coins has standard deviation √(p(1−p)/n) ≤ 0.002: five of them
        assert abs(share_up - quarters / 4) < 5 * 0.5 / n**0.5


def test_what_bf16_holds_stays_and_nan_stays_nan() -> None:
    x = torch.tensor([*SPECIAL[:5], *torch.randn(500).bfloat16().tolist()])
    exact = x.bfloat16().float() == x
    for seed in range(20):
        assert torch.equal(round_stochastic_reference(x, seed)[exact].float(), x[exact])
        nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        assert round_stochastic_reference(nans, seed).isnan().all()


def test_a_slice_rounds_as_the_whole_and_seeds_differ() -> None:
    x = torch.randn(1000)
    whole = round_stochastic_reference(x, 5, first_element=2**35)
    parts = [round_stochastic_reference(x[a:b], 5, 2**35 + a) for a, b in ((0, 8), (8, 500), (500, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(round_stochastic_reference(x, 6, 2**35), whole)
    assert not torch.equal(round_stochastic_reference(x, 5 + 2**32, 2**35), whole)
