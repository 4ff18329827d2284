"""Rotary: against complex multiplication in fp64 and Hugging Face's formula, every layout and stride, derivatives."""

import math
from itertools import pairwise

import pytest
import torch
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from tolerances import tolerance
from torch import Tensor

from tritonspeed.kernels import nn as fused
from tritonspeed.kernels import rotary
from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.rotary import ROTARY, RotaryLaunch, rotary_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(b: int, s: int, h: int, d: int, sequence_dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*((b, s, h, d) if sequence_dim == 1 else (b, h, s, d))).to(dtype)


def tables(
    s: int, rotary_dim: int, *, is_full: bool = False, interleaved: bool = False, batch: int | None = None
) -> tuple[Tensor, Tensor]:
    angles = torch.randn(*(() if batch is None else (batch,)), s, rotary_dim // 2) * 3
    if is_full:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def by_complex_numbers(x: Tensor, angles: Tensor, *, interleaved: bool, sequence_dim: int) -> Tensor:
    """e^{iθ} · (x₁ + i x₂) in fp64; angles (S, R/2)."""
    rotary_dim = 2 * angles.shape[-1]
    turned, rest = x[..., :rotary_dim].double(), x[..., rotary_dim:].double()
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    factor = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    factor = factor.unsqueeze(1) if sequence_dim == 1 else factor
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    product = product.flatten(-2) if interleaved else product.mT.flatten(-2)
    return torch.cat((product, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 12, 16])
def test_equals_complex_multiplication(
    rotary_dim: int, interleaved: bool, sequence_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k = heads(2, 5, 4, 16, sequence_dim, dtype).to(device), heads(2, 5, 2, 16, sequence_dim, dtype).to(device)
    angles = (torch.randn(5, rotary_dim // 2, dtype=torch.float64) * 3).to(device)
    how = {"interleaved": interleaved, "sequence_dim": sequence_dim}
    for got, x in zip(rotary(q, k, angles.cos(), angles.sin(), rotary_dim=rotary_dim, **how), (q, k), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        want = by_complex_numbers(x, angles, **how)
        torch.testing.assert_close(got.double(), want, **tolerance(dtype, magnitude=want.abs().max().item()))
        assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("sequence_dim", "is_full"), [(1, False), (2, True)])
@pytest.mark.parametrize(("s", "q_heads", "k_heads", "d", "rotary_dim"), [(7, 3, 1, 40, 24), (1, 8, 8, 64, 64)])
def test_equals_fp64_with_both_gradients(
    s: int, q_heads: int, k_heads: int, d: int, rotary_dim: int, sequence_dim: int, is_full: bool, interleaved: bool,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    found = tables(s, rotary_dim, is_full=is_full, interleaved=interleaved, batch=2 if is_full else None)
    cos, sin = (table.to(device) for table in found)
    how = {"interleaved": interleaved, "sequence_dim": sequence_dim, "rotary_dim": rotary_dim}
    q, k, dq, dk = (heads(2, s, h, d, sequence_dim, dtype).to(device) for h in (q_heads, k_heads) * 2)
    assert_as_exact_as_torch(
        lambda q, k: rotary(q, k, cos, sin, **how),
        lambda q, k: rotary_reference(q, k, cos, sin, **how),
        {"q": q, "k": k},
        [dq, dk],
    )


def hugging_face(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotate_half(x) · sin with full tables, (B, H, S, D)."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_hugging_faces_llama(dtype: torch.dtype, device: torch.device) -> None:
    b, s, d, base = 2, 9, 32, 500000.0
    q, k = heads(b, s, 4, d, 2, dtype).to(device), heads(b, s, 2, d, 2, dtype).to(device)
    positions = torch.stack((torch.arange(s), torch.arange(s) + 4000)).to(device)
    inv_freq = 1.0 / base ** (torch.arange(0, d, 2, device=device).float() / d)
    angles = positions[..., None].float() * inv_freq
    cos, sin = (torch.cat((table, table), -1).to(dtype) for table in (angles.cos(), angles.sin()))
    module = fused.RotaryEmbedding(d, base, sequence_dim=2).to(device, dtype)
    assert module.inv_freq.dtype == torch.float32, "a model cast to 16 bits keeps its frequencies"
    wants = [hugging_face(x.double(), cos.double(), sin.double()) for x in (q, k)]
    for got, want in zip(rotary(q, k, cos, sin, sequence_dim=2), wants, strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance(dtype, magnitude=4))
    exact = [hugging_face(x.double(), *(torch.cat((t, t), -1) for t in (angles.cos().double(), angles.sin().double())))
             for x in (q, k)]  # fmt: skip
    for got, want in zip(module(q, k, positions), exact, strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance(dtype, magnitude=4))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_fused_qkv_is_read_where_it_stands(interleaved: bool, device: torch.device) -> None:
    b, s, d = 2, 6, 16
    qkv = torch.randn(b, s, 8 * d + 3, device=device)  # q 4 heads, k 2, v 2, and a stride that nothing divides
    cos, sin = (table.to(device) for table in tables(s, d))

    def parts(x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (-1, d)) for part in x[..., : 8 * d].split([4 * d, 2 * d, 2 * d], -1)]

    q, k, v = parts(qkv)
    assert not q.is_contiguous()
    want = rotary(q.clone(), k.clone(), cos, sin, interleaved=interleaved)
    for got, expected in zip(rotary(q, k, cos, sin, interleaved=interleaved), want, strict=True):
        assert torch.equal(got, expected)
    heads_first = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved, sequence_dim=2)
    for got, expected in zip(heads_first, want, strict=True):
        assert torch.equal(got.transpose(1, 2), expected)
    before, tail = v.clone(), qkv[..., 8 * d :].clone()
    q_again, k_again = rotary(q, k, cos, sin, interleaved=interleaved, in_place=True)
    assert q_again is q and k_again is k
    assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and torch.equal(v, before)
    assert torch.equal(qkv[..., 8 * d :], tail)


def test_rows_that_are_not_dense_and_expanded_heads(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in tables(5, 8))
    q = torch.randn(2, 5, 8, 3).to(device).mT
    k = torch.randn(2, 5, 1, 8).to(device).expand(2, 5, 3, 8)
    want = rotary(q.contiguous(), k.contiguous(), cos, sin)
    for got, expected in zip(rotary(q, k, cos, sin), want, strict=True):
        assert torch.equal(got, expected)
    strided_cos, strided_sin = (table.t().contiguous().t() for table in (cos, sin))
    for got, expected in zip(rotary(q, k, strided_cos, strided_sin), want, strict=True):
        assert torch.equal(got, expected)


def test_positions_by_slices_of_the_tables(device: torch.device) -> None:
    q, k = heads(2, 12, 2, 8).to(device), heads(2, 12, 1, 8).to(device)
    cos, sin = (table.to(device) for table in tables(12, 8))
    whole = rotary(q, k, cos, sin)
    for start, stop in pairwise((0, 5, 6, 12)):
        part = rotary(q[:, start:stop], k[:, start:stop], cos[start:stop], sin[start:stop])
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[:, start:stop])
    module = fused.RotaryEmbedding(8)
    at_once, later = module(q, k), module(q[:, 7:], k[:, 7:], offset=7)
    for got, want in zip(later, at_once, strict=True):
        assert torch.equal(got, want[:, 7:])


def test_an_expanded_gradient_and_one_that_nobody_wants(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in tables(5, 6))
    for wanted in ((True, False), (False, True), (True, True)):
        leaves = [heads(2, 5, h, 9).to(device).requires_grad_(w) for h, w in zip((3, 2), wanted, strict=True)]
        q, k = leaves
        total = sum(out.sum() for out in rotary(q, k, cos, sin, rotary_dim=6))
        found = torch.autograd.grad(total, [x for x in leaves if x.requires_grad])
        how = {"interleaved": False, "sequence_dim": 1, "rotary_dim": 6}
        total = sum(out.sum() for out in rotary_reference(q, k, cos, sin, **how))
        wants = torch.autograd.grad(total, [x for x in leaves if x.requires_grad])
        for got, want in zip(found, wants, strict=True):
            torch.testing.assert_close(got, want, **tolerance(torch.float32, magnitude=2))


def test_empty(device: torch.device) -> None:
    for b, s, h in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        q, k = heads(b, s, h, 8).to(device).requires_grad_(), heads(b, s, 1, 8).to(device)
        outs = rotary(q, k, *(table.to(device) for table in tables(s, 8)))
        assert [out.shape for out in outs] == [q.shape, k.shape]
        outs[0].sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_pair(bad: float, device: torch.device) -> None:
    q, k = heads(1, 3, 2, 8).to(device), heads(1, 3, 1, 8).to(device)
    q[0, 1, 1, 2] = bad
    got, _ = rotary(q, k, *(table.to(device) for table in tables(3, 8)))
    spoiled = torch.zeros_like(q, dtype=torch.bool)
    spoiled[0, 1, 1, 2::4] = True
    assert torch.equal(~got.isfinite(), spoiled)


@interpreted
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    cos, sin = (table.double() for table in tables(2, 4))
    q, k = (heads(1, 2, h, 5, dtype=torch.float64).requires_grad_() for h in (2, 1))

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, k, cos, sin, interleaved=interleaved, rotary_dim=4)

    with ROTARY.pinned(RotaryLaunch(2, 2, 1)):
        assert torch.autograd.gradcheck(turned, (q, k))
        assert torch.autograd.gradgradcheck(turned, (q, k), fast_mode=True)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    b=st.integers(1, 2),
    s=st.integers(1, 6),
    q_heads=st.integers(1, 4),
    k_heads=st.integers(1, 2),
    half=st.integers(1, 10),
    rest=st.integers(0, 5),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    table_dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    sequence_dim=st.sampled_from([1, 2]),
    is_full=st.booleans(),
    is_batched=st.booleans(),
    how=st.sampled_from([RotaryLaunch(1, 1, 1), RotaryLaunch(4, 2, 1), RotaryLaunch(16, 8, 2)]),
)
def test_any_shape(
    b: int, s: int, q_heads: int, k_heads: int, half: int, rest: int, dtype: torch.dtype, table_dtype: torch.dtype,
    interleaved: bool, sequence_dim: int, is_full: bool, is_batched: bool, how: RotaryLaunch,
) -> None:  # fmt: skip
    q, k = (heads(b, s, h, 2 * half + rest, sequence_dim, dtype) for h in (q_heads, k_heads))
    found = tables(s, 2 * half, is_full=is_full, interleaved=interleaved, batch=b if is_batched else None)
    cos, sin = (table.to(table_dtype) for table in found)
    options = {"interleaved": interleaved, "sequence_dim": sequence_dim, "rotary_dim": 2 * half}
    with ROTARY.pinned(how):
        assert_as_exact_as_torch(
            lambda q, k: rotary(q, k, cos, sin, **options),
            lambda q, k: rotary_reference(q, k, cos, sin, **options),
            {"q": q, "k": k},
            [torch.randn(q.shape), torch.randn(k.shape)],
        )


@interpreted
def test_one_launch_and_no_configuration_changes_a_bit() -> None:
    q, k, (cos, sin) = heads(2, 7, 5, 8), heads(2, 7, 3, 8), tables(7, 8)
    want = rotary(q, k, cos, sin)
    for how in (RotaryLaunch(1, 1, 1), RotaryLaunch(4, 2, 2), RotaryLaunch(8, 16, 4)):
        with ROTARY.pinned(how):
            for got, expected in zip(rotary(q, k, cos, sin), want, strict=True):
                assert torch.equal(got, expected)
    with recording(CARDS["sm_90"]) as launches:
        rotary(q, k, cos, sin)
    assert len(launches) == 1


@pytest.mark.parametrize("card", CARDS)
def test_a_launch_is_within_what_a_card_takes(card: str) -> None:
    for batch, s, num_heads, rotary_dim in (
        (1, 1, 40, 128),
        (32, 1, 40, 128),
        (1, 8192, 8, 64),
        (2, 4096, 80, 6),
        (1, 64, 1, 4096),
    ):
        features = {"batch": batch, "s": s, "heads": num_heads, "rotary_dim": rotary_dim, "dtype": "bf16"}
        for how in (RotaryLaunch.heuristic(CARDS[card], **features), *RotaryLaunch.candidates(CARDS[card], **features)):
            assert 1 <= how.num_warps <= 16 and how.num_warps.bit_count() == how.block_s.bit_count() == 1, how
            assert 1 <= how.block_s <= s and how.heads >= 1, how


def test_in_place_refuses_what_it_would_spoil(device: torch.device) -> None:
    q, k, (cos, sin) = heads(1, 3, 2, 8).to(device), heads(1, 3, 1, 8).to(device), tables(3, 8)
    cos, sin = cos.to(device), sin.to(device)
    leaf = q.clone().requires_grad_()
    with pytest.raises(ValueError, match="q requires a gradient and would be overwritten: pass in_place=False"):
        rotary(leaf, k, cos, sin, in_place=True)
    with torch.no_grad():
        want = rotary(leaf, k, cos, sin)
        got = rotary(leaf, k.clone(), cos, sin, in_place=True)
    assert got[0] is leaf and torch.equal(leaf, want[0])
    with pytest.raises(ValueError, match="k has strides .* in place it must have dense rows and no expanded axis"):
        rotary(q, k.expand(1, 3, 2, 8), cos, sin, in_place=True)
    with pytest.raises(ValueError, match="q has strides"):
        rotary(q.mT.contiguous().mT, k, cos, sin, in_place=True)


def test_the_operators_are_registered_right() -> None:
    q, k, (cos, sin) = heads(2, 3, 2, 8, 2), heads(2, 3, 1, 8, 2), tables(3, 6)
    torch.library.opcheck(torch.ops.tritonspeed.rotary, (q, k, cos, sin, 2, 6, True, True))
    for conjugate in (False, True):
        torch.library.opcheck(torch.ops.tritonspeed.rotary_, (q.clone(), k.clone(), cos, sin, 2, 6, False, conjugate))


def test_the_operator_in_place_turns_back(device: torch.device) -> None:
    q, k = heads(2, 3, 2, 8).to(device), heads(2, 3, 1, 8).to(device)
    cos, sin = (table.to(device) for table in tables(3, 8))
    q_turned, k_turned = q.clone(), k.clone()
    for conjugate in (False, True):
        torch.ops.tritonspeed.rotary_(q_turned, k_turned, cos, sin, 1, 8, True, conjugate)
        assert conjugate or not torch.allclose(q_turned, q)
    torch.testing.assert_close(q_turned, q, **tolerance(torch.float32, magnitude=4))
    torch.testing.assert_close(k_turned, k, **tolerance(torch.float32, magnitude=4))


@pytest.mark.parametrize("in_place", [False, True])
def test_torch_compile_takes_it_whole(in_place: bool, device: torch.device) -> None:
    def turned(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (qkv * 2).split([4, 2, 2], 2)
        q, k = rotary(q, k, cos, sin, in_place=in_place)
        return torch.cat((q, k, v), 2).sin()

    cos, sin = (table.to(device) for table in tables(5, 8))
    qkv = torch.randn(2, 5, 8, 8).to(device)
    found = []
    for function in (turned, torch.compile(turned, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_(not in_place)
        y = function(leaf, cos, sin)
        if not in_place:
            y.sum().backward()
        found.append((y.detach(), leaf.grad if not in_place else y.detach()))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, **tolerance(torch.float32, magnitude=4))


def test_torch_export_keeps_it() -> None:
    module, q, k = fused.RotaryEmbedding(8, interleaved=True), heads(1, 5, 2, 8), heads(1, 5, 1, 8)
    exported = torch.export.export(module, (q, k)).module()
    for got, want in zip(exported(q, k), module(q, k), strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float32, magnitude=4))


def test_two_runs_are_equal_to_the_last_bit(device: torch.device) -> None:
    q, k, (cos, sin) = heads(2, 9, 3, 20).to(device), heads(2, 9, 2, 20).to(device), tables(9, 20)
    first, second = (rotary(q, k, cos.to(device), sin.to(device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_module_follows_devices_not_types() -> None:
    module = fused.RotaryEmbedding(8, 100.0)
    assert not module.state_dict() and repr(module) == (
        "RotaryEmbedding(8, base=100, interleaved=False, sequence_dim=1)"
    )
    want = module.inv_freq.clone()
    assert torch.equal(module.half().inv_freq, want) and torch.equal(module.double().inv_freq, want)
    with torch.device("meta"):
        built = fused.RotaryEmbedding(8, 100.0)
    assert built.inv_freq.is_meta and torch.equal(built.to_empty(device="cpu").inv_freq, want)
    scaled = fused.RotaryEmbedding(8, inv_freq=want / 8, attention_scaling=1.5).bfloat16()
    cos, sin = scaled.cos_sin(torch.arange(5))
    plain = module.cos_sin(torch.arange(5) / 8)
    torch.testing.assert_close(cos, plain[0] * 1.5, **tolerance(torch.float32))
    torch.testing.assert_close(sin, plain[1] * 1.5, **tolerance(torch.float32, magnitude=1))
    with pytest.raises(ValueError, match="dim is 7: dim must be even"):
        fused.RotaryEmbedding(7)
    with pytest.raises(ValueError, match=r"dim is 8 and inv_freq \(8,\): dim must be even, inv_freq \(4,\)"):
        fused.RotaryEmbedding(8, inv_freq=torch.ones(8))


def test_errors_name_what_was_given() -> None:
    q, k, (cos, sin) = heads(2, 3, 4, 8), heads(2, 3, 2, 8), tables(3, 8)
    with pytest.raises(ValueError, match=r"q is \(3, 4, 8\), must have 4 axes: batch, positions, heads, D"):
        rotary(q[0], k, cos, sin)
    with pytest.raises(ValueError, match="k is torch.float16, q and k must both be float32"):
        rotary(q, k.half(), cos, sin)
    with pytest.raises(ValueError, match="q is on cpu, k on meta"):
        rotary(q, k.to("meta"), cos, sin)
    with pytest.raises(ValueError, match=r"sequence_dim is 3, must be 1 for \(B, S, H, D\)"):
        rotary(q, k, cos, sin, sequence_dim=3)
    with pytest.raises(ValueError, match=r"may differ in heads, axis 1, only: is sequence_dim right\?"):
        rotary(q, k, cos, sin, sequence_dim=2)
    with pytest.raises(ValueError, match="rotary_dim is 7, must be even and within 2 to D = 8"):
        rotary(q, k, cos, sin, rotary_dim=7)
    with pytest.raises(ValueError, match=r"cos is \(3, 2\), must be \(S, W\) .* with S = 3, B = 2 or 1 and W = 4 or 8"):
        rotary(q, k, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"sin is \(2, 4\), must be .* and cos is \(3, 4\): slice the positions"):
        rotary(q, k, cos, sin[:2])
    with pytest.raises(ValueError, match=r"cos is \(3, 3, 4\), must be"):
        rotary(q, k, cos.expand(3, 3, 4), sin.expand(3, 3, 4))
    with pytest.raises(ValueError, match="cos requires a gradient, which it does not get"):
        rotary(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ValueError, match="sin is torch.int64 on cpu, must be a float on cpu"):
        rotary(q, k, cos.detach(), sin.long())
    with pytest.raises(ValueError, match="rotary: the tensors are on meta"):
        rotary(q.to("meta"), k, cos, sin)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs a GPU with 12 GiB free")
    s = 2**31 // (32 * 128) + 17
    q = torch.zeros(1, s, 32, 128, dtype=torch.bfloat16, device="cuda")
    q[:, -1] = torch.randn(32, 128)
    k = torch.zeros(1, s, 1, 128, dtype=torch.bfloat16, device="cuda")
    cos, sin = fused.RotaryEmbedding(128).to("cuda").cos_sin(torch.arange(s, device="cuda"))
    last = rotary(q[:, -1:], k[:, -1:], cos[-1:], sin[-1:])[0]
    rotary(q, k, cos, sin, in_place=True)
    assert torch.equal(q[:, -1:], last) and last.any()
