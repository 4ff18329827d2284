"""Sum of squares and global norm: exactness, the overflow flag, and equality to the last bit of any two runs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import tolerance
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels import global_norm, sum_of_squares
from tritonspeed.kernels._triton import INTERPRETED
from tritonspeed.kernels.global_norm import (
    CPU_CHUNK_ELEMS,
    SEGMENT,
    sum_of_squares_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 1023, 1024, 1025, 4097, SEGMENT - 1, SEGMENT, 3 * SEGMENT + 7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_equals_fp64(n: int, dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(n) * 3).to(device, dtype)
    got = sum_of_squares(x)
    assert got.shape == () and got.dtype == torch.float64 and got.device == x.device
    torch.testing.assert_close(got, sum_of_squares_reference([x]), **tolerance(torch.float32, n))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    transposed=st.booleans(),
)
def test_any_list_of_tensors(shapes: list[list[int]], dtypes: list[torch.dtype], transposed: bool) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    if transposed:
        tensors = [x.transpose(0, -1) if x.ndim > 1 else x for x in tensors]
    norm, found_inf = global_norm(tensors)
    want = torch.cat([x.double().flatten() for x in tensors]).norm().float()
    assert norm.dtype == found_inf.dtype == torch.float32 and norm.shape == found_inf.shape == ()
    torch.testing.assert_close(norm, want, **tolerance(torch.float32, sum(x.numel() for x in tensors)))
    assert found_inf.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, -1, SEGMENT + 5])
def test_what_is_not_finite_is_found(bad: float, where: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(2 * SEGMENT + 11, dtype=dtype, device=device)
    assert global_norm([x])[1].item() == 0
    x[where] = bad
    norm, found_inf = global_norm([torch.ones(5, device=device), x])
    assert found_inf.item() == 1 and not math.isfinite(norm.item())


def test_a_square_beyond_fp32_counts_as_overflow_and_large_fp16_does_not(device: torch.device) -> None:
    assert global_norm([torch.full((1024,), 2e19, device=device)])[1].item() == 1
    norm, found_inf = global_norm([torch.full((100,), 65504.0, dtype=torch.float16, device=device)])
    assert found_inf.item() == 0
    torch.testing.assert_close(norm.item(), 655040.0, **tolerance(torch.float32, 100))


def test_the_second_stage_adds_in_fp64(device: torch.device) -> None:
    x = torch.zeros(2 * SEGMENT, device=device)
    x[0], x[SEGMENT] = 4096, 1
    assert sum_of_squares(x).item() == 2**24 + 1  # one more than fp32 counts to
    if INTERPRETED or device.type == "cuda":  # the kernel's lanes too: only a lane's own terms are added in fp32
        x[1], x[SEGMENT] = 1, 0
        assert sum_of_squares(x).item() == 2**24 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetition_change_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    n = SEGMENT + 9 if INTERPRETED else 3 * CPU_CHUNK_ELEMS + 1000
    x = torch.randn(n).to(device, dtype)
    seen = set()
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        seen.add(sum_of_squares(x).item())
    assert len(seen) == 1


def test_the_operator_is_registered_right(device: torch.device) -> None:
    tensors = [torch.randn(5, 3, device=device), torch.randn(7, device=device).bfloat16()]
    torch.library.opcheck(torch.ops.tritonspeed.sum_of_squares, (tensors,))


def test_torch_compile_takes_it_whole(device: torch.device) -> None:
    compiled_norm = torch.compile(global_norm, fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(50, device=device), torch.randn(3, 4, device=device)]
    for got, want in zip(compiled_norm(tensors), global_norm(tensors), strict=True):
        assert torch.equal(got, want)


def test_fake_tensors_pass_through() -> None:
    with FakeTensorMode():
        norm, found_inf = global_norm([torch.empty(10**12, dtype=torch.bfloat16), torch.empty(3, 3)])
        assert norm.shape == found_inf.shape == () and norm.dtype == torch.float32
        assert sum_of_squares(torch.empty(10**12)).dtype == torch.float64


def test_a_parameter_is_taken_and_no_graph_is_kept() -> None:
    norm, _ = global_norm([torch.nn.Parameter(torch.ones(4))])
    assert norm.item() == 2 and not norm.requires_grad


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match="the list of tensors is empty"):
        global_norm([])
    with pytest.raises(ValueError, match="tensor 1 is torch.int64, must be float32, bfloat16 or float16"):
        global_norm([torch.zeros(1), torch.zeros(1).long()])
    with pytest.raises(ValueError, match="tensor 1 is on meta, tensor 0 on cpu"):
        global_norm([torch.zeros(1), torch.zeros(1, device="meta")])
    with pytest.raises(ValueError, match="sum_of_squares: the tensors are on meta"):
        sum_of_squares(torch.zeros(1, device="meta"))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("needs a GPU with 8 GiB free")
    x = torch.zeros(2**31 + 9, dtype=torch.bfloat16, device="cuda")
    x[-3:] = 2
    assert sum_of_squares(x).item() == 12
