"""``patch(model)``: kernels in a model that knows nothing of them.

    report = ts.kernels.patch(model)
    print(report)              # what was swapped, how often; what looked alike, and why it was left
    report.restore()           # or ts.kernels.unpatch(model)

Modules are matched by type (torch.nn's own) or by structure, never by the model's name, and structure is verified by
running it: patch_probe.py. A swap changes the module's class to a subclass of it (patched.py), nothing else:
parameters, hooks, names, state dicts and ``isinstance`` stay. What is no module cannot be swapped: rotary embeddings,
softmax and losses that a forward calls as functions; ``ts.kernels`` has them as functions for those who write one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from tritonspeed.kernels._triton import DEVICES
from tritonspeed.kernels.patch_probe import (
    NotAlike,
    gelu_form,
    glu_form,
    is_like_gated_layer,
    is_like_gelu,
    is_like_norm,
    norm_form,
    result_types,
)
from tritonspeed.kernels.patched import KERNELS, Form, form_of, original_class, patched_class

NOTE = (
    "Only modules can be swapped: rotary embeddings, attention's softmax and losses that a forward calls as functions"
    " are out of reach; tritonspeed.kernels has them as functions."
)
SHOWN_NAMES = 2


@dataclass(frozen=True)
class Swapped:
    """Modules of one class that took one kernel.

    Attributes:
        kernel: one of "layer_norm", "rms_norm", "gelu", "glu", "softmax", "cross_entropy".
        class_name: the modules' class.
        matched_by: "type" or "structure".
        detail: what was found out: "1 + w, eps from variance_epsilon", "silu(gate_proj) · up_proj → down_proj".
        names: where in the model.
    """

    kernel: str
    class_name: str
    matched_by: str
    detail: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """Modules of one class that looked alike and were not swapped, and why."""

    class_name: str
    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did; printed, it is a table.

    Attributes:
        swapped: by class, kernel and detail, in the model's order.
        left: what looked alike and was not swapped, with the reason.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    _modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def num_swapped(self) -> int:
        """Modules that were swapped."""
        return sum(len(group.names) for group in self.swapped)

    def restore(self) -> None:
        """Undo this patch: the modules get their classes back. A second call does nothing."""
        for module in self._modules:
            _restore(module)

    def __str__(self) -> str:
        rows = [("module", "number", "kernel", "by", "what", "where")]
        rows += [
            (g.class_name, str(len(g.names)), g.kernel, g.matched_by, g.detail, _shown(g.names)) for g in self.swapped
        ]
        rows += [(g.class_name, str(len(g.names)), "-", "-", g.reason, _shown(g.names)) for g in self.left]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"patch: {self.num_swapped} modules swapped", *lines, NOTE])


def patch(
    model: nn.Module, *, only: Iterable[str] | None = None, exclude: Iterable[str | type[nn.Module]] = ()
) -> PatchReport:
    """Let the modules of any model take the kernels here, in place.

    Swapped are ``torch.nn.LayerNorm``, ``RMSNorm``, ``Softmax`` and ``CrossEntropyLoss`` (and subclasses with the same
    forward); by structure, whatever their class: LayerNorms and RMSNorms (with w or 1 + w), gated feed-forward layers
    (three linears, or two with gate and up in one), GELUs of several passes. CPU tensors, and calls that no kernel
    fits, keep running the module's own forward.

    Args:
        model: changed in place; may be on the meta device, sharded or quantised.
        only: kernels to use, of "layer_norm", "rms_norm", "gelu", "glu", "softmax", "cross_entropy"; None is all.
        exclude: kernels, module names ("model.layers.0.*" with wildcards) or module classes to leave alone.

    Returns:
        What was swapped, how often, what was not and why; its ``restore()`` undoes it.

    Raises:
        ValueError: ``only`` or ``exclude`` names something that is neither a kernel nor in the model.
    """
    kernels, excluded = _wanted(model, only, tuple(exclude))
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    unused: set[nn.Module] = set()  # activations of gated layers: nobody calls them any more
    left: dict[tuple[str, str], list[str]] = {}
    swapped = []
    for name, module in list(model.named_modules()):
        if excluded(name, module) or form_of(module) is not None or module in unused:
            continue
        try:
            found = _find(module, kernels)
        except NotAlike as why:
            left.setdefault((type(module).__name__, str(why)), []).append(name)
            continue
        if found is None:
            continue
        form, matched_by = found
        groups.setdefault((form.kernel, type(module).__name__, matched_by, _detail(form)), []).append(name)
        module.__class__ = patched_class(type(module), form)
        swapped.append(module)
        if form.kernel == "glu":
            unused.update(child for child in module.children() if not list(child.parameters()))
    return PatchReport(
        tuple(Swapped(*key, tuple(names)) for key, names in groups.items()),
        tuple(Left(*key, tuple(names)) for key, names in left.items()),
        tuple(swapped),
    )


def unpatch(model: nn.Module) -> int:
    """Give every patched module of a model its class back.

    Returns:
        How many there were.
    """
    return sum(_restore(module) for module in model.modules())


def _restore(module: nn.Module) -> bool:
    was_patched = form_of(module) is not None
    if was_patched:
        module.__class__ = original_class(module)
    return was_patched


def _wanted(
    model: nn.Module, only: Iterable[str] | None, exclude: tuple[str | type[nn.Module], ...]
) -> tuple[set[str], Callable[[str, nn.Module], bool]]:
    """The kernels to use, and whether a module is excluded."""
    kernels = set(KERNELS) if only is None else {only} if isinstance(only, str) else set(only)
    if unknown := kernels - set(KERNELS):
        raise ValueError(f"patch: only names {', '.join(sorted(unknown))}; kernels are {', '.join(KERNELS)}")
    patterns = [item for item in exclude if isinstance(item, str) and item not in KERNELS]
    classes = tuple(item for item in exclude if isinstance(item, type))
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"patch: exclude has {pattern!r}, which is neither a kernel ({', '.join(KERNELS)}) nor the name of a"
                " module: compare [name for name, _ in model.named_modules()]"
            )

    def excluded(name: str, module: nn.Module) -> bool:
        return isinstance(module, classes) or any(fnmatchcase(name, pattern) for pattern in patterns)

    return kernels - {item for item in exclude if isinstance(item, str)}, excluded


def _find(module: nn.Module, kernels: set[str]) -> tuple[Form, str] | None:
    """The form of a module and how it was matched; None where nothing looks alike.

    Raises:
        NotAlike: it looks alike and is not, or cannot be swapped.
    """
    forward = type(module).forward
    is_torchs = {base: forward is base.forward for base in (nn.LayerNorm, nn.RMSNorm, nn.Softmax, nn.CrossEntropyLoss)}
    matched_by = "type" if any(is_torchs.values()) else "structure"
    find: Callable[[nn.Module, torch.device], Form]
    if is_torchs[nn.Softmax] and "softmax" in kernels:
        find = _softmax_form
    elif is_torchs[nn.CrossEntropyLoss] and "cross_entropy" in kernels:
        find = _cross_entropy_form
    elif (is_torchs[nn.LayerNorm] or is_torchs[nn.RMSNorm] or _is_own(module)) and is_like_norm(module):
        find = norm_form if kernels & {"layer_norm", "rms_norm"} else _nothing
    elif _is_own(module) and is_like_gated_layer(module):
        find = glu_form if "glu" in kernels else _nothing
    elif _is_own(module) and is_like_gelu(module):
        find = gelu_form if "gelu" in kernels else _nothing
    else:
        if matched_by == "type" and kernels & {"layer_norm", "rms_norm"} and len(_normalized_shape(module)) > 1:
            raise NotAlike(f"it normalises over {len(_normalized_shape(module))} axes, the kernel over one")
        return None
    if find is _nothing:
        return None
    if "forward" in vars(module):
        raise NotAlike("its forward was replaced on the object itself (a wrapper, a hook): patch before that")
    form = find(module, _device_of(module))
    return (form, matched_by) if form.kernel in kernels else None


def _nothing(module: nn.Module, device: torch.device) -> Form:
    raise AssertionError(f"{type(module).__name__} on {device} is not to be looked at")


def _is_own(module: nn.Module) -> bool:
    """Somebody's own forward: not torch.nn's, which are matched by type or not at all; nor a compiled script."""
    home = getattr(type(module).forward, "__module__", "") or ""
    return not home.startswith("torch.") and not isinstance(module, torch.jit.ScriptModule)


def _normalized_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(module, "normalized_shape", ()))


def _device_of(module: nn.Module) -> torch.device:
    """Where a module is tried out: on its own device if something can be computed there."""
    tensor = next(module.parameters(), None)
    return tensor.device if tensor is not None and tensor.device.type in DEVICES else torch.device("cpu")


def _softmax_form(module: nn.Module, device: torch.device) -> Form:
    if getattr(module, "dim", None) is None:
        raise NotAlike("its axis is not given: pass dim")
    return Form("softmax", results=result_types(nn.Softmax(dim=-1), [], device))


def _cross_entropy_form(module: nn.Module, device: torch.device) -> Form:
    if getattr(module, "weight", None) is not None:
        raise NotAlike("it has class weights, which the kernel does not take")
    return Form("cross_entropy")


def _detail(form: Form) -> str:
    if form.kernel == "glu":
        gate, up = ("gate", "up") if len(form.inputs) == 1 else form.inputs
        if not form.gate_first:
            gate, up = up, gate
        source = f" of {form.inputs[0]}" if len(form.inputs) == 1 else ""
        return f"{form.activation}({gate}) · {up}{source} → {form.output}"
    if form.kernel == "gelu":
        return form.activation
    if form.kernel not in ("layer_norm", "rms_norm"):
        return ""
    weight = f"1 + {form.weight}" if form.offset else form.weight or "no weight"
    eps = f"eps from {form.eps}" if isinstance(form.eps, str) else f"eps {form.eps}"
    return ", ".join(part for part in (weight, form.bias, eps) if part)


def _shown(names: tuple[str, ...]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown}, …"
