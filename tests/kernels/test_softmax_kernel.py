"""Softmax: exactness in every type, masks and their gradients, causal rows, rows of any length, what is not read."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from tolerances import tolerance
from torch import Tensor, nn

from tritonspeed.kernels import nn as fused
from tritonspeed.kernels import softmax
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.softmax import (
    SOFTMAX_BACKWARD,
    SOFTMAX_FORWARD,
    SoftmaxLaunch,
    softmax_reference,
)
from tritonspeed.kernels.softmax_rows import mask_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 127, 129, 760, 1000, 1001, 4095, 4097, 8192]
LONG = [50257, 65536, 131072, 200000]


@contextmanager
def cut_into(block: int) -> Iterator[None]:
    """Loop over rows that are longer than this, so that few elements go where only very long rows would."""
    how = SoftmaxLaunch(block, rows=8, num_warps=1)
    with SOFTMAX_FORWARD.pinned(how), SOFTMAX_BACKWARD.pinned(how):
        yield


def check(x: Tensor, **options: object) -> None:
    grad = torch.randn(x.shape, device=x.device)
    assert_as_exact_as_torch(
        lambda x: softmax(x, **options), lambda x: softmax_reference(x, **options), {"x": x}, [grad], x.shape[-1]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_fp64_with_its_gradient(n: int, dtype: torch.dtype, device: torch.device) -> None:
    check((torch.randn(5, n) * 3).to(device, dtype))
    if n < 32:
        check((torch.randn(3, n) * 3).to(device, dtype), scale=-0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LONG)
def test_rows_of_any_length(n: int, dtype: torch.dtype, device: torch.device) -> None:
    check((torch.randn(1 if n > 10**5 else 2, n) * 3).to(device, dtype), scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [129, 136, 203])
def test_the_loop_over_a_row(n: int, causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    with cut_into(64):
        check(torch.randn(4, n).to(device, dtype), causal=causal, mask=torch.rand(4, n, device=device) > 0.2)


def test_the_reference_is_torchs(device: torch.device) -> None:
    x = torch.randn(4, 5, 33, device=device)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **tolerance(torch.float32, 33))
    mask = torch.randn(4, 1, 33, device=device)
    torch.testing.assert_close(softmax(x, mask=mask), torch.softmax(x + mask, -1), **tolerance(torch.float32, 33))
    keep = torch.ones(5, 33, dtype=torch.bool, device=device).tril(28)
    want = torch.softmax(x.masked_fill(~keep, -math.inf), -1)
    torch.testing.assert_close(softmax(x, causal=True), want, **tolerance(torch.float32, 33))
    torch.testing.assert_close(softmax(x, mask=keep), want, **tolerance(torch.float32, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q", "k"), [(1, 9), (5, 5), (3, 40), (9, 5)])
def test_causal(q: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1, q, k).to(device, dtype)
    check(x, causal=True, scale=0.25)
    with cut_into(16):
        check(x, causal=True)
    seen = torch.arange(k) <= torch.arange(q)[:, None] + (k - q)
    assert torch.equal(softmax(x, causal=True) != 0, seen.to(device).expand(1, q, k))


@pytest.mark.parametrize("block", [None, 32])
def test_what_is_masked_has_no_influence(block: int | None, device: torch.device) -> None:
    q, k = 6, 100
    hidden = torch.arange(k) > torch.arange(q)[:, None] + (k - q)
    x = torch.randn(1, q, k).to(device)
    want = softmax(x, causal=True)
    poisoned = x.masked_fill(hidden.to(device), math.nan)
    with cut_into(block) if block else cut_into(128):
        assert torch.equal(softmax(poisoned, causal=True).isfinite(), torch.ones_like(x, dtype=torch.bool))
        torch.testing.assert_close(softmax(poisoned, causal=True), want, **tolerance(torch.float32, k))
        got = softmax(poisoned, mask=~hidden.to(device))
        torch.testing.assert_close(got, want, **tolerance(torch.float32, k))


@interpreted
@pytest.mark.parametrize("k", [40, 43])
@pytest.mark.parametrize("block", [64, 16])
def test_the_backward_reads_no_group_that_is_hidden(block: int, k: int) -> None:
    x, g = torch.randn(30, k), torch.randn(30, k)
    y = softmax(x, causal=True)
    first_hidden = torch.arange(30)[:, None] + (k - 30) + 1
    behind = torch.arange(k) >= first_hidden + 4  # a group is 4 elements of fp32, read whole
    with cut_into(block):
        backward = torch.ops.tritonspeed.softmax_backward
        want = backward(g, y, 1.0, True, False)
        assert torch.equal(backward(g.masked_fill(behind, math.nan), y, 1.0, True, False), want)
    assert behind.any()


LAYOUTS = [
    (3, 1, 1, 9),
    (3, 1, 4, 9),
    (1, 1, 4, 9),
    (4, 9),
    (9,),
    (3, 2, 4, 9),
    (1, 2, 1, 9),
    (3, 1, 4, 1),
    (2, 1, 9),
    (),
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_masks_and_their_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, grad = torch.randn(3, 2, 4, 9).to(device), torch.randn(3, 2, 4, 9).to(device)
    for block in (16, 8) if dtype != torch.bfloat16 else (16,):  # held, and looped over
        with cut_into(block):
            if dtype == torch.bool:
                mask = (torch.rand(shape) > 0.3).to(device)
                assert_as_exact_as_torch(
                    lambda x, mask=mask: softmax(x, mask=mask, scale=0.5),
                    lambda x, mask=mask: softmax_reference(x, mask=mask, scale=0.5),
                    {"x": x}, [grad], 9,
                )  # fmt: skip
                continue
            leaves = {"x": x, "mask": torch.randn(shape).to(device, dtype)}
            if shape[-1:] in ((1,), ()):  # the same all along a row: no influence, and a gradient that cancels to 0
                mask = leaves.pop("mask").requires_grad_()
                softmax(x, mask=mask).backward(grad)
                torch.testing.assert_close(mask.grad, torch.zeros_like(mask), **tolerance(dtype, 216))
            assert_as_exact_as_torch(
                lambda x, mask=None: softmax(x, mask=mask, scale=0.5, causal=True),
                lambda x, mask=None: softmax_reference(x, mask=mask, scale=0.5, causal=True),
                leaves, [grad], {"dx": 9, "dmask": 216, "out0": 9},
            )  # fmt: skip


def test_a_broadcast_mask_is_not_written_out() -> None:
    shape = torch.Size((3, 2, 4, 9))
    for own in ((3, 1, 1, 9), (3, 1, 4, 9), (1, 1, 4, 9), (4, 9), (9,), (3, 2, 4, 9), (1, 2, 1, 9)):
        mask = torch.zeros(own)
        rows, _ = mask_layout(mask, shape)
        assert rows is not None and rows.data_ptr() == mask.data_ptr() and rows.numel() == mask.numel(), own
    rows, _ = mask_layout(torch.zeros(3, 1, 4, 1), shape)
    assert rows is not None and rows.numel() == 3 * 4 * 9, "along the row it is, along the heads not"
    keep = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    rows, _ = mask_layout(keep, shape)
    assert rows is not None and rows.data_ptr() == keep.data_ptr()


def test_a_mask_that_varies_over_every_other_axis(device: torch.device) -> None:
    x, mask = torch.randn(2, 3, 2, 3, 2, 5).to(device), torch.randn(2, 1, 2, 1, 2, 5).to(device)
    want = torch.softmax(x + mask, -1)
    torch.testing.assert_close(softmax(x, mask=mask), want, **tolerance(torch.float32, 5))


@pytest.mark.parametrize("length", [8, 11, 40, 43])
def test_rows_without_anything_left_are_zeros(length: int, device: torch.device) -> None:
    keep = torch.rand(4, length) > 0.5
    keep[1] = False
    keep[2] = True
    added = torch.zeros(4, length).masked_fill(~keep, -math.inf)
    for mask in (keep.to(device), added.to(device)):
        for block in (64, 16):
            x = torch.randn(2, 4, length).to(device).requires_grad_()
            with cut_into(block):
                y = softmax(x, mask=mask)
                y.backward(torch.randn(y.shape).to(device))
            assert x.grad is not None
            assert not y[:, 1].any() and not x.grad[:, 1].any()
            assert y.isfinite().all() and x.grad.isfinite().all()
            torch.testing.assert_close(
                y[:, 2].sum(-1), torch.ones(2, device=device), **tolerance(torch.float32, length)
            )
    nothing = softmax(torch.full((3, length), -math.inf, device=device))
    assert not nothing.any()


def test_a_mask_of_the_lowest_number_is_no_minus_infinity(device: torch.device) -> None:
    x = torch.randn(3, 50).to(device)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(3, 50).to(device)
    mask[0], mask[1, 7:] = lowest, lowest
    for block in (64, 16):
        with cut_into(block):
            got = softmax(x, mask=mask)
        torch.testing.assert_close(got, torch.softmax(x + mask, -1), **tolerance(torch.float32, 50))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5, 18])
def test_nan_and_infinity_spoil_their_row_as_torchs(bad: float, at: int, device: torch.device) -> None:
    x = torch.randn(4, 19).to(device)
    x[1, at] = bad
    x[2, :9] = -math.inf
    for block in (32, 16):
        with cut_into(block):
            got = softmax(x)
        torch.testing.assert_close(got, torch.softmax(x, -1), equal_nan=True, **tolerance(torch.float32, 19))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offsets_cancel(offset: float, dtype: torch.dtype, device: torch.device) -> None:
    check((torch.randn(3, 200) + offset).to(device, dtype))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis(dim: int, device: torch.device) -> None:
    x, mask = torch.randn(3, 4, 5).to(device), torch.randn(4, 1).to(device)
    for options in ({}, {"mask": mask}):
        grad = torch.randn(3, 4, 5).to(device)
        assert_as_exact_as_torch(
            lambda x, o=options: softmax(x, dim, **o),
            lambda x, o=options: torch.softmax(x + o["mask"] if o else x, dim),
            {"x": x}, [grad], 5,
        )  # fmt: skip


def test_strides_offsets_and_what_stands_beside(device: torch.device) -> None:
    wide = torch.full((6, 50), math.nan, device=device)
    wide[1:5, 3:40] = torch.randn(4, 37).to(device)
    x = wide[1:5, 3:40]
    assert x.is_contiguous() is False
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **tolerance(torch.float32, 37))
    flat = torch.full((1 + 4 * 37 + 9,), math.nan, device=device)
    flat[1 : 1 + 4 * 37] = torch.randn(4 * 37).to(device)
    x = flat[1 : 1 + 4 * 37].view(4, 37)  # contiguous, and 4 bytes off
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **tolerance(torch.float32, 37))
    x = torch.randn(37, 4).to(device).t()
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **tolerance(torch.float32, 37))
    x = torch.randn(1, 37).to(device).expand(4, 37)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), **tolerance(torch.float32, 37))


def test_an_expanded_gradient_is_read_right(device: torch.device) -> None:
    x = torch.randn(4, 33).to(device).requires_grad_()
    weight = torch.randn(33).to(device)
    softmax(x).backward(weight.expand(4, 33))
    (want,) = torch.autograd.grad(torch.softmax(x, -1), x, weight.expand(4, 33))
    torch.testing.assert_close(x.grad, want, **tolerance(torch.float32, 33))


def test_empty_and_scalar(device: torch.device) -> None:
    for shape in ((0, 5), (3, 0), (0,), (2, 0, 4)):
        x = torch.empty(shape, device=device, requires_grad=True)
        y = softmax(x)
        y.sum().backward()
        assert y.shape == shape and x.grad is not None and x.grad.shape == shape
    assert softmax(torch.tensor(3.0, device=device), 0).item() == 1


@interpreted
def test_gradcheck() -> None:
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 1, 5) > 0.3
    for block, is_fast in ((16, False), (4, True)):  # held; looped over, where a launch is many programs
        with cut_into(block):
            assert torch.autograd.gradcheck(
                lambda x: softmax(x, scale=0.7, causal=True, mask=keep), (x,), fast_mode=is_fast
            )
            assert torch.autograd.gradcheck(lambda x, m: softmax(x, scale=1.3, mask=m), (x, mask), fast_mode=is_fast)
    assert torch.autograd.gradcheck(lambda x: softmax(x, 1, scale=-0.5), (x,), fast_mode=True)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    k=st.integers(1, 70),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    mask_kind=st.sampled_from(["none", "bool", "float"]),
    broadcast=st.lists(st.booleans(), min_size=4, max_size=4),
    causal=st.booleans(),
    block=st.sampled_from([16, 32, 128]),
    transposed=st.booleans(),
)
def test_any_shape(
    shape: list[int], k: int, dtype: torch.dtype, mask_kind: str, broadcast: list[bool], causal: bool, block: int,
    transposed: bool,
) -> None:  # fmt: skip
    x = torch.randn(*shape, k, dtype=dtype)
    if transposed:
        x = torch.randn(*shape[:-1], k, shape[-1], dtype=dtype).mT
    mask_shape = [1 if one else size for one, size in zip(broadcast, x.shape, strict=False)]
    mask = None if mask_kind == "none" else torch.randn(mask_shape)
    mask = mask > -0.5 if mask is not None and mask_kind == "bool" else mask
    with cut_into(block):
        check(x, mask=mask, causal=causal and x.ndim > 1, scale=0.8)


def test_the_operators_run_on_a_cpu_as_well(device: torch.device) -> None:
    x, g = torch.randn(2, 3, 7).to(device), torch.randn(2, 3, 7).to(device)
    y = torch.ops.tritonspeed.softmax(x, None, 0.5, True)
    torch.testing.assert_close(y, softmax_reference(x, scale=0.5, causal=True), **tolerance(torch.float32, 7))
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(softmax_reference(leaf, scale=0.5, causal=True), leaf, g)
    got = torch.ops.tritonspeed.softmax_backward(g, y, 0.5, True, False)
    torch.testing.assert_close(got, want, **tolerance(torch.float32, 7))


@interpreted
def test_a_configuration_changes_no_more_than_rounding() -> None:
    x, g = torch.randn(5, 200), torch.randn(5, 200)
    want, grad = softmax(x), torch.ops.tritonspeed.softmax_backward(g, softmax(x), 1.0, False, False)
    for how in (SoftmaxLaunch(256, 1, 8), SoftmaxLaunch(256, 4, 4), SoftmaxLaunch(32, 1, 1), SoftmaxLaunch(128, 1, 2)):
        with SOFTMAX_FORWARD.pinned(how), SOFTMAX_BACKWARD.pinned(how):
            torch.testing.assert_close(softmax(x), want, **tolerance(torch.float32, 200))
            again = torch.ops.tritonspeed.softmax_backward(g, want, 1.0, False, False)
            torch.testing.assert_close(again, grad, **tolerance(torch.float32, 200))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_launch_is_within_what_a_card_takes(card: str, dtype: str) -> None:
    most_warps = 16 if CARDS[card].backend == "hip" else 32
    for n in (*LENGTHS, 16384, 32767, 32768, *LONG):
        chosen = [SoftmaxLaunch.forward(CARDS[card], n, dtype, masked) for masked in (False, True)]
        chosen += [SoftmaxLaunch.backward(CARDS[card], n, dtype), *SoftmaxLaunch.candidates(CARDS[card], n, dtype)]
        for how in chosen:
            assert 1 <= how.num_warps <= most_warps and how.num_warps.bit_count() == how.block.bit_count() == 1
            assert how.block >= 16 and how.rows.bit_count() == 1 and (how.rows == 1 or how.block >= n), how


def test_two_runs_are_equal_to_the_last_bit(device: torch.device) -> None:
    x, g = torch.randn(7, 1001).to(device).requires_grad_(), torch.randn(7, 1001).to(device)
    runs = []
    for _ in range(2):
        x.grad = None
        y = softmax(x, causal=True)
        y.backward(g)
        assert x.grad is not None
        runs.append((y.detach(), x.grad))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_the_operators_are_registered_right() -> None:
    x = torch.randn(2, 3, 11)
    ops = torch.ops.tritonspeed
    for mask in (None, torch.rand(3, 11) > 0.5, torch.randn(2, 1, 11)):
        torch.library.opcheck(ops.softmax, (x, mask, 0.5, True))
    for widened in (False, True):
        torch.library.opcheck(ops.softmax_backward, (torch.randn(2, 3, 11), x.bfloat16(), 0.5, True, widened))


def test_torch_compile_takes_it_whole(device: torch.device) -> None:
    def scores(x: Tensor, mask: Tensor) -> Tensor:
        return softmax(x * 2, scale=0.5, mask=mask, causal=True).sin()

    x, mask = torch.randn(2, 5, 9).to(device), torch.randn(5, 9).to(device)
    found = []
    for function in (scores, torch.compile(scores, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), mask.clone().requires_grad_()
        y = function(*leaves)
        y.sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, **tolerance(torch.float32, 9))


def test_torch_export_keeps_it() -> None:
    module = fused.ScaledMaskedSoftmax(0.5, causal=True)
    x = torch.randn(2, 5, 9)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x), **tolerance(torch.float32, 9))
    if INTERPRETED:
        assert "tritonspeed.softmax" in str(exported.graph)


@interpreted
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    for loss in (softmax(x).square().sum(), softmax(x).sum()):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward()


def test_errors_name_what_was_given() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="x is torch.int64, must be float32, bfloat16, float16 or float64"):
        softmax(x.long())
    with pytest.raises(ValueError, match=r"dim is 2, x has 2 axes: pass one of \[-2, 2\)"):
        softmax(x, 2)
    with pytest.raises(ValueError, match=r"mask \(3, 2\) cannot be broadcast to x \(2, 3\)"):
        softmax(x, mask=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"mask \(1, 2, 3\) cannot be broadcast to x \(2, 3\)"):
        softmax(x, mask=torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="mask is torch.int64, must be bool"):
        softmax(x, mask=torch.zeros(3).long())
    with pytest.raises(ValueError, match="x is on cpu, mask on meta"):
        softmax(x, mask=torch.zeros(3, device="meta"))
    with pytest.raises(
        ValueError, match=r"causal wants queries and keys as the last two axes; x is \(2, 3\) and dim is 0"
    ):
        softmax(x, 0, causal=True)
    with pytest.raises(ValueError, match="causal wants queries and keys"):
        softmax(x[0], causal=True)
    with pytest.raises(ValueError, match="softmax: the tensors are on meta"):
        softmax(x.to("meta"))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_the_module_is_torchs(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape).to(device)
    for dim in range(-len(shape), len(shape)):
        ours, torchs = fused.Softmax(dim), nn.Softmax(dim)
        torch.testing.assert_close(ours(x), torchs(x), **tolerance(torch.float32, max(shape)))
        assert repr(ours) == repr(torchs) and ours.state_dict() == torchs.state_dict()
    with pytest.warns(UserWarning, match="dim is not given"):
        got = fused.Softmax()(x)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(got, nn.Softmax()(x), **tolerance(torch.float32, max(shape)))


def test_the_scaled_masked_module_gives_attentions_weights(device: torch.device) -> None:
    q, k, v = (torch.randn(2, 3, 6, 8).to(device) for _ in range(3))
    keep = (torch.rand(2, 1, 1, 6) > 0.3).to(device)
    keep[..., 0] = True
    module = fused.ScaledMaskedSoftmax(8**-0.5)
    got = module(q @ k.mT, keep) @ v
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(q, k, v, attn_mask=keep), **tolerance(torch.float32, 48)
    )
    got = fused.ScaledMaskedSoftmax(8**-0.5, causal=True)(q @ k.mT) @ v
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(q, k, v, is_causal=True), **tolerance(torch.float32, 48)
    )
    assert repr(fused.ScaledMaskedSoftmax(0.5, causal=True)) == "ScaledMaskedSoftmax(scale=0.5, causal=True)"


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB free")
    for n in (1001, 50257):
        rows = 2**31 // n + 9
        x = torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda")
        x[-1, -1] = 5
        y = softmax(x)
        torch.testing.assert_close(y[-2:], torch.softmax(x[-2:], -1), **tolerance(torch.bfloat16, n))
        dx = torch.ops.tritonspeed.softmax_backward(x, y, 1.0, False, False)
        last = x[-2:].float().requires_grad_()
        (want,) = torch.autograd.grad(torch.softmax(last, -1), last, x[-2:].float())
        torch.testing.assert_close(dx[-2:].float(), want, **tolerance(torch.bfloat16, n))
        del x, y, dx
