"""Gated units: every activation, flat and packed, views, and the halves of a fused projection in either order."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import interpreted

from tritonspeed.kernels._triton import recording, takes_reference
from tritonspeed.kernels.activations import ACTIVATIONS, activate_reference
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.glu import (
    BACKWARD,
    FORWARD,
    GLULaunch,
    geglu,
    geglu_packed,
    glu,
    glu_packed,
    launch_glu_backward,
    launch_glu_forward,
    reglu,
    swiglu,
    swiglu_packed,
)
from tritonspeed.kernels.nn.activation import GEGLU, SwiGLU

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((1, 1), (1, 2), (2, 3), (3, 7), (2, 15), (5, 17), (3, 127), (2, 760), (199, 8), (2, 4097), (3, 1004))
OPS = torch.ops.tritonspeed


def inputs(m: int, n: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: (2 * torch.randn(m, n)).to(device, dtype) for name in ("gate", "up")}


def plain(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """What models write."""
    return activate_reference(gate, activation) * up


def once(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The same, rounded once: the stricter judge."""
    wide = gate.dtype if gate.dtype == torch.float64 else torch.float32
    return plain(gate.to(wide), up.to(wide), activation).to(gate.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("judge", [plain, once])
def test_silu_against_fp64(judge, m, n, dtype, device):
    x = inputs(m, n, dtype, device)
    grad = torch.randn(m, n, device=device)
    assert_as_exact_as_torch(swiglu, lambda gate, up: judge(gate, up, "silu"), x, [grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n"), [(3, 17), (2, 1024), (5, 250)])
def test_packed_against_fp64(activation, m, n, dtype, device):
    torch.manual_seed(1)
    x = {"gate_up": (2 * torch.randn(m, 2 * n)).to(device, dtype)}
    for gate_first in (True, False):

        def torchs(gate_up, gate_first=gate_first):
            first, second = gate_up.chunk(2, -1)
            return once(*((first, second) if gate_first else (second, first)), activation)

        ours = lambda gate_up, g=gate_first: glu_packed(gate_up, activation, gate_first=g)  # noqa: E731
        assert_as_exact_as_torch(ours, torchs, x, [torch.randn(m, n, device=device)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_over_its_whole_range(activation, device):
    gate = torch.cat([torch.linspace(-30, 30, 1501), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])]).to(device)
    x = {"gate": gate, "up": torch.ones_like(gate)}
    assert_as_exact_as_torch(
        lambda gate, up: glu(gate, up, activation), lambda gate, up: plain(gate, up, activation), x, [x["up"]]
    )


def test_the_named_forms_are_their_activation(device):
    gate, up = inputs(2, 9, torch.float32, device).values()
    both = torch.cat((gate, up), -1)
    for named, activation in (
        (swiglu, "silu"),
        (reglu, "relu"),
        (geglu, "gelu"),
        (lambda g, u: geglu(g, u, "tanh"), "gelu_tanh"),
        (lambda g, u: swiglu_packed(torch.cat((g, u), -1)), "silu"),
        (lambda g, u: geglu_packed(torch.cat((u, g), -1), "tanh", gate_first=False), "gelu_tanh"),
    ):
        torch.testing.assert_close(named(gate, up), glu_packed(both, activation))


def textbook_geglu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate * (0.5 * (1 + torch.erf(gate * 0.5**0.5))) * up


def test_nan_and_infinity_go_where_pytorch_sends_them(device):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0])
    gate, up = (x.flatten().to(device) for x in torch.meshgrid(special, special, indexing="ij"))
    for activation in ACTIVATIONS:
        x = {"gate": gate, "up": up}
        results = []
        # torch's vectorised gelu(∞) is NaN on a CPU, ours only where the CPU takes torch's
        torchs: Callable[..., torch.Tensor] = plain if activation != "gelu" or takes_reference(gate) else textbook_geglu
        functions: tuple[Callable[..., torch.Tensor], ...] = (glu, torchs)
        for function in functions:
            leaves = [v.clone().requires_grad_() for v in x.values()]
            y = function(*leaves, activation)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), *(leaf.grad for leaf in leaves)))
        for name, got, want in zip(("y", "dgate", "dup"), *results, strict=True):
            if name == "dgate" and torchs is textbook_geglu:  # its autograd makes NaN of up = ∞, where torch has none
                got, want = got[up.isfinite()], want[up.isfinite()]
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got), kind(want)), (activation, name, kind)


def views(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(2)
    fused = torch.randn(2, 3, 48, device=device, dtype=dtype)
    odd = torch.randn(4, 2 * 7 + 1, device=device, dtype=dtype)
    return {
        "halves of a fused projection": fused.chunk(2, -1),
        "odd rows": (odd[:, 1:8], odd[:, 8:]),
        "transposed": (
            torch.randn(5, 3, device=device, dtype=dtype).t(),
            torch.randn(3, 5, device=device, dtype=dtype),
        ),
        "expanded rows": (torch.randn(1, 9, device=device, dtype=dtype).expand(4, 9), odd[:, :9]),
        "expanded columns": (torch.randn(4, 1, device=device, dtype=dtype).expand(4, 9), odd[:, :9]),
        "every second column": (fused[..., ::2], fused[..., 1::2]),
        "a storage offset": (fused.flatten()[3:13], fused.flatten()[14:24]),
        "middle axes swapped": (fused.transpose(0, 1), fused.transpose(0, 1) + 1),
        "one column": (fused[..., :1], fused[..., 1:2]),
        "a number": (fused[0, 0, 0], fused[0, 0, 1]),
    }


@pytest.mark.parametrize("which", views(torch.device("cpu")))
def test_views_are_read_right(which, device):
    gate, up = views(device)[which]
    grad = torch.randn(gate.shape, device=device)
    got, want = ([], [])
    for found, function in ((got, swiglu), (want, lambda g, u: plain(g, u, "silu"))):
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = function(*leaves)
        found += [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert got[0].is_contiguous()


def test_halves_of_a_projection_are_not_copied():
    """What is launched gets the very memory of the halves."""
    gate, up = torch.empty(3, 4, 64).chunk(2, -1)
    with recording(CARDS["sm_90"]) as launches:
        launch_glu_forward(gate, up, "silu")
        launch_glu_backward(torch.empty(3, 4, 32), gate, up, "silu")
    for launched in launches:
        assert {gate.data_ptr(), up.data_ptr()} <= {
            x.data_ptr() for x in launched.arguments if isinstance(x, torch.Tensor)
        }


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape, device):
    gate, up = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.shape == shape and gate.grad.shape == shape and up.grad.shape == shape
    both = torch.zeros((*shape[:-1], 2 * shape[-1]), device=device, requires_grad=True)
    swiglu_packed(both).sum().backward()
    assert both.grad.shape == both.shape


def test_an_expanded_gradient_is_read_right(device):
    for leaves, function in (
        (list(inputs(3, 33, torch.float32, device).values()), swiglu),
        ([torch.randn(3, 66, device=device)], swiglu_packed),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        got = torch.autograd.grad(function(*leaves).sum(), leaves)
        want = torch.autograd.grad(function(*leaves), leaves, torch.ones(3, 33, device=device))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_only_one_input_wants_a_gradient(device):
    gate, up = inputs(2, 5, torch.float32, device).values()
    (dup,) = torch.autograd.grad(swiglu(gate, up.requires_grad_()).sum(), up)
    torch.testing.assert_close(dup, F.silu(gate))


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(3)
    gate, up = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    both = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation), (gate, up))
    assert torch.autograd.gradcheck(lambda x: glu_packed(x, activation, gate_first=False), (both,))


@interpreted
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 5), n=st.integers(1, 40), pad=st.integers(0, 9), shift=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES), activation=st.sampled_from(ACTIVATIONS), block=st.sampled_from((128, 256, 1024)),
)  # fmt: skip
def test_any_rows_anywhere(m, n, pad, shift, dtype, activation, block):
    torch.manual_seed(m * 100 + n)
    storage = torch.randn(m, 2 * n + pad + shift).to(dtype)
    gate, up = storage[:, shift : shift + n], storage[:, shift + n : shift + 2 * n]
    how = GLULaunch(block, 4)
    with FORWARD.pinned(how), BACKWARD.pinned(how):
        assert_as_exact_as_torch(
            lambda gate, up: glu(gate, up, activation),
            lambda gate, up: once(gate, up, activation),
            {"gate": gate, "up": up},
            [torch.randn(m, n)],
        )


def test_the_backward_op_alone_is_what_autograd_gives(device):
    gate, up = inputs(3, 10, torch.float32, device).values()
    grad = torch.randn(3, 10, device=device)
    for activation in ACTIVATIONS:
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        want = torch.autograd.grad(plain(*leaves, activation), leaves, grad)
        torch.testing.assert_close(OPS.glu_backward(grad, gate, up, activation), want)
        y = OPS.glu_forward(gate, up, activation)
        for gate_first in (True, False):
            both, wanted = (torch.cat(pair if gate_first else pair[::-1], -1) for pair in ((gate, up), want))
            torch.testing.assert_close(OPS.glu_packed_backward(grad, both, activation, gate_first), wanted)
            torch.testing.assert_close(OPS.glu_packed_forward(both, activation, gate_first), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_registered_right(dtype):
    gate, up, grad, both = (torch.randn(3, n).to(dtype) for n in (10, 10, 10, 20))
    torch.library.opcheck(OPS.glu_forward.default, (gate, up, "silu"))
    torch.library.opcheck(OPS.glu_forward.default, (*both.chunk(2, -1), "silu"))
    torch.library.opcheck(OPS.glu_backward.default, (grad, gate, up, "gelu"))
    torch.library.opcheck(OPS.glu_packed_forward.default, (both, "silu", True))
    torch.library.opcheck(OPS.glu_packed_backward.default, (grad[:1].expand(3, 10), both, "silu", False))


@interpreted
def test_torch_compile_and_export():
    class Block(torch.nn.Module):
        def forward(self, gate, both):
            return swiglu(gate, gate + 1) * geglu_packed(both, "tanh")

    gate, both = torch.randn(3, 8, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    want = Block()(gate, both)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, both), want)
    got = torch.autograd.grad(compiled(gate, both).sum(), (gate, both))
    for a, b in zip(got, torch.autograd.grad(want.sum(), (gate, both)), strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(Block(), (gate.detach(), both.detach())).module()
    torch.testing.assert_close(exported(gate.detach(), both.detach()), want.detach())


@interpreted
def test_a_second_derivative_is_refused():
    gate, up = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    for function in (swiglu, lambda gate, up: swiglu_packed(torch.cat((gate, up), -1))):
        (first,) = torch.autograd.grad(function(gate, up).sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match="GLU of tritonspeed.kernels has no second derivative"):
            first.sum().backward()


def test_two_runs_are_equal_and_so_are_two_tilings(device):
    gate, up = inputs(7, 515, torch.bfloat16, device).values()
    fused = torch.cat((gate, up), -1)
    results = []
    for block in (1024, 1024, 256, 4096):
        with FORWARD.pinned(GLULaunch(block, 4)), BACKWARD.pinned(GLULaunch(block, 4)):
            x = fused.clone().requires_grad_()
            y = swiglu_packed(x)
            y.backward(gate)
            results.append((y.detach(), x.grad, swiglu(gate, up)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], results[0][2]), "flat and packed differ"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 9 * n:
        pytest.skip(f"takes {9 * n / 2**30:.0f} GiB of GPU memory")
    gate = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    gate[-3:] = torch.tensor([1.0, -2.0, 3.0])
    want = plain(gate[-5:].float(), gate[-5:].float(), "silu").to(torch.bfloat16)
    assert torch.equal(swiglu(gate, gate)[-5:], want)
    rows = gate[: 2**31].view(2**16, 2**15)  # packed: rows · stride passes 2³¹
    rows[-1, -2:] = torch.tensor([1.5, -2.5])
    y = swiglu_packed(torch.cat((rows[:, : 2**14], rows), -1)[:, : 2**15])
    assert y.shape == (2**16, 2**14)
    del y
    y = swiglu(rows[:, 2**14 :], rows[:, 2**14 :])
    assert torch.equal(y[-1, -2:], plain(rows[-1, -2:].float(), rows[-1, -2:].float(), "silu").to(torch.bfloat16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(torch.zeros(2, 3), torch.zeros(2, 4)), r"swiglu: gate is \(2, 3\) .* up \(2, 4\)"),
        (lambda: swiglu(torch.zeros(2), torch.zeros(2).half()), "both must be alike"),
        (lambda: glu(torch.zeros(2), torch.zeros(2), "swish"), "'swish', must be one of silu, gelu"),
        (lambda: geglu(torch.zeros(2), torch.zeros(2), "fast"), "approximate is 'fast', must be 'none' or 'tanh'"),
        (lambda: swiglu(torch.zeros(2).long(), torch.zeros(2).long()), "gate is torch.int64"),
        (lambda: swiglu_packed(torch.zeros(2, 5)), r"gate_up is \(2, 5\), its last axis must be two halves"),
        (lambda: swiglu_packed(torch.zeros(())), r"gate_up is \(\), its last axis must be two halves"),
        (lambda: swiglu(torch.zeros(2, device="meta"), torch.zeros(2, device="meta")), "kernels exist for"),
    ],
)
def test_the_error_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_modules(device):
    gate, up = inputs(3, 12, torch.float32, device).values()
    both = torch.cat((gate, up), -1)
    assert torch.equal(SwiGLU()(gate, up), swiglu(gate, up))
    assert torch.equal(SwiGLU()(both), swiglu_packed(both))
    assert torch.equal(GEGLU("tanh", gate_first=False)(both), geglu_packed(both, "tanh", gate_first=False))
    assert re.search(r"approximate='tanh'", repr(GEGLU("tanh")))
