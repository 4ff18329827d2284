"""AdamW with 8-bit moments: the code itself, and CPU form, interpreter and GPU against the reference."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import tolerance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels import adamw_8bit_
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.adamw_8bit import adamw_8bit_reference
from tritonspeed.kernels.dynamic_code import (
    decode_reference,
    dequantize_state,
    encode_reference,
    num_blocks,
    quantize_state,
)

HYPER: dict[str, Any] = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CODES = torch.arange(256).to(torch.uint8)
CPU = torch.device("cpu")
NAMES = ("master", "exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale", "grad")


def dynamic_map(is_signed: bool) -> list[float]:
    """The paper's set of values, worked out in fp64: decades of ever more equal cells, with 0 and 1."""
    values = {0.0, 1.0}
    for i in range(7):
        num_cells = 2 ** (i if is_signed else i + 1)
        cells = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / num_cells) for j in range(num_cells)]
        values |= set(cells) | ({-x for x in cells} if is_signed else set())
    return sorted(values)


def state(n: int, first: int = 0, device: torch.device = CPU, grad_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A chunk in the middle of training, in the order of ``NAMES``."""
    generator = torch.Generator().manual_seed(n)
    master, m, grad = (torch.randn(n, generator=generator) for _ in range(3))
    v = torch.rand(n, generator=generator) ** 4 * 0.01
    moments = [*quantize_state(m * 0.1, True, first), *quantize_state(v, False, first)]
    return [t.clone().to(device) for t in (master, *moments, grad.to(grad_dtype))]


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_code_is_the_papers_map(is_signed: bool) -> None:
    got = decode_reference(CODES, is_signed)
    want = torch.tensor(dynamic_map(is_signed), dtype=torch.float64)
    assert got.unique().numel() == 256
    torch.testing.assert_close(got.sort().values.double(), want, **{**tolerance(torch.float32), "atol": 0.0})
    assert torch.equal(encode_reference(got, is_signed), CODES)


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_number_takes_the_nearest_code(is_signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100_000, generator=generator) * 10 ** (-8 * torch.rand(100_000, generator=generator))
    if is_signed:
        x = x * torch.where(torch.rand(100_000, generator=generator) < 0.5, -1.0, 1.0)
    code = torch.tensor(dynamic_map(is_signed), dtype=torch.float64)
    if not is_signed:
        code = code[1:]  # what is not 0 does not become 0
    right = torch.searchsorted(code, x.double()).clamp(1, len(code) - 1)
    nearest = torch.minimum((code[right] - x).abs(), (code[right - 1] - x).abs())
    error = (decode_reference(encode_reference(x, is_signed), is_signed).double() - x.double()).abs()
    assert (error <= nearest + 1e-6 * x.abs()).all()
    assert encode_reference(torch.zeros(3), is_signed).tolist() == [0, 0, 0]


def test_blocks_with_a_nan_stay_one() -> None:
    x = torch.ones(600)
    x[300] = float("nan")
    back = dequantize_state(*quantize_state(x, True), True)
    assert back[256:512].isnan().all() and not back[:256].isnan().any() and not back[512:].isnan().any()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("first", [0, 64, 260])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(grad_dtype: torch.dtype, first: int, decoupled: bool, device: torch.device) -> None:
    for n in (1, 255, 1024, 5003):
        ours, plain = state(n, first, device, grad_dtype), state(n, first, device, grad_dtype)
        scale = torch.tensor(0.37, device=device)
        out = torch.empty(n, dtype=torch.bfloat16, device=device)
        options = {**HYPER, "decoupled": decoupled, "grad_scale": scale, "first_element": first}
        adamw_8bit_(*ours, param_out=out, **options)
        adamw_8bit_reference(*plain, **options)
        torch.testing.assert_close(ours[0], plain[0], **tolerance(torch.float32))
        for name, mine, theirs in zip(NAMES[1:5], ours[1:5], plain[1:5], strict=True):
            if INTERPRETED:
                assert torch.equal(mine, theirs), name
            elif name.endswith("scale"):
                torch.testing.assert_close(mine, theirs, **tolerance(torch.float32))
            else:  # torch's fused step contracts: a moment at the edge of a cell may fall into the next
                assert (mine != theirs).double().mean() <= max(1e-3, 1.5 / n), name
        assert torch.equal(out, ours[0].bfloat16())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 3000), group=st.integers(0, 200), out_dtype=st.sampled_from([None, torch.bfloat16, torch.float16])
)
def test_any_size_and_place(n: int, group: int, out_dtype: torch.dtype | None) -> None:
    first = 4 * group
    ours, plain = state(n, first), state(n, first)
    out = None if out_dtype is None else torch.empty(n, dtype=out_dtype)
    adamw_8bit_(*ours, param_out=out, first_element=first, **HYPER)
    adamw_8bit_reference(*plain, first_element=first, **HYPER)
    for mine, theirs in zip((ours[0], ours[2], ours[4]), (plain[0], plain[2], plain[4]), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(torch.float32))
    if out is not None:
        assert torch.equal(out, ours[0].to(out.dtype))


@pytest.mark.parametrize("first", [0, 100])
def test_cuts_at_blocks_change_no_bit(first: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonspeed.kernels.flat_update.CPU_CHUNK_ELEMS", 1024)
    n, seed = 6007, 2**45 + 11
    whole, pieces = (state(n, first, device, torch.bfloat16) for _ in range(2))
    out, out_of_pieces = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    options = {**HYPER, "stochastic_rounding_seed": seed}
    adamw_8bit_(*whole, param_out=out, first_element=first, **options)
    for a, b in ((0, 512 - first), (512 - first, 4096 - first), (4096 - first, n)):
        row, num = (first + a) // 256, num_blocks(first + a, b - a)
        cut = [t[row : row + num] if name.endswith("scale") else t[a:b] for name, t in zip(NAMES, pieces, strict=True)]
        adamw_8bit_(*cut, param_out=out_of_pieces[a:b], first_element=first + a, **options)
    for name, mine, theirs in zip(NAMES, whole, pieces, strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(out, out_of_pieces)


@pytest.mark.parametrize("flag", [0.0, 1.0, float("nan")])
def test_found_inf_leaves_everything_untouched(flag: float, device: torch.device) -> None:
    ours, before = state(1500, 0, device), state(1500, 0, device)
    adamw_8bit_(*ours, found_inf=torch.tensor(flag, device=device), **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True)) == (flag != 0)


def test_small_moments_beside_large_ones_do_not_blow_up(device: torch.device) -> None:
    """A gradient that comes once, and then zeros: v falls to the bottom of its code, never to 0, while m is not yet."""
    n = 256
    master, codes = torch.zeros(n, device=device), [torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(1, device=device) for _ in range(2)]
    for step in range(1, 30):
        grad = torch.zeros(n, device=device)
        grad[0] = 1.0
        grad[1:] = 3e-4 if step == 1 else 0.0
        adamw_8bit_(
            master, codes[0], scales[0], codes[1], scales[1], grad, step=step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=0.0,
        )  # fmt: skip
    assert master.abs().max() < 1e-3 * 30


def test_empty_and_fake_tensors(device: torch.device) -> None:
    adamw_8bit_(*state(0, 0, device), **HYPER)
    with FakeTensorMode():
        n = 10**12
        codes, scales = (torch.empty(n, dtype=torch.uint8) for _ in range(2)), (torch.empty(n // 256) for _ in range(2))
        (m, v), (a, b) = codes, scales
        adamw_8bit_(torch.empty(n), m, a, v, b, torch.empty(n, dtype=torch.bfloat16), **HYPER)


@pytest.mark.parametrize("seed", [None, 9])
def test_the_operator_is_registered_right(seed: int | None, device: torch.device) -> None:
    scale, out = torch.tensor(0.5, device=device), torch.zeros(70, dtype=torch.bfloat16, device=device)
    numbers = (3, 1e-3, 0.9, 0.999, 1e-8, 0.1, True, True, seed, 0)
    op = torch.ops.tritonspeed.adamw_8bit_
    torch.library.opcheck(op, (*state(70, 0, device, torch.bfloat16), scale, out, None, *numbers))


def test_torch_compile_takes_it_whole(device: torch.device) -> None:
    compiled, eager = state(300, 0, device), state(300, 0, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*tensors: Tensor) -> Tensor:
        adamw_8bit_(*tensors, **HYPER)
        return tensors[0] + 1

    result = step(*compiled)
    adamw_8bit_(*eager, **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True)) and torch.equal(result, eager[0] + 1)


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (1, torch.zeros(8), "exp_avg_code is torch.float32, must be uint8"),
        (2, torch.zeros(2), r"exp_avg_scale has shape \(2,\).*with 1 elements"),
        (4, torch.zeros(1).double(), "exp_avg_sq_scale is torch.float64, must be float32"),
        (5, torch.zeros(9), r"grad has shape \(9,\).*with 8 elements"),
    ],
)
def test_errors_name_what_was_given(index: int, tensor: Tensor, message: str) -> None:
    tensors = state(8)
    tensors[index] = tensor
    with pytest.raises(ValueError, match=f"adamw_8bit_: {message}"):
        adamw_8bit_(*tensors, **HYPER)
    with pytest.raises(ValueError, match="step is 0"):
        adamw_8bit_(*state(8), **{**HYPER, "step": 0})


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 5000
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs a GPU with 22 GB free")
    with torch.device("cuda"):
        master, grad = torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16)
        codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.zeros(num_blocks(0, n)) for _ in range(2)]
    grad[-5000:] = 1
    adamw_8bit_(master, codes[0], scales[0], codes[1], scales[1], grad, **{**HYPER, "step": 1})
    torch.testing.assert_close(master[-5000:].cpu(), torch.full((5000,), -1e-3), **tolerance(torch.float32))
    assert not master[:-5000].any()
