"""What a patched module is: its own class's subclass, whose forward takes a kernel where the call is one it fits.

The object stays, so parameters, buffers, hooks, names, state-dict keys, ``training``, ``requires_grad``, types and
devices stay; ``isinstance`` and the class's name stay, which FSDP's, PEFT's and Hugging Face's rules go by. The classes
are made when they are needed and found again by (original class, form), so that pickle and deepcopy work.

The original forward runs wherever a kernel does not: on CPU tensors, on tensor subclasses (DTensor), on calls with more
than the one tensor, on types that were not seen to work, under vmap and forward-mode derivatives. A second derivative
raises: ``unpatch`` what needs one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from tritonspeed.kernels._triton import DEVICES, takes_reference
from tritonspeed.kernels.activations import activate_reference
from tritonspeed.kernels.bias_gelu import bias_gelu
from tritonspeed.kernels.cross_entropy import cross_entropy
from tritonspeed.kernels.glu import DTYPES, glu, glu_packed
from tritonspeed.kernels.layer_norm import layer_norm
from tritonspeed.kernels.rms_norm import rms_norm
from tritonspeed.kernels.softmax import softmax

KERNELS = ("layer_norm", "rms_norm", "gelu", "glu", "softmax", "cross_entropy")
PLAIN = (Tensor, nn.Parameter, FakeTensor)
TypeKey = tuple[str, torch.dtype, torch.dtype | None, torch.dtype | None]  # device, x, weight, autocast's
_FORM = "_tritonspeed_form"


@dataclass(frozen=True)
class Form:
    """What a module computes, as far as its kernel needs to know.

    Attributes:
        kernel: one of ``KERNELS``.
        weight, bias: names of a norm's parameters, None where it has none.
        eps: the name of the attribute that a norm reads it from, or the number that stands in its code.
        offset: added to RMSNorm's weight: 1 in models that keep weight − 1.
        activation: of a gated layer or a GELU: see activations.py.
        inputs: the linears of a gated layer in the order they are called: (gate, up), (up, gate), or one for both.
        output: its last linear.
        gate_first: of the two inputs, or of the halves of one.
        results: which type comes out for which types in; a call that is not listed takes the original forward.
    """

    kernel: str
    weight: str | None = None
    bias: str | None = None
    eps: str | float = 0.0
    offset: float = 0.0
    activation: str = ""
    inputs: tuple[str, ...] = ()
    output: str = ""
    gate_first: bool = True
    results: tuple[tuple[TypeKey, torch.dtype], ...] = ()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast lowers to on this kind of device now, None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def type_key(x: Tensor, weight: Tensor | None) -> TypeKey:
    """What the type of a result depends on."""
    kind = x.device.type
    return kind, x.dtype, None if weight is None else weight.dtype, autocast_dtype(kind)


def _fits(x: Any) -> bool:
    """A tensor that a kernel takes: ordinary, on a GPU (or interpreted), floating, outside of vmap and jvp."""
    if type(x) not in PLAIN or x.device.type not in DEVICES or takes_reference(x) or x.dtype not in DTYPES:
        return False
    return torch.compiler.is_compiling() or (
        torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    )


def _only_tensor(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The one argument of a call, whatever its name; None where there are more or fewer."""
    if len(arguments) + len(keywords) != 1:
        return None
    return arguments[0] if arguments else next(iter(keywords.values()))


def _norm_forward(original: type[nn.Module], form: Form) -> Callable[..., Any]:
    results = dict(form.results)

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        x = _only_tensor(arguments, keywords)
        if not _fits(x):
            return original.forward(self, *arguments, **keywords)
        weight = None if form.weight is None else getattr(self, form.weight)
        bias = None if form.bias is None else getattr(self, form.bias)
        result = results.get(type_key(x, weight))
        is_shaped = weight is None or (x.dim() > 0 and weight.shape == x.shape[-1:])
        if result is None or not is_shaped or (weight is not None and type(weight) not in PLAIN):
            return original.forward(self, *arguments, **keywords)
        eps = getattr(self, form.eps) if isinstance(form.eps, str) else form.eps
        if eps is None:  # torch.nn.RMSNorm's default: that of the type it computes in
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        wide = x if result.itemsize <= x.dtype.itemsize else x.to(result)
        if form.kernel == "layer_norm":
            y = layer_norm(wide, weight, bias, eps)
        else:
            y = rms_norm(wide, weight, eps, offset=form.offset)
        return y.to(result)

    return forward


def _gelu_forward(original: type[nn.Module], form: Form) -> Callable[..., Any]:
    approximate = "tanh" if form.activation == "gelu_tanh" else "none"

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        x = _only_tensor(arguments, keywords)
        if not _fits(x) or x.dim() == 0:
            return original.forward(self, *arguments, **keywords)
        return bias_gelu(x, approximate=approximate)

    return forward


def _glu_forward(original: type[nn.Module], form: Form) -> Callable[..., Any]:
    activation, gate_first = form.activation, form.gate_first

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        x = _only_tensor(arguments, keywords)
        if not _fits(x):
            return original.forward(self, *arguments, **keywords)
        branches = [getattr(self, name)(x) for name in form.inputs]
        down = getattr(self, form.output)
        if len(branches) == 1 and type(branches[0]) in PLAIN and branches[0].dtype in DTYPES:
            return down(glu_packed(branches[0], activation, gate_first=gate_first))
        first, second = branches if len(branches) == 2 else branches[0].chunk(2, dim=-1)
        gate, up = (first, second) if gate_first else (second, first)
        if all(type(t) in PLAIN for t in (gate, up)) and gate.dtype == up.dtype and gate.dtype in DTYPES:
            return down(glu(gate, up, activation))
        return down(activate_reference(gate, activation) * up)  # the linears' own types: nothing is run twice

    return forward


def _softmax_forward(original: type[nn.Module], form: Form) -> Callable[..., Any]:
    results = dict(form.results)

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        x = _only_tensor(arguments, keywords)
        result = results.get(type_key(x, None)) if _fits(x) and self.dim is not None else None
        if result is None:
            return original.forward(self, *arguments, **keywords)
        return softmax(x if result == x.dtype else x.to(result), self.dim)

    return forward


def _cross_entropy_forward(original: type[nn.Module], form: Form) -> Callable[..., Any]:
    def forward(self: Any, input: Tensor, target: Tensor) -> Tensor:
        has_kernel = _fits(input) and self.weight is None and target.dtype in (torch.int64, torch.int32)
        if not has_kernel or input.dim() == 0:
            return original.forward(self, input, target)
        return cross_entropy(
            input.movedim(1, -1) if input.dim() > 2 else input,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    return forward


_FORWARDS = {
    "layer_norm": _norm_forward,
    "rms_norm": _norm_forward,
    "gelu": _gelu_forward,
    "glu": _glu_forward,
    "softmax": _softmax_forward,
    "cross_entropy": _cross_entropy_forward,
}


@cache
def patched_class(original: type[nn.Module], form: Form) -> type[nn.Module]:
    """The subclass of ``original`` that takes the kernel; the same one for the same question."""

    def reduce(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (original, form), state

    def extra_repr(self: nn.Module) -> str:
        said = original.extra_repr(self)
        return f"{said}, kernel={form.kernel}" if said else f"kernel={form.kernel}"

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "extra_repr": extra_repr,
        "forward": _FORWARDS[form.kernel](original, form),
        _FORM: form,
    }
    return type(original.__name__, (original,), members)


def _blank(original: type[nn.Module], form: Form) -> nn.Module:
    """A patched module without contents: what unpickling fills."""
    made = patched_class(original, form)
    return made.__new__(made)


def form_of(module: nn.Module) -> Form | None:
    """The form that a module is patched with, None where it is not."""
    return vars(type(module)).get(_FORM)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had, or has."""
    made = type(module)
    return made.__bases__[0] if _FORM in vars(made) else made
