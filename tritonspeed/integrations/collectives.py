"""``deepspeed.comm``'s collectives: those of torch.distributed, with the three arguments that DeepSpeed adds to each.

``prof``, ``log_name`` and ``debug`` are about its own log of calls; here the config's "comms_logger" block decides.
Where DeepSpeed names an argument otherwise than torch, its name does as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tritonspeed.integrations.facade import find

_ADDED = ("prof", "log_name", "debug")
_RENAMED = {  # DeepSpeed's name of an argument, and torch's
    "all_gather_into_tensor": {"tensor": "input_tensor"},
    "all_to_all_single": {"tensor": "input"},
    "reduce_scatter_tensor": {"output_tensor": "output", "tensor": "input"},
}


@functools.cache
def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    collective = find(f"torch.distributed:{name}")
    renamed = _RENAMED.get(name, {})
    taken = inspect.signature(collective).parameters

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {renamed.get(key, key): value for key, value in kwargs.items() if key in taken or key not in _ADDED}
        return collective(*args, **given)

    return call
