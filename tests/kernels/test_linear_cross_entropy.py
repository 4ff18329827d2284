"""The fused output layer and loss: all logits at once are the oracle, in fp64; chunks follow it and hold little."""

import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted
from tolerances import tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import tritonspeed as ts
from tritonspeed.kernels import linear_cross_entropy
from tritonspeed.kernels._triton import INTERPRETED, launch
from tritonspeed.kernels.cross_entropy_rows import CrossEntropyOptions
from tritonspeed.kernels.linear_cross_entropy import (
    _Wanted,
    chunk_tokens,
    linear_cross_entropy_reference,
    run_chunks,
)
from tritonspeed.kernels.scale_gradient import scale_gradient, scale_gradient_reference

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (7, 16, 33), (5, 24, 129), (4, 8, 1001)]  # tokens, hidden, classes
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
    "all none": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "reduction": "none", "ignore_index": 0},
}


def problem(
    t: int, h: int, v: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, ignore_index: int = -100
) -> dict[str, Tensor]:
    """Every third token ignored; logits of a size that a loss has in training."""
    generator = torch.Generator().manual_seed(t * 10007 + v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(0, v, (t,), generator=generator)
    target[1::3] = ignore_index
    tensors = {"hidden": normal(t, h), "weight": normal(v, h) * 2 / h**0.5, "bias": normal(v)}
    return {name: x.to(dtype).to(device) for name, x in tensors.items()} | {"target": target.to(device)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_fp64(variant: str, num_chunks: int, dtype: torch.dtype, device: torch.device) -> None:
    options = VARIANTS[variant]
    for t, h, v in SIZES if num_chunks > 1 else SIZES[1:2]:
        given = problem(t, h, v, dtype, device, options.get("ignore_index", -100))
        target = given.pop("target")
        if t == 7:
            given.pop("bias")
        g = torch.linspace(0.5, 2, t) if options.get("reduction") == "none" else torch.tensor(1.5)
        assert_as_exact_as_torch(
            lambda hidden, weight, bias=None, y=target: linear_cross_entropy(
                hidden, weight, y, bias=bias, num_chunks=num_chunks, **options
            ),
            lambda hidden, weight, bias=None, y=target: linear_cross_entropy_reference(
                hidden, weight, y, bias=bias, **options
            ),
            given,
            [g.to(device)],
            num_summed={"out0": v, "dhidden": v, "dweight": t, "dbias": t},
        )


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), h=st.integers(1, 9), v=st.integers(1, 40),
    num_chunks=st.integers(1, 5), reduction=st.sampled_from(["mean", "sum", "none"]), with_bias=st.booleans(),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_any_shape_in_any_chunks(
    shape: list[int], h: int, v: int, num_chunks: int, reduction: str, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, h, generator=generator) for s in (shape, [v]))
    bias = torch.randn(v, generator=generator) if with_bias else None
    target = torch.randint(0, v, shape, generator=generator)
    results = []
    for f, options in ((linear_cross_entropy, {"num_chunks": num_chunks}), (linear_cross_entropy_reference, {})):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        loss = f(leaves[0], leaves[1], target, bias=leaves[2] if with_bias else None, reduction=reduction, **options)
        loss.backward(torch.full_like(loss, 0.5))
        results.append([loss, *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float32, v + target.numel(), magnitude=4))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there: their peak, and the largest tensor."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.largest_elems = 0
        self.known = {x.untyped_storage()._cdata for x in given}  # views of these are not made

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self._freed, key, size)
                self.largest_elems = max(self.largest_elems, size // x.element_size())
            self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.fixture
def uncounted_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies a kernel's tensors, which no GPU does."""

    def uncounted(*arguments: Any, **options: Any) -> None:
        with _disable_current_modes():
            launch(*arguments, **options)

    for name in ("cross_entropy", "cross_entropy_rows"):
        monkeypatch.setattr(sys.modules[f"tritonspeed.kernels.{name}"], "launch", uncounted)


def counted(t: int, h: int, v: int, num_chunks: int, wanted: _Wanted, dtype: torch.dtype) -> LiveBytes:
    given = problem(t, h, v, dtype)
    gc.collect()
    with torch.no_grad(), LiveBytes(given.values()) as count:
        run_chunks(
            given["hidden"], given["weight"], given["bias"], given["target"], None, CrossEntropyOptions(), wanted,
            num_chunks,
        )  # fmt: skip
    return count


@pytest.mark.parametrize(
    "wanted", [_Wanted(True, True, True), _Wanted(True, False, False), _Wanted(False, False, False)]
)
@pytest.mark.usefixtures("uncounted_launches")
def test_no_tensor_has_all_logits(wanted: _Wanted) -> None:
    t, h, v, num_chunks = 24, 8, 501, 6
    count = counted(t, h, v, num_chunks, wanted, torch.float32)
    assert count.largest_elems <= max(t // num_chunks * 504, v * h), "a chunk of padded logits, or the weight"
    assert count.largest_elems < t * v / 2


@interpreted
@pytest.mark.usefixtures("uncounted_launches")
@pytest.mark.parametrize("num_chunks", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_is_the_docstrings_equation(num_chunks: int, dtype: torch.dtype) -> None:
    t, h, v, s = 24, 8, 501, dtype.itemsize
    padded = -(-v * s // 16) * 16 // s
    logits, r = t // num_chunks * padded * s, t // num_chunks
    want = logits + t * h * s + v * h * (4 if num_chunks > 1 else s) + 4 * v + 4 * t
    # what an operation makes and drops within a chunk: its losses, and beside them either the chunk's sum for the bias
    # or (as a CPU cannot multiply bf16 into fp32) the product that is added to dW
    scratch = 4 * r + max(4 * v, 0 if dtype == torch.float32 or num_chunks == 1 else v * h * s)
    found = counted(t, h, v, num_chunks, _Wanted(True, True, True), dtype).peak
    assert want <= found <= want + scratch
    alone = counted(t, h, v, num_chunks, _Wanted(False, False, False), dtype).peak
    # a chunk's losses and statistics, 12 bytes a token, and those of the chunk before until Python lets them go
    assert logits + 4 * t <= alone <= logits + 4 * t + 24 * r


def test_chunks_follow_the_sizes() -> None:
    assert chunk_tokens(100_000, 4096, None, True) == 4096
    assert chunk_tokens(100_000, 768, None, True) == 2048
    assert chunk_tokens(100_000, 4096, None, False) == 1024
    assert chunk_tokens(100, 4096, None, True) == 100
    assert chunk_tokens(10, 4096, 3, True) == 4


def test_frozen_parts_get_no_gradient_and_cost_none(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(9, 8, 33, torch.float32, device)
    target, everything = given.pop("target"), {}
    for frozen in ("", "hidden", "weight", "bias"):
        leaves = {name: x.clone().requires_grad_(name != frozen) for name, x in given.items()}
        linear_cross_entropy(leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], num_chunks=2).backward()
        everything[frozen] = {name: x.grad for name, x in leaves.items()}
    for frozen, grads in everything.items():
        for name, grad in grads.items():
            if name == frozen:
                assert grad is None
            else:
                assert torch.equal(grad, everything[""][name]), (frozen, name)
    made = torch.ops.tritonspeed.linear_cross_entropy(
        given["hidden"], given["weight"], None, target, None, "mean", 2, True, False, False, -100, 0.0, 0.0, 0.0
    )
    assert [x.numel() for x in made[1:4]] == [given["hidden"].numel(), 0, 0]


def test_without_gradients_only_the_loss_is_made(device: torch.device) -> None:
    given = problem(9, 8, 33, torch.float32, device)
    arguments = given["hidden"].requires_grad_(), given["weight"].requires_grad_(), given["target"]
    with_gradients = linear_cross_entropy(*arguments)
    with torch.no_grad():
        without = linear_cross_entropy(*arguments)
    assert with_gradients.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach(), **tolerance(torch.float32, 33))


def test_tied_weights_add_up(device: torch.device) -> None:
    torch.manual_seed(0)
    tokens, target = torch.randint(0, 21, (2, 3, 4), device=device)
    grads = []
    for f in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(21, 8).to(device)
        f(embedding(tokens).tanh(), embedding.weight, target).backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads, **tolerance(torch.float32, 21))


def test_backward_twice_and_accumulation(device: torch.device) -> None:
    given = problem(9, 8, 33, torch.float32, device)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, given["target"], num_chunks=2)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    (loss * 3).backward()
    torch.testing.assert_close(weight.grad, 4 * once, **tolerance(torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_scaling_does_not_underflow_in_fp16(reduction: str, device: torch.device) -> None:
    given = problem(12, 8, 1001, torch.float16, device)
    grads = []
    for dtype in (torch.float16, torch.float64):
        hidden, weight = (given[name].detach().clone().to(dtype).requires_grad_() for name in ("hidden", "weight"))
        loss = linear_cross_entropy(hidden, weight, given["target"], reduction=reduction, num_chunks=2)
        (loss.sum().double() * 1024).backward()
        grads.append(weight.grad.double())
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < 4 * torch.finfo(torch.float16).eps


def test_all_ignored_and_nothing_at_all(device: torch.device) -> None:
    given = problem(4, 8, 33, torch.float32, device)
    for tokens in (4, 0):
        hidden = given["hidden"][:tokens].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_()
        target = torch.full((tokens,), -100, device=device)
        for reduction in ("mean", "sum", "none"):
            loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
            want = linear_cross_entropy_reference(hidden, weight, target, reduction=reduction)
            torch.testing.assert_close(loss, want, rtol=0, atol=0, equal_nan=True)
            dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), torch.ones_like(loss))
            assert torch.equal(dhidden, torch.zeros_like(hidden)) and torch.equal(dweight, torch.zeros_like(weight))


def test_not_finite_hidden(device: torch.device) -> None:
    given = problem(4, 8, 33, torch.float32, device)
    given["hidden"][0, 0], given["target"][0] = float("nan"), 3
    losses = linear_cross_entropy(given["hidden"], given["weight"], given["target"], reduction="none")
    assert losses.isnan().tolist() == [True, False, False, False]
    assert linear_cross_entropy(given["hidden"], given["weight"], given["target"]).isnan()


def test_a_target_that_is_no_class(device: torch.device) -> None:
    given = problem(3, 8, 33, torch.float32, device)
    given["target"][0] = 33
    if device.type == "cpu" and not INTERPRETED:
        with pytest.raises(IndexError, match="target 33 is out of bounds: there are 33 classes"):
            linear_cross_entropy(given["hidden"], given["weight"], given["target"])
    else:
        losses = linear_cross_entropy(given["hidden"], given["weight"], given["target"], reduction="none")
        assert losses.isnan().tolist() == [True, False, False]


def test_strides(device: torch.device) -> None:
    given = problem(12, 8, 33, torch.float32, device)
    hidden = given["hidden"].view(3, 4, 8).transpose(0, 1).requires_grad_()
    weight = given["weight"].t().contiguous().t().requires_grad_()
    target = given["target"].view(3, 4).t()
    leaves = (hidden, weight)
    ours = torch.autograd.grad(linear_cross_entropy(*leaves, target, num_chunks=5), leaves)
    theirs = torch.autograd.grad(linear_cross_entropy_reference(*leaves, target), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32, 33))
    losses = linear_cross_entropy(*leaves, target, reduction="none", num_chunks=5)
    expanded = torch.autograd.grad(losses.sum(), leaves)  # the gradient of a sum has stride 0
    theirs = torch.autograd.grad(linear_cross_entropy_reference(*leaves, target, reduction="sum"), leaves)
    for a, b in zip(expanded, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32, 33))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, device: torch.device) -> None:
    given = problem(9, 8, 33, torch.float32, device)
    results = []
    for f, options in ((linear_cross_entropy, {"num_chunks": 3}), (linear_cross_entropy_reference, {})):
        hidden, weight, bias = (given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = f(hidden, weight, given["target"], bias=bias, reduction=reduction, **options)
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **tolerance(torch.bfloat16, magnitude=2))


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    given = problem(9, 8, 1001, torch.float32, device)
    runs = []
    for _ in range(2):
        leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        loss = linear_cross_entropy(leaves[0], leaves[1], given["target"], bias=leaves[2], num_chunks=2)
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    options = VARIANTS[variant]
    given = problem(2, 2, 3, torch.float64, CPU, options.get("ignore_index", -100))
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(
            hidden, weight, given["target"], bias=bias, num_chunks=2, **options
        ),
        leaves,
    )


def test_double_backward_is_refused(device: torch.device) -> None:
    given = problem(3, 8, 9, torch.float32, device)
    loss = linear_cross_entropy(given["hidden"].requires_grad_(), given["weight"], given["target"]).square()
    (dhidden,) = torch.autograd.grad(loss, given["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dhidden.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_scaling(dtype: torch.dtype, device: torch.device) -> None:
    for n in (0, 1, 2047, 2048, 2049):
        x = torch.randn(n, device=device).to(dtype)
        g, scale = torch.tensor(1.5, dtype=dtype, device=device), torch.tensor(1 / 8191, device=device)
        for out in (dtype, torch.float32):
            assert torch.equal(scale_gradient(x, g, scale, out), scale_gradient_reference(x, g, scale, out))
    torch.library.opcheck(torch.ops.tritonspeed.scale_gradient, (x, g, scale, dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wants", [(True, True, True), (False, False, False)], ids=str)
def test_the_operator_is_registered_right(wants: tuple[bool, bool, bool], reduction: str) -> None:
    for num_chunks, dtype in ((1, torch.float32), (2, torch.float16)):
        given = problem(6, 8, 17, dtype)
        g = torch.rand(2, 3) if reduction == "none" else None
        torch.library.opcheck(
            torch.ops.tritonspeed.linear_cross_entropy,
            (
                given["hidden"].view(2, 3, 8), given["weight"], given["bias"], given["target"].view(2, 3), g, reduction,
                num_chunks, *wants, -100, 0.1, 1e-3, 5.0,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(reduction: str, device: torch.device) -> None:
    given = problem(6, 8, 17, torch.float32, device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = linear_cross_entropy(hidden * 2, weight, given["target"], reduction=reduction, num_chunks=2)
        return losses.sum()

    results = []
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight")]
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_exports(device: torch.device) -> None:
    given = problem(6, 8, 17, torch.float32, device)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss, self.head = ts.nn.LinearCrossEntropyLoss(), torch.nn.Linear(8, 17).to(device)

        def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
            return self.loss(hidden, self.head, target)

    model = Model().requires_grad_(False)
    program = torch.export.export(model, (given["hidden"], given["target"]))
    arguments = given["hidden"], given["target"]
    assert torch.equal(program.module()(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(9, 7)}, r"weight \(9, 7\) must be \(V, H\), H the last axis of hidden \(3, 8\)"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\) must be \(9,\)"),
        ({"weight": torch.zeros(9, 8).half()}, "hidden is torch.float32, weight torch.float16"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target \(2,\) must have an index for each row of hidden"),
        ({"num_chunks": 0}, "num_chunks is 0, must be at least 1"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.int32)}, "hidden is torch.int32"),
        ({"reduction": "median"}, "linear_cross_entropy: reduction is 'median'"),
    ],
)
def test_the_error_names_what_was_given(arguments: dict[str, Any], message: str) -> None:
    given = {
        "hidden": torch.zeros(3, 8), "weight": torch.zeros(9, 8), "target": torch.zeros(3, dtype=torch.int64),
        **arguments,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_module_replaces_a_language_models_head_and_loss(with_bias: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, device=device)
    tokens = torch.randint(0, 17, (2, 5), device=device)
    tokens[0, 2] = -100
    lm_head = torch.nn.Linear(8, 17, bias=with_bias).to(device)
    logits = lm_head(hidden)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss = ts.nn.LinearCrossEntropyLoss(shift=True)(hidden, lm_head, tokens)
    torch.testing.assert_close(loss, want, **tolerance(torch.float32, 17))
    want = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    module = ts.nn.LinearCrossEntropyLoss(reduction="sum")
    torch.testing.assert_close(module(hidden, lm_head, tokens), want, **tolerance(torch.float32, 17))
    torch.testing.assert_close(
        module(hidden, lm_head.weight, tokens, lm_head.bias), want, **tolerance(torch.float32, 17)
    )
    assert not list(module.parameters()) and "reduction='sum'" in repr(module)


@pytest.mark.gpu
def test_the_peak_on_a_gpu() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("wants a GPU with 8 GiB free")
    t, h, v, num_chunks = 8192, 1024, 50257, 8
    hidden = torch.randn(t, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(v, h, device="cuda") * 0.02).bfloat16().requires_grad_()
    target = torch.randint(0, v, (t,), device="cuda")
    linear_cross_entropy(hidden, weight, target, num_chunks=num_chunks)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, target, num_chunks=num_chunks)
    peak = torch.cuda.max_memory_allocated() - before
    want = t // num_chunks * 50264 * 2 + t * h * 2 + v * h * 4 + 4 * t
    assert peak <= want + 2**22, "a chunk, the gradients, and less than 4 MiB beside"
    assert peak < t * v * 2


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    given = problem(64, 16, 1001, torch.bfloat16, torch.device("cuda"))
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    linear_cross_entropy(hidden, weight, given["target"], num_chunks=4).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, given["target"], num_chunks=4).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
