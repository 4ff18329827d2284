"""Packed weights: their definition element by element; layers as GPTQ and AWQ write them, read bit by bit."""

import pytest
import torch
from tolerances import UNIT_ROUNDOFF
from torch import Tensor

from tritonspeed.kernels.packing import (
    PackedWeight,
    from_awq,
    from_gptq,
    pack_fp8,
    pack_nibbles,
    pack_w4,
    pack_w8,
    unpack_nibbles,
    unpack_reference,
)


def words_along(q: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight 4-bit values to an int32 along dim, the one at order[i] in nibble i: what a GPTQ or AWQ writer does."""
    groups = q.movedim(dim, -1).reshape(*q.movedim(dim, -1).shape[:-1], -1, 8).long()
    word = torch.zeros(groups.shape[:-1], dtype=torch.int64)
    for nibble, element in enumerate(order):
        word |= groups[..., element] << (4 * nibble)
    word = torch.where(word >= 2**31, word - 2**32, word)
    return word.to(torch.int32).movedim(-1, dim)


def a_layer(k: int, n: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (K, N), zeros (G, N), scales (G, N), each value there is among them."""
    torch.manual_seed(k + n)
    q, zeros = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (k // group, n))
    return q, zeros, torch.rand(k // group, n).half() + 0.01


def weight_of(q: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """W (N, K), element by element as the formats define it."""
    return ((q - zeros[group_of]).float() * scales.float()[group_of]).t()


@pytest.mark.parametrize("k", [32, 64, 160])
def test_nibbles_come_back(k):
    q = torch.randint(0, 16, (5, k), dtype=torch.uint8)
    codes = pack_nibbles(q)
    assert codes.shape == (5, k // 2) and torch.equal(unpack_nibbles(codes), q)
    assert codes[3, 7] == q[3, 7] + 16 * q[3, 23]  # byte 7 of the first 32: elements 7 and 7 + 16


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["w4", "w4 with zeros", "w8"])
def test_each_element_is_the_nearest_code(format, scale_dtype, group):
    torch.manual_seed(0)
    n, k = 6, 300
    weight = torch.randn(n, k) + (0.5 if format == "w4 with zeros" else 0)
    if format == "w8":
        packed = pack_w8(weight, group, scale_dtype)
    else:
        packed = pack_w4(weight, group, format == "w4", scale_dtype)
    unit = group or 32
    padded = -(-k // unit) * unit
    assert packed.shape == (n, k) and packed.scales.dtype == scale_dtype
    assert packed.codes.shape == (n, padded if format == "w8" else padded // 2)
    assert packed.scales.shape == (padded // group if group else 1, n)
    scales = packed.scales.t().float().repeat_interleave(group or padded, 1)[:, :k]
    error = (unpack_reference(packed) - weight).abs()
    # half a step, and what rounding the scale takes from the reach of the largest code
    reach = {"w4": 8, "w4 with zeros": 16, "w8": 128}[format]
    clamped = reach * 2 * UNIT_ROUNDOFF[scale_dtype]
    zero_rounding = 0.5 if format == "w4 with zeros" else 0  # a zero half a step off clamps the group's ends
    assert (error <= scales * (0.5 + zero_rounding + clamped + 1e-5)).all()


def test_the_scale_takes_the_largest_element_to_the_last_code():
    weight = torch.zeros(2, 64)
    weight[0, 3], weight[0, 40], weight[1, 5] = 7.0, -3.5, -127.0
    w4 = pack_w4(weight, 32, scale_dtype=torch.float32)
    assert w4.scales[:, 0].tolist() == [1.0, 0.5] and unpack_nibbles(w4.codes)[0, [3, 40]].tolist() == [15, 1]
    assert w4.scales[1, 1] == 1.0 and (unpack_nibbles(w4.codes)[1, 32:] == 8).all()  # a group of zeros
    w8 = pack_w8(weight)
    assert w8.scales[0, 1] == 1.0 and w8.codes[1, 5] == -127


def test_halves_round_to_even():
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])
    assert pack_w8(weight).codes[0, :5].tolist() == [127, 0, 2, 2, 0]


def test_fp8_is_e4m3_and_has_no_negative_zero():
    weight = torch.cat((torch.linspace(-3, 3, 61), torch.tensor([-1e-9, 1e-9])))[None]
    packed = pack_fp8(weight)
    want = (torch.nn.functional.pad(weight, (0, 1)) / (torch.tensor(3.0) / 448)).to(torch.float8_e4m3fn)
    assert torch.equal(packed.codes.float(), want.float())
    assert not (packed.codes.view(torch.uint8) == 0x80).any() and (want.view(torch.uint8) == 0x80).any()


@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_gptq_comes_over_bit_for_bit(group, zero_offset):
    q, zeros, scales = a_layer(256, 24, group)
    qweight, qzeros = words_along(q, 0), words_along((zeros - zero_offset) % 16, 1)
    assert qweight.shape == (32, 24) and qzeros.shape == (256 // group, 3)
    in_order = torch.arange(256) // group
    for g_idx in (None, in_order.int()):
        packed, index = from_gptq(qweight, qzeros, scales, g_idx, zero_offset=zero_offset)
        assert index is None
        assert torch.equal(unpack_nibbles(packed.codes), q.t().to(torch.uint8))
        assert torch.equal(unpack_reference(packed), weight_of(q, zeros, scales, in_order))


def test_gptqs_activation_order_becomes_an_index():
    k, group = 128, 32
    q, zeros, scales = a_layer(k, 16, group)
    g_idx = torch.randperm(k) // group
    packed, index = from_gptq(words_along(q, 0), words_along((zeros - 1) % 16, 1), scales, g_idx.int())
    want = weight_of(q, zeros, scales, g_idx)
    assert index is not None and torch.equal(unpack_reference(packed), want[:, index])
    x = torch.randn(3, k, dtype=torch.float64)
    torch.testing.assert_close(x[:, index] @ unpack_reference(packed).double().t(), x @ want.double().t())


@pytest.mark.parametrize("group", [32, 64, 256])
def test_awq_comes_over_bit_for_bit(group):
    q, zeros, scales = a_layer(256, 24, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = from_awq(words_along(q, 1, order), words_along(zeros, 1, order), scales)
    assert torch.equal(unpack_nibbles(packed.codes), q.t().to(torch.uint8))
    assert torch.equal(unpack_reference(packed), weight_of(q, zeros, scales, torch.arange(256) // group))


def test_sizes_in_bytes():
    packed = pack_w4(torch.randn(8, 256), 64, symmetric=False)
    assert packed.num_bytes == 8 * 256 // 2 + 4 * 8 * (2 + 1)
    assert isinstance(packed, PackedWeight) and packed.zeros is not None


def words(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_w4(torch.randn(4, 64), 48), "group_size 48 is no multiple of 32"),
        (lambda: pack_w4(torch.randn(64)), r"\(64,\), must be a floating \(N, K\)"),
        (lambda: pack_w8(torch.full((2, 32), float("inf"))), "NaN or infinite"),
        (lambda: pack_w8(torch.randn(2, 32), None, torch.float64), "scale_dtype is torch.float64"),
        (lambda: pack_w4(torch.full((2, 32), 1e7), 32), "overflows torch.float16"),
        (lambda: from_gptq(words(4, 8).float(), words(1, 1), torch.ones(1, 8)), "qweight is torch.float32"),
        (lambda: from_gptq(words(4, 8), words(1, 2), torch.ones(1, 8)), r"zeros \(1, 16\)"),
        (lambda: from_gptq(words(2, 8), words(1, 1), torch.ones(1, 8)), "K 16"),
        (
            lambda: from_gptq(words(8, 8), words(2, 1), torch.ones(2, 8), torch.tensor([0] * 40 + [1] * 24)),
            "groups of unequal size, not 32 rows each",
        ),
        (lambda: from_gptq(words(8, 8), words(2, 1), torch.ones(2, 8), torch.zeros(3)), r"g_idx \(3,\)"),
        (lambda: from_awq(words(64, 1), words(2, 1), torch.ones(2, 16)), "N 8 do not fit"),
    ],
)
def test_the_errors_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
