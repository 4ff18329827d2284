"""AdamW over a table of addresses: the same bits as tensor by tensor, and a plan that notices what changes under it."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import interpreted
from tolerances import tolerance
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tritonspeed.kernels._triton import INTERPRETED, recording
from tritonspeed.kernels.adamw import AdamWStep, adamw_
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.multi_tensor import (
    MULTI_TENSOR_ADAMW,
    MultiTensorAdamW,
    MultiTensorLaunch,
    TensorColumns,
    addresses_of,
    chunks_of,
    mixed_seed,
)
from tritonspeed.optim import AdamW
from tritonspeed.optim.elementwise import ElementwiseOptimizer

SIZES = [1, 7, 1024, 3000, 66_000, 16, 2049]
STEPS = [
    AdamWStep(3, 1e-3, 0.9, 0.999, 1e-8, 0.1, True, True, None, 0),
    AdamWStep(50, 1e-2, 0.8, 0.99, 1e-6, 0.0, True, False, None, 0),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: the interpreter's CPU, or a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the interpreter's lane: started by test_interpreter_lane.py")
    return torch.device(request.param)


class OneByOne(AdamW):
    """The same optimizer, each tensor by itself."""

    _step_params_ = ElementwiseOptimizer._step_params_


def tensors(sizes: list[int], device: torch.device, dtype: torch.dtype = torch.float32, skip: int = 0) -> list[Tensor]:
    """Positive numbers, the same for the same arguments; ``skip`` elements off an aligned address."""
    generator = torch.Generator().manual_seed(sum(sizes) + 1)
    return [torch.rand(n + skip, generator=generator).to(device, dtype)[skip:] for n in sizes]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_table_gives_the_bits_of_the_flat_kernel(
    device: torch.device, dtype: torch.dtype, skip: int, decoupled: bool
) -> None:
    def state() -> tuple[list[list[Tensor]], list[Tensor] | None]:
        outs = None if dtype == torch.float32 else tensors(SIZES, device, dtype, skip)
        return [tensors(SIZES, device, skip=skip) for _ in range(3)], outs

    random = dtype == torch.bfloat16
    (ours, outs), (plain, plain_outs) = state(), state()
    grads = tensors(SIZES, device, dtype, skip)
    scale, seed = torch.tensor(0.37, device=device), 2**62 + 5
    rows = [i % 2 for i in range(len(SIZES))]
    with MULTI_TENSOR_ADAMW.pinned(MultiTensorLaunch(chunk=4096, block=1024, num_warps=4)):
        table = MultiTensorAdamW(
            TensorColumns(ours[0], ours[1], ours[2], outs, rows, range(len(SIZES))), dtype, decoupled, random
        )
    for row, at in enumerate(STEPS):
        table.set_row(row, at, rounding_seed=seed)
    table.set_grads(addresses_of(grads))
    table.upload_()
    table.update_(grad_scale=scale)
    for i, row in enumerate(rows):
        at = STEPS[row]
        adamw_(
            plain[0][i], plain[1][i], plain[2][i], grads[i], step=at.step, lr=at.lr, betas=(at.beta1, at.beta2),
            eps=at.eps, weight_decay=at.weight_decay, decoupled=decoupled, bias_correction=at.bias_correction,
            grad_scale=scale,
            param_out=None if plain_outs is None else plain_outs[i],
            stochastic_rounding_seed=mixed_seed(seed, i, at.step) if random else None,
        )  # fmt: skip
    for mine, theirs in zip([*ours, outs or []], [*plain, plain_outs or []], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_found_inf_leaves_everything_untouched(device: torch.device) -> None:
    columns = [tensors(SIZES, device) for _ in range(3)]
    before = copy.deepcopy(columns)
    table = MultiTensorAdamW(
        TensorColumns(columns[0], columns[1], columns[2], None, [0] * 7, range(7)), torch.float32, True, False
    )
    table.set_row(0, STEPS[0])
    table.set_grads(addresses_of(columns[0]))
    table.upload_()
    for flag in (1.0, float("nan"), 0.0):
        table.update_(found_inf=torch.tensor(flag, device=device))
        assert all(torch.equal(a, b) for a, b in zip(columns[0], before[0], strict=True)) == (flag != 0)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), chunk=st.sampled_from([1, 4, 16]))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_chunks_cover_every_element_once_and_full_ones_come_first(sizes: list[int], chunk: int) -> None:
    chunks = chunks_of(sizes, chunk)
    lengths = [min(chunk, sizes[t] - i * chunk) for t, i in chunks.T]
    assert lengths == sorted(lengths, reverse=True) and all(n > 0 for n in lengths)
    covered = sorted((t, i * chunk + k) for (t, i), n in zip(chunks.T, lengths, strict=True) for k in range(n))
    assert covered == [(t, k) for t, n in enumerate(sizes) for k in range(n)]


def test_a_thousand_tensors_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonspeed.optim.adamw.takes_reference", lambda tensor: False)
    params = [nn.Parameter(torch.zeros(1 + i % 100)) for i in range(1000)]
    give_gradients(params, 0)
    halves = [{"params": params[:500], "lr": 1e-2}, {"params": params[500:], "weight_decay": 0.0}]
    optimizer = AdamW(halves)
    for step in range(3):
        with recording(CARDS["sm_90"]) as launches:
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        assert [launched.grid for launched in launches] == [(1000,)]
        assert {type(x) for x in launches[0].constants.values()} <= {bool, int, type(None)} | {type(FP32)}
        assert not any(isinstance(x, float) for x in (*launches[0].arguments, *launches[0].constants.values()))
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


FP32 = pytest.importorskip("triton.language").float32


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Odd shapes: a scalar, an empty one, a channels-last one, matrices, one off an aligned address."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((), (0,), (2, 3, 4, 5), (17, 33), (5000,), (3, 7))
    found = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    found[2] = found[2].contiguous(memory_format=torch.channels_last)
    found[5] = torch.cat((torch.zeros(1, device=device, dtype=dtype), found[5].flatten()))[1:].view(3, 7)
    return [nn.Parameter(x) for x in found]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def pair(device: torch.device, dtype: torch.dtype, state: str = "fp32", **options: Any) -> tuple[AdamW, AdamW]:
    """Two optimizers of the same parameters in two groups: by tables, and one by one."""

    def groups() -> list[dict[str, Any]]:
        params = parameters(device, dtype)
        return [{"params": params[:3], "weight_decay": 0.0}, {"params": params[3:], "lr": 3e-2, "betas": (0.8, 0.99)}]

    shared = {"lr": 1e-2, "weight_decay": 0.1, "stochastic_rounding": True, "rounding_seed": 2**50, "state": state}
    return AdamW(groups(), **shared, **options), OneByOne(groups(), **shared)


def all_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_equal(a: AdamW, b: AdamW) -> None:
    for p, q in zip(all_params(a), all_params(b), strict=True):
        assert torch.equal(p, q)
        assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
        for name, value in a.state.get(p, {}).items():
            assert torch.equal(value.cpu(), b.state[q][name].cpu()), name


def drop_some(params: list[nn.Parameter]) -> None:
    params[3].grad = params[0].grad = None


def stride_0(params: list[nn.Parameter]) -> None:
    params[3].grad = torch.full((), 0.5).to(params[3]).expand(17, 33)


def transposed(params: list[nn.Parameter]) -> None:
    params[3].grad = torch.linspace(-1, 1, 17 * 33).to(params[3]).view(33, 17).t()


def moved(params: list[nn.Parameter]) -> None:
    params[3].data = params[3].data.clone()
    params[4].data = torch.cat((params[4].data[:1], params[4].data))[1:]


CHANGES: dict[str, Callable[[list[nn.Parameter]], None]] = {
    "some without a gradient": drop_some,
    "a stride-0 gradient": stride_0,
    "a transposed gradient": transposed,
    "moved parameters": moved,
}


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_noticed(
    device: torch.device, dtype: torch.dtype, change: str, state: str
) -> None:
    both = pair(device, dtype, state=state)
    for step in range(4):
        for optimizer in both:
            give_gradients(all_params(optimizer), step)
            if step in (1, 2):
                CHANGES[change](all_params(optimizer))
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        assert_equal(*both)


def test_added_groups_assigned_states_and_set_counts_are_noticed(device: torch.device) -> None:
    both = pair(device, torch.bfloat16)
    for step in range(9):
        for optimizer in both:
            params = all_params(optimizer)
            some = optimizer.state[params[4]]
            if step == 2:
                new = nn.Parameter(torch.ones(77, device=device))
                optimizer.add_param_group({"params": [new], "weight_decay": 0.3})
            elif step == 3:
                some["exp_avg"] = some["exp_avg"] * 0.5
            elif step == 4:
                some.update(exp_avg_sq=some["exp_avg_sq"] * 2)
            elif step == 5:
                some["step"].fill_(1000)
            elif step == 6:
                optimizer.param_groups[1]["decoupled"] = False
            elif step == 7:
                for state in optimizer.state.values():
                    state["exp_avg"].data = state["exp_avg"].data * 2
            elif step == 8:
                optimizer.state[params[3]].clear()
                del optimizer.state[params[5]]
            give_gradients(all_params(optimizer), step)
            optimizer.step()
        assert_equal(*both)


def test_gradients_in_place_and_new_ones_at_the_same_address(device: torch.device) -> None:
    both = pair(device, torch.float32)
    for step in range(4):
        for optimizer in both:
            params = all_params(optimizer)
            if step == 0:
                give_gradients(params, 0)
            for param in params:
                param.grad.mul_(-0.5)
                param.grad = param.grad.detach()  # another tensor there
            optimizer.step()
        assert_equal(*both)


@pytest.mark.parametrize("load", ["file", "deepcopy"])
def test_a_saved_run_goes_on_to_the_last_bit(device: torch.device, load: str) -> None:
    first, plain = pair(device, torch.bfloat16)
    for step in range(3):
        for optimizer in (first, plain):
            give_gradients(all_params(optimizer), step)
            optimizer.step()
    assert all(type(state) is dict for state in first.state_dict()["state"].values())
    if load == "deepcopy":
        resumed = copy.deepcopy(first)
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed, _ = pair(device, torch.bfloat16)
        for mine, theirs in zip(all_params(resumed), all_params(first), strict=True):
            mine.data.copy_(theirs.data)
        resumed.load_state_dict(torch.load(file))
    for step in range(3, 6):
        for optimizer in (resumed, plain):
            give_gradients(all_params(optimizer), step)
            optimizer.step()
    assert_equal(resumed, plain)


def accumulate(optimizer: AdamW, seed: int) -> None:
    """A backward: gradients that are there are added to."""
    generator = torch.Generator().manual_seed(seed)
    losses = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in all_params(optimizer)]
    torch.autograd.backward(losses)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_gradients_stay_and_are_cleared(device: torch.device, dtype: torch.dtype, capturable: bool) -> None:
    ours, plain = pair(device, dtype, owns_gradients=True, capturable=capturable)
    for step in range(12):
        for optimizer in (ours, plain):
            accumulate(optimizer, step)
            accumulate(optimizer, 100 + step)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[1]["lr"] = 1e-2 / (step + 1)
        own = [p.grad for p in all_params(ours) if p.grad is not None]
        assert len(own) == 4 and not any(grad.any() for grad in own)  # the empty and the channels-last one are others
        if capturable and device.type == "cuda":  # β to the t by another library
            for p, q in zip(all_params(ours), all_params(plain), strict=True):
                torch.testing.assert_close(p, q, **tolerance(dtype, step + 1))
        else:
            assert_equal(ours, plain)
    assert len({grad.untyped_storage().data_ptr() for grad in own}) == 1


@pytest.mark.parametrize("which", ["gradient", "parameter"])
def test_own_gradients_that_are_taken_away_are_an_error(device: torch.device, which: str) -> None:
    params = [nn.Parameter(torch.ones(5, device=device)) for _ in range(30)]
    optimizer = AdamW(params, owns_gradients=True)
    give_gradients(params, 0)
    optimizer.step()
    if which == "gradient":
        params[17].grad = None
    else:
        params[17].data = params[17].data.clone()
    with pytest.raises(ValueError, match="no longer where it was: clear gradients with optimizer.zero_grad"):
        for _ in range(16):
            optimizer.step()


def test_some_states_moved_behind_the_plans_back_are_an_error(device: torch.device) -> None:
    params = [nn.Parameter(torch.ones(5, device=device)) for _ in range(30)]
    optimizer = AdamW(params)
    give_gradients(params, 0)
    optimizer.step()
    kept = optimizer.state[params[17]]["exp_avg"].data
    optimizer.state[params[17]]["exp_avg"].data = kept.clone()
    with pytest.raises(ValueError, match="data of some states was assigned"):
        for _ in range(16):
            optimizer.step()


def test_capturing_wants_gradients_that_stay() -> None:
    with pytest.raises(ValueError, match="capturable is True and owns_gradients False, must be True"):
        AdamW([nn.Parameter(torch.ones(3))], capturable=True)


@pytest.mark.gpu
def test_a_graph_holds_the_step() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device = torch.device("cuda")
    param, plain = (nn.Parameter(torch.linspace(-1, 1, 5000, device=device)) for _ in range(2))
    lr = torch.tensor(1e-2, device=device)
    ours, theirs = AdamW([param], lr=lr, owns_gradients=True, capturable=True), AdamW([plain], lr=1e-2)
    for optimizer, p in ((ours, param), (theirs, plain)):
        p.square().sum().backward()
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="pass capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        theirs.step()
    with torch.cuda.graph(graph):
        ours.zero_grad()
        param.square().sum().backward()
        ours.step()
    for step in range(5):
        lr.fill_(1e-2 / (step + 1))
        theirs.param_groups[0]["lr"] = 1e-2 / (step + 1)
        graph.replay()
        theirs.zero_grad()
        plain.square().sum().backward()
        theirs.step()
    torch.testing.assert_close(param, plain, **tolerance(torch.float32, 6))


def test_autograd_hears_of_the_update(device: torch.device) -> None:
    param = nn.Parameter(torch.ones(5, device=device))
    optimizer = AdamW([param])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_and_fake_tensors_take_their_own_ways(device: torch.device) -> None:
    embedding = nn.Embedding(4, 2, sparse=True, device=device)
    embedding(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(4, 2\) is sparse: set sparse=False"):
        AdamW(embedding.parameters()).step()
    with FakeTensorMode():
        param = nn.Parameter(torch.empty(10**11, device=device))
        param.grad = torch.empty(10**11, device=device)
        optimizer = AdamW([param])
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].numel() == 10**11


@interpreted
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("decoupled", [True, False])
def test_sixty_steps_follow_torch_in_fp64(seed: int, decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 40, 1100)]
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    optimizer = AdamW(ours, lr=1e-2, weight_decay=0.1, decoupled=decoupled)
    torchs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(exact, lr=1e-2, weight_decay=0.1)
    for _ in range(60):
        for p, q in zip(ours, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.double()
        optimizer.step()
        torchs.step()
    for p, q in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), **tolerance(torch.float32, num_summed=60))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 5000
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 18 * n:
        pytest.skip("needs a GPU with 40 GB free")
    params = [nn.Parameter(torch.zeros(n, device="cuda")), nn.Parameter(torch.zeros(5, device="cuda"))]
    for param in params:
        param.grad = torch.ones_like(param)
    AdamW(params, lr=1e-2).step()
    torch.testing.assert_close(params[0][-5000:], torch.full((5000,), -1e-2, device="cuda"), **tolerance(torch.float32))
    torch.testing.assert_close(params[0][:5], params[1], rtol=0.0, atol=0.0)


def test_seeds_of_neighbours_differ() -> None:
    seeds = {mixed_seed(s, p, t) for s, p, t in itertools.product((0, 1, 2**62), range(20), range(1, 20))}
    assert len(seeds) == 3 * 20 * 19 and all(0 <= seed < 2**63 for seed in seeds)
    assert np.array(list(seeds), dtype=np.int64).std() > 2**60  # spread over all bits
