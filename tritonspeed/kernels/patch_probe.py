"""What a module computes, found out by running it: never from its name.

Its type says what to expect of ``torch.nn``'s own modules, its structure of all others; then its ``forward`` is run, on
a shallow copy with fp32 tensors of our own in place of its parameters. The live module's weights are neither read nor
moved: modules on the meta device, sharded or quantised ones are found out like any other.

    norms           one or two parameters with one axis, no children: outputs and gradients against layer_norm and
                    rms_norm, with the weight as it is or as 1 + w; eps is an attribute that forward is seen to follow
    gated layers    two or three children with in_features and out_features, whose sizes fit gate, up and down. Stubs
                    take their places: what the last is given must be a(gate) · up, what it returns must be the result
    GELU            a module without tensors whose class speaks of GELU (what runs something unknown needs an occasion),
                    over a grid of numbers
"""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonspeed.kernels.activations import ACTIVATIONS, activate_reference
from tritonspeed.kernels.patched import Form, TypeKey, type_key
from tritonspeed.kernels.rms_norm import rms_norm_reference

RTOL, ATOL = 2e-5, 2e-6  # fp32 over rows of thousands: the nearest two candidates, gelu's forms, differ by 5e-4
WIDTH = 64  # of a norm that does not say its own
TYPES = (torch.float32, torch.bfloat16, torch.float16)
NORM_EPS = (1e-5, 1e-6, 1e-12, 1e-8)  # where it stands in the code
OTHER_EPS = 0.37


class NotAlike(Exception):
    """The module has the structure, and computes something else: why."""


def replaced(module: nn.Module, parameters: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy with other parameters and children; the module itself stays as it is."""
    probe = copy.copy(module)
    vars(probe)["_parameters"] = {**module._parameters, **parameters}
    vars(probe)["_modules"] = {**module._modules, **children}
    return probe


def _run(probe: nn.Module, *arguments: Any) -> Tensor:
    """Its class's forward, without hooks."""
    try:
        y = type(probe).forward(probe, *arguments)
    except Exception as error:
        said = str(error).strip().split("\n")[0][:120]
        raise NotAlike(f"forward raised {type(error).__name__}: {said}") from error
    if not isinstance(y, Tensor):
        raise NotAlike(f"forward returned a {type(y).__name__}")
    return y


def _is_close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got.double(), want.double(), rtol=RTOL, atol=ATOL)


@contextmanager
def _mode(probe: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation, on the probe and on its children, which the live module shares."""
    before = {module: module.training for module in probe.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _width(module: nn.Module) -> int:
    """The length of the axis that a norm is over."""
    sizes = [p.numel() for p in module._parameters.values() if p is not None]
    known = getattr(module, "normalized_shape", None) or sizes
    return known[0] if known and known[0] else WIDTH


def norm_form(module: nn.Module, device: torch.device) -> Form:
    """The form of a module that has the structure of a norm.

    Raises:
        NotAlike: it computes something else.
    """
    names = [name for name, p in module._parameters.items() if p is not None]
    n = _width(module)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(n, generator=generator).to(device).requires_grad_() for name in names}
    probe = replaced(module, {name: nn.Parameter(t.detach().clone()) for name, t in tensors.items()}, {})
    x = torch.randn(2, 3, n, generator=generator) * torch.tensor([[[30.0], [1.0], [1e-3]], [[1e-4], [0.1], [1.0]]])
    x = x.to(device)
    for form in _norm_candidates(module, names):
        if not _is_close(_run(probe, x), _normalised(form, x, tensors, _eps(probe, form))):
            continue
        if isinstance(form.eps, str):  # is it this attribute, or one that has its value by chance?
            other = copy.copy(probe)
            setattr(other, form.eps, OTHER_EPS)
            if not _is_close(_run(other, x), _normalised(form, x, tensors, OTHER_EPS)):
                continue
        _check_norm(probe, form, x, tensors)
        return dataclasses.replace(form, results=result_types(module, names, device))
    raise NotAlike("its result is neither layer_norm's nor rms_norm's")


def _norm_candidates(module: nn.Module, names: list[str]) -> Iterator[Form]:
    """Every norm that has these parameters, with every eps that the module could mean."""
    numbers = [name for name, value in vars(module).items() if isinstance(value, float) and 0 <= value < 0.1]
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        numbers.append("eps")
    weights: list[tuple[str | None, str | None]] = [(None, None)]
    if names:
        weights = [(names[0], None)] if len(names) == 1 else [(names[0], names[1]), (names[1], names[0])]
    for eps in (*numbers, *NORM_EPS):
        for weight, bias in weights:
            if bias is None:
                yield Form("rms_norm", weight, eps=eps)
                if weight is not None:
                    yield Form("rms_norm", weight, eps=eps, offset=1.0)
            yield Form("layer_norm", weight, bias, eps)


def _eps(module: nn.Module, form: Form) -> float:
    value = getattr(module, form.eps) if isinstance(form.eps, str) else form.eps
    return torch.finfo(torch.float32).eps if value is None else value


def _normalised(form: Form, x: Tensor, tensors: dict[str, Tensor], eps: float) -> Tensor:
    weight = None if form.weight is None else tensors[form.weight]
    bias = None if form.bias is None else tensors[form.bias]
    if form.kernel == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = rms_norm_reference(x, weight, eps, offset=form.offset)
    assert isinstance(y, Tensor), "without a residual there is one result"
    return y


def _check_norm(probe: nn.Module, form: Form, x: Tensor, tensors: dict[str, Tensor]) -> None:
    """Beyond one result: gradients, in training and in evaluation."""
    for training in (True, False):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = _normalised(form, mine, tensors, _eps(probe, form))
        with _mode(probe, training):
            got = _run(probe, theirs)
        if not _is_close(got, wanted):
            raise NotAlike(f"it is a {form.kernel}, but not when training is {training}")
        used = [name for name in (form.weight, form.bias) if name is not None]
        gradients: list[list[Tensor]] = []
        for y, leaves in (
            (wanted, [mine, *(tensors[name] for name in used)]),
            (got, [theirs, *(getattr(probe, name) for name in used)]),
        ):
            if not y.requires_grad:
                raise NotAlike(f"it is a {form.kernel} whose result has no gradient")
            found = torch.autograd.grad(y, leaves, torch.ones_like(y) + x, allow_unused=True)
            gradients.append([torch.zeros(()) if g is None else g / g.abs().amax().clamp(min=1) for g in found])
        if not all(_is_close(a, b) for a, b in zip(*gradients, strict=True)):
            raise NotAlike(f"it is a {form.kernel} with other gradients")


def result_types(module: nn.Module, names: list[str], device: torch.device) -> tuple[tuple[TypeKey, torch.dtype], ...]:
    """What type comes out for every type of x and of the parameters, with and without autocast.

    Asked on the module's device and on the GPU that it may move to: autocast has a list of its own for each.
    """
    n = _width(module)
    kinds = {device.type} | ({"cuda"} if torch.cuda.is_available() else set())
    found = {}
    for kind in sorted(kinds):
        for weight_dtype in TYPES if names else (torch.float32,):
            ones = {name: nn.Parameter(torch.ones(n, device=kind, dtype=weight_dtype)) for name in names}
            probe, weight = replaced(module, ones, {}), ones[names[0]] if names else None
            for dtype in TYPES:
                x = torch.ones(1, n, device=kind, dtype=dtype)
                for lowered in (None, torch.bfloat16, torch.float16):
                    with torch.autocast(kind, lowered) if lowered is not None else nullcontext(), torch.no_grad():
                        try:
                            found[type_key(x, weight)] = _run(probe, x).dtype
                        except NotAlike:
                            continue  # PyTorch refuses these types: the original forward will say so
    return tuple(found.items())


class _Stub(nn.Module):
    """Stands for a linear: keeps what it is given, returns what it was told."""

    def __init__(self, name: str, result: Tensor, calls: list[tuple[str, Any]]) -> None:
        super().__init__()
        self._name, self._result, self._calls = name, result, calls

    def forward(self, x: Tensor) -> Tensor:
        self._calls.append((self._name, x))
        return self._result


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name → (in, out) of the children that say so, whatever their class: Linear, LoRA's, quantised ones."""
    sizes = {name: (getattr(m, "in_features", 0), getattr(m, "out_features", 0)) for name, m in module.named_children()}
    return {name: pair for name, pair in sizes.items() if all(isinstance(n, int) and n > 0 for n in pair)}


def _model_width(sizes: dict[str, tuple[int, int]]) -> int:
    """The length of a gated layer's input, 0 where the linears' sizes do not fit one another."""
    for down, (inner, _) in sizes.items():
        inputs = [pair for name, pair in sizes.items() if name != down]
        wanted = inner if len(inputs) == 2 else 2 * inner
        if len(inputs) in (1, 2) and all(pair == (inputs[0][0], wanted) for pair in inputs):
            return inputs[0][0]
    return 0


def _takes_one(module: nn.Module) -> bool:
    """Whether forward can be called with one argument."""
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except TypeError:
        return False
    return True


def is_like_gated_layer(module: nn.Module) -> bool:
    """Two or three linears of sizes that fit, and beside them nothing that has tensors."""
    sizes = linears(module)
    if not _takes_one(module):  # attention, mostly: it wants positions or a mask
        return False
    others = [child for name, child in module.named_children() if name not in sizes]
    has_tensors = any(list(m.parameters()) + list(m.buffers()) for m in others)
    return _model_width(sizes) > 0 and not has_tensors and not module._parameters and not module._buffers


def is_like_norm(module: nn.Module) -> bool:
    """No children or buffers, one parameter with one axis (or two of one length), or an eps and none."""
    tensors = [p for p in module._parameters.values() if p is not None]
    if module._modules or module._buffers or len(tensors) > 2 or any(p.dim() != 1 for p in tensors):
        return False
    speaks_of_norm = any("eps" in name for name in vars(module)) or "norm" in type(module).__name__.lower()
    return speaks_of_norm and len({p.numel() for p in tensors}) < 2


def is_like_gelu(module: nn.Module) -> bool:
    """Nothing that has tensors, and a class that speaks of GELU; not torch.nn's, which is one pass already."""
    is_bare = not (module._modules or module._buffers or module._parameters)
    return is_bare and "gelu" in type(module).__name__.lower() and type(module).forward is not nn.GELU.forward


def glu_form(module: nn.Module, device: torch.device) -> Form:
    """The form of a module that has the structure of a gated layer.

    Raises:
        NotAlike: it computes something else.
    """
    sizes, generator = linears(module), torch.Generator().manual_seed(0)
    calls: list[tuple[str, Any]] = []
    told = {name: 2 * torch.randn(3, size, generator=generator).to(device) for name, (_, size) in sizes.items()}
    probe = replaced(module, {}, {name: _Stub(name, result, calls) for name, result in told.items()})
    x = torch.randn(3, _model_width(sizes), generator=generator).to(device)
    forms = set()
    for training in (True, False):
        calls.clear()
        with _mode(probe, training):
            y = _run(probe, x)
        called = [name for name, _ in calls]
        if sorted(called) != sorted(told):
            raise NotAlike(f"its linears were called as {', '.join(called) or 'none of them'}: not each of them once")
        down = called[-1]
        if any(not torch.equal(given, x) for name, given in calls[:-1]):
            raise NotAlike("its first linears are given something else than its input")
        if y.shape != told[down].shape or not torch.equal(y, told[down]):
            raise NotAlike("its last linear's output is not its result")
        forms.add(_gate_of(tuple(called[:-1]), down, told, calls[-1][1], training))
    if len(forms) != 1:
        raise NotAlike("it computes one thing in training and another in evaluation")
    return forms.pop()


def _gate_of(inputs: tuple[str, ...], down: str, told: dict[str, Tensor], given: Any, training: bool) -> Form:
    """Which of the branches is the gate, and through what."""
    branches = tuple(told[name] for name in inputs) if len(inputs) == 2 else told[inputs[0]].chunk(2, dim=-1)
    for gate_first in (True, False):
        gate, up = branches if gate_first else reversed(branches)
        for activation in ACTIVATIONS:
            if isinstance(given, Tensor) and _is_close(given, activate_reference(gate, activation) * up):
                return Form("glu", activation=activation, inputs=inputs, output=down, gate_first=gate_first)
    raise NotAlike(
        f"between its linears is no activation ({', '.join(ACTIVATIONS)}) times the other branch, training {training}"
    )


def gelu_form(module: nn.Module, device: torch.device) -> Form:
    """The form of a module without tensors that speaks of GELU.

    Raises:
        NotAlike: it computes something else.
    """
    x = torch.linspace(-8, 8, 514, device=device).view(2, 257)
    probe, found = copy.copy(module), []
    for training in (True, False):
        with _mode(probe, training):
            y = _run(probe, x)
        found.append([form for form in ("gelu", "gelu_tanh") if _is_close(y, activate_reference(x, form))])
    if not found[0] or found[0] != found[1]:
        raise NotAlike("its result is neither form of gelu")
    return Form("gelu", activation=found[0][0])
