"""First derivatives only: a second one is an error, never a wrong number."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``autograd.Function.backward``: its results raise where somebody differentiates them.

    torch's decorator of this name refuses only where the incoming gradient requires one. With ``create_graph`` and a
    loss that is a plain sum it does not, and what depends on the saved inputs would count as constant in silence.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        if torch.compiler.is_compiling():  # the compiler differentiates once, and refuses a second time by itself
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        results = found if isinstance(found, tuple) else (found,)
        name = type(ctx).__name__.removeprefix("_").removesuffix("Backward")
        message = f"{name} of tritonspeed.kernels has no second derivative: take the reference function for it"
        refuse: Any = torch._C._functions.DelayedError(message.encode(), len(results))
        refused = refuse(*[x if x is None else x.detach().requires_grad_() for x in results])
        return refused if isinstance(found, tuple) else refused[0]

    return wrapper
