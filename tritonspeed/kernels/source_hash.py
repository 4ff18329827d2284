"""A kernel's source as 16 hexadecimal digits: what a tuned configuration is worth no more than.

Triton's own key takes in the line a kernel begins at, so a word more in a docstring would end every measurement. Here
it is the tokens of the kernel and of all it calls, without comments and line breaks, and the numbers it takes from its
module: the same on every Python, Triton and machine.
"""

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from types import CodeType
from typing import Any

_NO_MEANING = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)


def source_hash(*kernels: Any) -> str:
    """The hash of ``@triton.jit`` functions, compiled or interpreted, and of every kernel function they call."""
    seen: dict[str, str] = {}
    for kernel in kernels:
        _collect(kernel, seen)
    text = "\n".join(f"{name} {said}" for name, said in seen.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(kernel: Any, seen: dict[str, str]) -> None:
    function = getattr(kernel, "fn", kernel)
    name = f"{function.__module__}.{function.__qualname__}"
    if name in seen:
        return
    seen[name] = " ".join(_tokens(inspect.getsource(function)))
    for used in sorted(_global_names(function.__code__)):
        value = function.__globals__.get(used)
        plain = getattr(value, "value", value)  # a tl.constexpr holds its number
        if isinstance(plain, (bool, int, float, str)):
            seen[f"{name}.{used}"] = repr(plain)
        elif hasattr(value, "fn") and not value.fn.__module__.startswith("triton."):
            _collect(value, seen)


def _tokens(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            yield tokenize.tok_name[token.type]  # how deep a line stands matters, not by how many blanks
        elif token.type not in _NO_MEANING:
            yield token.string


def _global_names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))
