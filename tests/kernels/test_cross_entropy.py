"""Cross-entropy: PyTorch's F.cross_entropy is the oracle, in fp64; the reference and the kernels must follow it."""

import sys
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

import tritonspeed as ts
from tritonspeed.kernels import cross_entropy
from tritonspeed.kernels._triton import INTERPRETED, launch
from tritonspeed.kernels.cross_entropy import launch_cross_entropy_in_place_
from tritonspeed.kernels.cross_entropy_rows import CrossEntropyOptions, Rows

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (1, 1), (3, 2), (2, 3), (5, 7), (4, 8), (3, 15), (3, 16), (3, 17), (2, 63), (2, 129), (7, 760), (2, 1000),
    (2, 4095), (2, 4096), (2, 4097), (2, 32000), (2, 50257),
]  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed none": {"label_smoothing": 0.3, "reduction": "none"},
    "z-loss": {"z_loss": 1e-2},
    "capped": {"softcap": 5.0},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 7.0, "reduction": "none"},
    "all mean": {"label_smoothing": 1.0, "z_loss": 1e-2, "softcap": 7.0, "ignore_index": 0},
}


def batch(m: int, n: int, dtype: torch.dtype, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is ignored, the first and last class among the others."""
    generator = torch.Generator().manual_seed(m * 100003 + n)
    logits = (torch.randn(m, n, generator=generator, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, n, (m,), generator=generator)
    target[0], target[-1] = 0, n - 1
    target[1 : m - 1 : 3] = -100
    return logits.to(device), target.to(device)


def torchs(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """F.cross_entropy, with z-loss and cap written out in plain PyTorch."""
    z_loss, cap = options.pop("z_loss", 0.0), options.pop("softcap", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, target, **options)
    if not z_loss:
        return loss
    kept = target != options.get("ignore_index", -100)
    extra = (
        z_loss * logits.float().logsumexp(-1).square()
        if logits.dtype != torch.float64
        else z_loss * logits.logsumexp(-1).square()
    )
    extra = extra * kept
    reduction = options.get("reduction", "mean")
    added = extra if reduction == "none" else extra.sum() if reduction == "sum" else extra.sum() / kept.sum()
    return (loss + added).to(loss.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_fp64(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    options = VARIANTS[variant]
    sizes = {"mean": SIZES, "all": SIZES[1::3]}.get(variant, [(5, 7), (2, 129), (3, 1001)])
    if dtype == torch.float16 and "label_smoothing" in options:
        sizes = [(m, n) for m, n in sizes if n < 5000]  # PyTorch adds the classes' losses up in fp16: inf from 65504 on
    for m, n in sizes:
        logits, target = batch(m, n, dtype, device)
        target[target == -100] = options.get("ignore_index", -100)
        g = torch.linspace(0.5, 2, m, device=device) if options.get("reduction") == "none" else torch.tensor(1.5)
        assert_as_exact_as_torch(
            lambda logits, t=target: cross_entropy(logits, t, **options),
            lambda logits, t=target: torchs(logits, t, **options),
            {"logits": logits},
            [g.to(device)],
            num_summed={"out0": n},
        )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batches=st.integers(1, 3), tokens=st.integers(1, 4), n=st.integers(1, 70), lead=st.integers(0, 9),
    pad=st.integers(0, 9), cut=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 100),
    smoothing=st.sampled_from([0.0, 0.2]), reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
def test_rows_may_start_anywhere(
    batches: int, tokens: int, n: int, lead: int, pad: int, cut: bool, dtype: torch.dtype, seed: int,
    smoothing: float, reduction: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    width = n + pad
    flat = torch.randn(lead + batches * (tokens + 1) * width, generator=generator).to(dtype)
    logits = flat[lead:].view(batches, tokens + 1, width)[:, : tokens if cut else tokens + 1, :n]
    target = torch.randint(0, n, logits.shape[:-1], generator=generator)
    target[0, 0] = -100
    g = torch.rand(logits.shape[:-1] if reduction == "none" else (), generator=generator)
    got = []
    for x in (logits, logits.contiguous()):
        x = x.detach().requires_grad_()
        loss = cross_entropy(x, target, label_smoothing=smoothing, reduction=reduction)
        loss.backward(g.to(dtype))
        got.append((loss, x.grad))
    # where a row starts decides which thread adds what, so that a sum may round otherwise in its last place
    for ours, plain in zip(*got, strict=True):
        torch.testing.assert_close(ours, plain, **tolerance(dtype, n), equal_nan=True)


def test_shifted_logits_are_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = batch(3 * 6, 17, torch.float32, device)
    whole = logits.view(3, 6, 17).requires_grad_()
    shifted = whole[:, :-1]
    assert Rows.of(shifted) == (5, 6 * 17, 17)
    read = []

    def spy(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        read.append(arguments[0].data_ptr())
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(sys.modules["tritonspeed.kernels.cross_entropy"], "launch", spy)
    loss = cross_entropy(shifted, target.view(3, 6)[:, 1:])
    loss.backward()
    if INTERPRETED or device.type == "cuda":
        assert read == [whole.data_ptr()] * 2
    (want,) = torch.autograd.grad(torchs(whole[:, :-1].flatten(0, 1), target.view(3, 6)[:, 1:].flatten()), whole)
    torch.testing.assert_close(whole.grad, want, **tolerance(torch.float32, 17))


def test_other_layouts(device: torch.device) -> None:
    logits, target = batch(6, 35, torch.float32, device)
    four = logits.view(1, 2, 3, 35)
    views = {
        "classes first": logits.t().contiguous().t(),
        "every second row": torch.stack((logits, logits), 1).flatten(0, 1)[::2],
        "every second class": torch.stack((logits, logits), 2).flatten(1)[:, ::2],
        "three axes out of order": four.transpose(1, 2).contiguous().transpose(1, 2),
    }
    want = torchs(logits, target)
    for name, view in views.items():
        x = view.detach().requires_grad_()
        loss = cross_entropy(x, target.view(view.shape[:-1]))
        (dx,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss, want, **tolerance(torch.float32, 35), msg=lambda m, n=name: f"{n}: {m}")
        x = logits.detach().requires_grad_()
        (dwant,) = torch.autograd.grad(torchs(x, target), x)
        torch.testing.assert_close(dx.reshape(6, 35), dwant, **tolerance(torch.float32, 35))
    one = logits[:1].expand(6, 35).requires_grad_()
    torch.testing.assert_close(
        cross_entropy(one, target), torchs(one, target), **tolerance(torch.float32, 35)
    )  # stride 0


def test_an_expanded_gradient_is_read_right(device: torch.device) -> None:
    logits, target = batch(6, 33, torch.float32, device)
    shape = (2, 3, 33)
    x, y = (t.view(shape[: t.ndim + 1]).clone().requires_grad_(t.ndim == 2) for t in (logits, target))
    (dx,) = torch.autograd.grad(cross_entropy(x, y, reduction="none").sum(), x)
    (want,) = torch.autograd.grad(torchs(x.flatten(0, 1), y.flatten(), reduction="sum"), x)
    torch.testing.assert_close(dx, want, **tolerance(torch.float32, 33))


def test_one_row_and_no_rows(device: torch.device) -> None:
    x, y = torch.randn(9, device=device), torch.tensor(3, device=device)
    torch.testing.assert_close(cross_entropy(x, y), F.cross_entropy(x, y), **tolerance(torch.float32, 9))
    empty = torch.empty(0, 9, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert cross_entropy(empty, none).isnan() and cross_entropy(empty, none, reduction="sum") == 0
    loss = cross_entropy(empty, none, reduction="none")
    loss.sum().backward()
    assert loss.shape == (0,) and empty.grad is not None and empty.grad.shape == (0, 9)


def test_all_ignored_is_torchs(device: torch.device) -> None:
    x = torch.randn(3, 9, device=device, requires_grad=True)
    y = torch.full((3,), -100, device=device)
    for reduction in ("mean", "sum", "none"):
        ours, theirs = (f(x, y, reduction=reduction) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        (dx,) = torch.autograd.grad(ours, x, torch.ones_like(ours))
        assert torch.equal(dx, torch.zeros_like(x)), reduction


def test_not_finite_logits_are_torchs(device: torch.device) -> None:
    x = torch.randn(6, 21, device=device)
    y = torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    x[0, 3] = float("nan")
    x[1, 4] = float("inf")
    x[2, 5:] = float("-inf")  # masked classes
    x[3, 3] = float("-inf")  # the target itself
    x[4] = float("-inf")
    for smoothing in (0.0, 0.1):
        results = []
        for f in (cross_entropy, F.cross_entropy):
            leaf = x.clone().requires_grad_()
            loss = f(leaf, y, reduction="none", label_smoothing=smoothing)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        (ours, dours), (theirs, dtheirs) = results
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float32, 21), equal_nan=True)
        torch.testing.assert_close(dours, dtheirs, **tolerance(torch.float32, 21), equal_nan=True)


def test_large_and_small_logits(device: torch.device) -> None:
    _, y = batch(4, 50, torch.float32, device)
    x = torch.randn(4, 50, device=device)
    for scale, offset in ((1e4, 0.0), (1.0, 1e4), (1.0, -1e4), (1e-30, 0.0)):
        logits = x * scale + offset
        assert_as_exact_as_torch(
            lambda logits: cross_entropy(logits, y),
            lambda logits: F.cross_entropy(logits, y),
            {"logits": logits},
            [torch.tensor(1.0, device=device)],
            num_summed={"out0": 50},
        )


def test_a_target_that_is_no_class(device: torch.device) -> None:
    x = torch.randn(3, 9, device=device, requires_grad=True)
    for wrong in (9, -1, 2**40, -(2**40)):
        y = torch.tensor([1, wrong, 2], device=device)
        if device.type == "cpu" and not INTERPRETED:
            with pytest.raises(IndexError):
                cross_entropy(x, y)
            continue
        losses = cross_entropy(x, y, reduction="none")
        (dx,) = torch.autograd.grad(losses.sum(), x)
        assert losses.isnan().tolist() == [False, True, False]
        assert dx.isnan().all(1).tolist() == [False, True, False] and not dx[::2].isnan().any()
        assert cross_entropy(x, y).isnan()


def test_ignored_rows_are_not_read(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("PyTorch reads them")
    x = torch.randn(3, 9, device=device)
    x[1] = float("nan")
    y = torch.tensor([1, -100, 2], device=device)
    leaf = x.clone().requires_grad_()
    loss = cross_entropy(leaf, y)
    loss.backward()
    want = F.cross_entropy(x[::2], y[::2])
    torch.testing.assert_close(loss, want, **tolerance(torch.float32, 9))
    assert leaf.grad is not None and torch.equal(leaf.grad[1], torch.zeros(9, device=device))


def test_int32_targets(device: torch.device) -> None:
    x, y = batch(4, 17, torch.float32, device)
    assert torch.equal(cross_entropy(x, y.int()), cross_entropy(x, y))


@pytest.mark.parametrize("n", [16, 33])
def test_overwriting_gives_the_same_gradient_in_the_logits_memory(n: int, device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("CPU tensors take PyTorch")
    x, y = batch(5, n, torch.float32, device)
    weight = torch.randn(n, n, device=device, requires_grad=True)

    def run(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ weight
        before = logits.detach().clone()
        (dweight,) = torch.autograd.grad(cross_entropy(logits, y, **options), weight)
        return dweight, logits.detach(), before

    (plain, untouched, before), (over, overwritten, _) = run(), run(overwrite_logits=True)
    assert torch.equal(plain, over)
    assert torch.equal(untouched, before) and not torch.equal(overwritten, before)
    logits = x @ weight
    squares = logits.square().sum()  # needs the logits as they were
    loss = cross_entropy(logits, y, overwrite_logits=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_autocast_gives_torchs_type(device: torch.device) -> None:
    x, y = batch(4, 17, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = cross_entropy(x, y), F.cross_entropy(x, y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, **tolerance(torch.float32, 17))
    assert cross_entropy(x, y).dtype == F.cross_entropy(x, y).dtype == torch.bfloat16


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    x, y = batch(9, 4099, torch.float32, device)
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, y, label_smoothing=0.1)
        runs.append((loss, *torch.autograd.grad(loss, leaf)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_more_rows_than_one_step_of_the_sum(device: torch.device) -> None:
    rows = 40 if device.type == "cpu" else 10_000  # the interpreter takes a millisecond a row; a step is 4096 losses
    x, y = batch(rows, 3, torch.float32, device)
    torch.testing.assert_close(cross_entropy(x, y), F.cross_entropy(x, y), **tolerance(torch.float32, rows))


@interpreted
def test_the_sum_of_many_losses() -> None:
    from tritonspeed.kernels.cross_entropy_rows import launch_reduce

    losses, target = torch.rand(9001), torch.arange(9001) % 3
    total, scale = torch.empty(()), torch.empty(())
    kept = target != 1
    launch_reduce(losses * kept, target, total, scale, 1)
    torch.testing.assert_close(total, losses[kept].mean(), **tolerance(torch.float32, 9001))
    assert scale == 1 / kept.sum()


@interpreted
@pytest.mark.parametrize("n", [8, 13, 4100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_in_place(n: int, dtype: torch.dtype) -> None:
    x, y = batch(5, n, dtype)
    for options in (CrossEntropyOptions(), CrossEntropyOptions(-100, 0.1, 1e-2, 6.0)):
        for g in (None, torch.rand(5)):
            kw = dict(zip(("ignore_index", "label_smoothing", "z_loss"), options, strict=False))
            leaf = x.clone().requires_grad_()
            losses = cross_entropy(leaf, y, **kw, softcap=options.softcap or None, reduction="none")
            losses.backward(torch.ones_like(losses) if g is None else g.to(dtype))
            found, logits = torch.empty(5), x.clone()
            launch_cross_entropy_in_place_(logits, y, None if g is None else g.to(dtype), found, options)
            assert torch.equal(found.to(dtype), losses), "the same sums in another kernel"
            torch.testing.assert_close(logits, leaf.grad, **tolerance(dtype))


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    x, y = batch(3, 5, torch.float64)
    y[y == -100] = VARIANTS[variant].get("ignore_index", -100)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, y, **VARIANTS[variant]), x.requires_grad_())


def test_double_backward_is_refused(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("PyTorch can")
    x, y = batch(3, 9, torch.float32, device)
    (dx,) = torch.autograd.grad(cross_entropy(x.requires_grad_(), y).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators_are_registered_right(reduction: str) -> None:
    x, y = batch(6, 17, torch.float32)
    for logits, target in ((x, y), (x.view(2, 3, 17)[:, :2], y.view(2, 3)[:, :2])):
        ops, options = torch.ops.tritonspeed, (-100, 0.1, 1e-3, 5.0)
        torch.library.opcheck(ops.cross_entropy_forward, (logits, target, reduction, *options))
        loss, lse, scale = ops.cross_entropy_forward(logits, target, reduction, *options)
        torch.library.opcheck(ops.cross_entropy_backward, (loss, logits, target, lse, scale, *options))
        torch.library.opcheck(ops.cross_entropy_backward_, (loss, logits.clone(), target, lse, scale, *options))


@pytest.mark.parametrize("overwrite", [False, True])
def test_compiles_without_a_break(overwrite: bool, device: torch.device) -> None:
    x, y = batch(4, 17, torch.float32, device)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x * 2, y, label_smoothing=0.1, overwrite_logits=overwrite)

    results = []
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        out.backward()
        results.append((out, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_exports(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(x, y)

    x, y = batch(4, 17, torch.float32, device)
    program = torch.export.export(Model(), (x, y))
    assert torch.equal(program.module()(x, y), cross_entropy(x, y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.zeros(3)}, "target is torch.float32, must be int64 or int32"),
        (
            {"target": torch.zeros(4, dtype=torch.int64)},
            r"target \(4,\) must have an index for each row of logits \(3, 9\)",
        ),
        ({"logits": torch.zeros(3, 9, dtype=torch.int64)}, "logits are torch.int64, must be float32"),
        ({"logits": torch.zeros(3, 0)}, r"logits have shape \(3, 0\), must be \(..., V\)"),
        ({"weight": torch.ones(9)}, "class weights have no kernel here: use torch.nn.functional.cross_entropy"),
        ({"reduction": "average"}, "reduction is 'average', must be one of mean, sum, none"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5, must be in \[0, 1\]"),
        ({"softcap": 0.0}, "softcap is 0.0, must be greater than 0"),
    ],
)
def test_the_error_names_what_was_given(arguments: dict[str, Any], message: str) -> None:
    given = {"logits": torch.zeros(3, 9), "target": torch.zeros(3, dtype=torch.int64), **arguments}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**given)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "reduction": "none"},
        {"reduction": "sum", "ignore_index": 1},
        {"weight": torch.rand(5)},
    ],
    ids=str,
)
def test_the_module_is_torchs(shape: tuple[int, ...], options: dict[str, Any], device: torch.device) -> None:
    logits = torch.randn(shape, device=device)
    target = torch.randint(0, 5, shape[:1] + shape[2:] if len(shape) > 1 else (), device=device)
    ours, theirs = ts.nn.CrossEntropyLoss(**options).to(device), torch.nn.CrossEntropyLoss(**options).to(device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(logits, target), theirs(logits, target), **tolerance(torch.float32, 5))
    if len(shape) > 1:
        probabilities = torch.rand(shape, device=device)
        if "ignore_index" not in options:
            torch.testing.assert_close(ours(logits, probabilities), theirs(logits, probabilities))


def test_the_module_says_what_it_cannot() -> None:
    with pytest.raises(ValueError, match="class weights take PyTorch's cross-entropy"):
        ts.nn.CrossEntropyLoss(torch.ones(3), z_loss=0.1)
    with pytest.raises(ValueError, match=r"target is torch\.float32"):
        ts.nn.CrossEntropyLoss(z_loss=0.1)(torch.zeros(2, 3), torch.zeros(2, 3))
    assert "label_smoothing=0.1" in repr(ts.nn.CrossEntropyLoss(label_smoothing=0.1))


@pytest.mark.gpu
def test_more_than_2_31_logits() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("wants a GPU with 12 GiB free")
    n, m = 50257, 2**31 // 50257 + 2
    logits = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.linspace(-3, 3, n)
    target = torch.full((m,), -100, device="cuda")
    target[0], target[-1] = 5, n - 1
    logits.requires_grad_()
    losses = cross_entropy(logits, target, reduction="none")
    losses.sum().backward()
    assert logits.grad is not None
    for row in (0, -1):
        leaf = logits.detach()[row].clone().requires_grad_()
        want = F.cross_entropy(leaf, target[row])
        want.backward()
        torch.testing.assert_close(losses[row], want, **tolerance(torch.bfloat16, n, magnitude=16))
        torch.testing.assert_close(logits.grad[row], leaf.grad, **tolerance(torch.bfloat16))
