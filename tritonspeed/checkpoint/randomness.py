"""Where this process's random generators stand: torch's, the device's, numpy's, Python's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tritonspeed import checkpointing

RandomState = dict[str, Any]


def random_state(device: torch.device) -> RandomState:
    """The states, for ``tree.encode``; drawing goes on undisturbed.

    Args:
        device: of this rank; its generator is kept where it is a GPU.

    Returns:
        "torch" and "cuda": (bytes,) uint8, on the CPU · "numpy" and "python": the global generators' ·
        "regions": those of model parallel regions by name, where there are any, and the kind of device they are for.
    """
    version, words, gauss = random.getstate()
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    regions = checkpointing.get_cuda_rng_tracker().get_states()
    if regions:
        state["regions"] = {"device": _device_kind(), "states": regions}
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Go on from a state that ``random_state`` gave. What is absent, or for a device that is not here, stays as it is.

    Args:
        device: of this rank; None is the current one.

    Raises:
        ValueError: one of them is no state of its generator; none has been set then.
    """
    plan = [(name, *_SETTERS[name]) for name in _SETTERS if name in state]
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        plan = [each for each in plan if each[0] != "cuda"]
    there = device if device is not None else torch.device(_device_kind())
    for name, tries, _ in plan:
        try:
            tries(state[name], there)
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, IndexError, AttributeError) as error:
            raise ValueError(
                f"the random state {name!r} is not one of its generator, nothing was set: {error}"
            ) from error
    for name, _, sets in plan:
        sets(state[name], there)


def _python_state(content: Mapping[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    return content["version"], tuple(content["words"].tolist()), content["gauss"]


def _device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _try_regions(content: Mapping[str, Any], _: torch.device) -> None:
    for each in content["states"].values() if content["device"] == _device_kind() else ():
        torch.Generator(_device_kind()).set_state(each)


def _set_regions(content: Mapping[str, Any], _: torch.device) -> None:
    if content["device"] == _device_kind():
        checkpointing.get_cuda_rng_tracker().set_states(content["states"])


Setter = Callable[[Any, torch.device], Any]
_SETTERS: dict[str, tuple[Setter, Setter]] = {
    "torch": (lambda x, _: torch.Generator().set_state(x), lambda x, _: torch.set_rng_state(x)),
    "cuda": (lambda x, device: torch.Generator(device).set_state(x), torch.cuda.set_rng_state),
    "numpy": (lambda x, _: np.random.RandomState().set_state(x), lambda x, _: np.random.set_state(x)),
    "python": (
        lambda x, _: random.Random().setstate(_python_state(x)),
        lambda x, _: random.setstate(_python_state(x)),
    ),
    "regions": (_try_regions, _set_regions),
}
"""By name: giving the state to a generator that nobody uses, which fails where it is none, and to the real one."""
