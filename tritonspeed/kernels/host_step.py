"""The optimizer step on a CPU in one compiled pass: torch's Inductor writes the C++, any number of elements runs it.

    g ← s · fp32(g)        (p, states) ← maths(p, states, g)        out ← round(p)

There are two forms of a flat update on a CPU, and they differ in the last bit of a root: "chunked" (``flat_update``,
PyTorch's own loops, always there) and "compiled" (this file, wants a C++ compiler). One process takes one of them for
all its tensors: ``choose_host_step`` is asked once, with the number of elements that are trained, and never with where
the states live, so that device, host and disk give the same numbers. ``use_host_step`` decides by hand.

Every operation is rounded by itself (no contraction, IEEE quotient and root), in vectors also where the last one is not
full: a result depends neither on where the buffer was cut nor on the number of threads, and is the GPU kernel's.
Stochastic rounding and 16-bit or 8-bit states stay chunked, whatever was chosen.

A pass is compiled for one rule and one pair of types. No guards stand before a call (7 µs), no number of a step is
compiled in, and other threads may take the interpreter meanwhile. Figures: decision 015.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritonspeed.kernels.flat_update import FlatTensors

log = logging.getLogger("tritonspeed")

# A pass takes 4 to 12 s to compile, once for a machine, and saves 0.17 ns an element and step on one core or two: 100 M
# elements pay for it within 700 steps.
COMPILED_FROM_ELEMS = 100_000_000
FORMS = ("auto", "compiled", "chunked")
OPTIONS = {
    "cpp_wrapper": True,  # a call through C++ lets go of the interpreter: through Python it held it for the whole pass
    "cpp.dynamic_threads": True,  # as many as torch.set_num_threads says when it runs, not when it was compiled
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
}
_PROBE_ELEMS = 1027  # a multiple of nothing, so that the compiler takes it for any number
_PROBE_RTOL = 1e-5  # a wrong program is off by more, an ulp here and there by less

# (fp32 gradient, master, states, numbers of the step) → (master, states), elementwise
Maths = Callable[..., tuple[Tensor, ...]]
Pass = Callable[..., object]
Signature = tuple[Maths, int, torch.dtype, torch.dtype | None]


class _Choice:
    """What this process takes: ``wanted`` was said, ``taken`` follows from it; None is not chosen yet."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.wanted = "auto"
        self.taken: str | None = None
        self.passes: dict[Signature, Pass] = {}


_choice = _Choice()


def host_step() -> str:
    """The form that updates on a CPU take now: "compiled" or "chunked" (also before anything was chosen)."""
    return _choice.taken or "chunked"


def will_compile(num_trainable_elems: int) -> bool:
    """Whether ``choose_host_step`` finds, or takes, the compiled form; of a compiler it knows nothing yet."""
    return host_step() == "compiled" if _choice.taken else num_trainable_elems >= COMPILED_FROM_ELEMS


def use_host_step(form: str) -> None:
    """Decide by hand, for this process: before training, since the forms differ in last bits.

    Args:
        form: "compiled" or "chunked"; "auto" leaves it to the next ``choose_host_step``, chunked until then.

    Raises:
        ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"use_host_step: form is {form!r}, must be one of {', '.join(FORMS)}")
    with _choice.lock:
        _choice.wanted, _choice.taken = form, None
        if form != "auto":
            _take(form, "asked for")


def choose_host_step(num_trainable_elems: int) -> str:
    """Choose the form by the machine and the size of the model, once for the process, and log it.

    Args:
        num_trainable_elems: of the whole model, the same on every rank and for every tier.

    Returns:
        The form taken: an earlier choice stays.
    """
    with _choice.lock:
        if _choice.taken is None:
            if num_trainable_elems < COMPILED_FROM_ELEMS:
                _take("chunked", f"{num_trainable_elems:,} elements are too few to compile for")
            else:
                _take("compiled", f"{num_trainable_elems:,} elements")
        return host_step()


def _take(form: str, reason: str) -> None:
    if form == "compiled" and (problem := _lacks_compiler()):
        form, reason = "chunked", problem
    _choice.taken = form
    level = logging.INFO if _choice.wanted in ("auto", form) else logging.WARNING
    log.log(level, "optimizer step on the host: %s (%s)", form, reason)


def _lacks_compiler() -> str | None:
    """Why Inductor cannot write C++ here, or None."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"nothing can be compiled: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def update_compiled_(maths: Maths, tensors: FlatTensors, numbers: tuple[float, ...], seed: int | None) -> bool:
    """Carry out one update in the compiled form, if that is the one taken.

    Args:
        maths: elementwise; the same object in every call, or it is compiled again.
        tensors: of the update; scale, skip and copy as in ``update_on_cpu_``.
        numbers: of the step, the last arguments of ``maths``, each as a () fp32 tensor.
        seed: of stochastic rounding: not None is left to the chunked form.

    Returns:
        False where nothing was done, and the chunked form must do it.
    """
    if host_step() != "compiled" or seed is not None or any(s.dtype != torch.float32 for s in tensors.states):
        return False
    copy = () if tensors.param_out is None else (tensors.param_out,)
    copy_dtype = copy[0].dtype if copy else None
    one_pass_ = _pass_of((maths, len(tensors.states), tensors.grad.dtype, copy_dtype), len(numbers))
    if one_pass_ is None:
        return False
    if tensors.master.numel() == 0 or (tensors.found_inf is not None and tensors.found_inf.item() != 0):
        return True
    scale = torch.ones((), device="cpu") if tensors.grad_scale is None else tensors.grad_scale.reshape(())
    flats = (tensors.master, *tensors.states, tensors.grad, *copy)
    torch.get_num_threads()  # OpenMP learns torch's number of threads in a thread that asks, and else takes all cores
    one_pass_(*(t.view(-1) for t in flats), scale, torch.tensor(numbers, dtype=torch.float32, device="cpu"))
    return True


def _pass_of(signature: Signature, num_numbers: int) -> Pass | None:
    """The compiled pass; None where compiling failed, for the process is chunked from there on."""
    found = _choice.passes.get(signature)
    if found is not None:
        return found
    with _choice.lock:
        if signature not in _choice.passes and host_step() == "compiled":
            started = time.perf_counter()
            try:
                _choice.passes[signature] = _compile(signature, num_numbers)
            except Exception as error:  # whatever a compiler, its cache folder or another torch may do
                log.warning("optimizer step on the host: chunked, compiling it failed: %s", _first_line(error))
                _choice.taken = "chunked"
            else:
                seconds = time.perf_counter() - started
                log.info("optimizer step on the host: compiled in %.1f s for %s", seconds, _describe(signature))
        return _choice.passes.get(signature)


def _describe(signature: Signature) -> str:
    maths, _, grad_dtype, copy_dtype = signature
    name = getattr(maths, "__name__", "update").strip("_")
    copy = "no copy" if copy_dtype is None else f"{str(copy_dtype).removeprefix('torch.')} copy"
    return f"{name}, {str(grad_dtype).removeprefix('torch.')} gradient, {copy}"


def _traceable(maths: Maths, num_states: int) -> Callable[..., tuple[()]]:
    """The pass as PyTorch operations, for the compiler to fuse."""

    def one_pass_(master: Tensor, *rest: Tensor) -> tuple[()]:
        states, (grad, *copy, scale, numbers) = rest[:num_states], rest[num_states:]
        updated = maths(grad.float() * scale, master, *states, *numbers.unbind())
        for tensor, value in zip((master, *states, *copy), (*updated, *updated[:1]), strict=False):
            tensor.copy_(value)
        return ()

    return one_pass_


def _compile(signature: Signature, num_numbers: int) -> Pass:
    """Trace with a symbolic number of elements, compile, and compare once with the traced operations themselves."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    maths, num_states, grad_dtype, copy_dtype = signature
    flats = [torch.rand(_PROBE_ELEMS, device="cpu") + 0.5 for _ in range(2 + num_states)]
    flats[-1] = flats[-1].to(grad_dtype)
    if copy_dtype is not None:
        flats.append(torch.zeros(_PROBE_ELEMS, dtype=copy_dtype, device="cpu"))
    scalars = [torch.full((), 0.5, device="cpu"), torch.linspace(0.1, 0.9, num_numbers, device="cpu")]
    eager = _traceable(maths, num_states)
    with torch.no_grad():
        graph = make_fx(eager, tracing_mode="symbolic")(*flats, *scalars)
        fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with _full_vectors() if {grad_dtype, copy_dtype} - {torch.float32, None} else _nothing():
            compiled: Any = compile_fx(graph, fakes, config_patches=OPTIONS)
        want = [t.clone() for t in flats]
        eager(*want, *scalars)
        compiled(*flats, *scalars)
    for ours, theirs in zip(flats, want, strict=True):
        rtol = max(_PROBE_RTOL, torch.finfo(ours.dtype).eps)
        if not torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=rtol):
            raise RuntimeError(f"{_describe(signature)}: the compiled pass gives other numbers than PyTorch")
    return compiled


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _full_vectors() -> Iterator[None]:
    """Inductor's loop in steps of a whole vector of 16-bit elements, for what this thread compiles meanwhile.

    It would step by a vector of fp32 and load half vectors of 16 bits, through a mask and across cache lines: 0.59 ns
    an element on one thread, where whole ones take 0.43. A torch without that class compiles the slower loop.
    """
    from torch._inductor.codegen import cpp

    narrow = getattr(cpp, "TilingSelect", None)
    if narrow is None:
        yield
        return
    cpp.TilingSelect = _twice_as_wide(narrow, threading.get_ident())
    try:
        yield
    finally:
        cpp.TilingSelect = narrow


@functools.cache
def _twice_as_wide(narrow: type, thread: int) -> type:
    class Wide(narrow):
        def select_tiling(self, *arguments: Any, **options: Any) -> Any:
            factors, *rest = super().select_tiling(*arguments, **options)
            is_flat = len(factors) == 1 and threading.get_ident() == thread
            return ([2 * factors[0]] if is_flat else factors, *rest)

    return Wide
