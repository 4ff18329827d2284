"""``deepspeed.checkpointing``'s functions: checkpoint a region, and say where its inputs wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tritonspeed.checkpointing.host_inputs import HostInputs
from tritonspeed.checkpointing.random_states import get_cuda_rng_tracker
from tritonspeed.checkpointing.torch_hook import save_through
from tritonspeed.config import Config, load

_inputs = HostInputs()
_configured = False


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which backward computes the inner activations again.

    Tensors may stand anywhere in nested lists, tuples and dicts of the arguments. Random numbers are drawn again as
    they were, in the default generators and the tracker's.

    Returns:
        What the function returns.
    """
    leaves, tree = tree_flatten((args, kwargs))

    def run(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, tree)
        return function(*args, **kwargs)

    if not get_cuda_rng_tracker().get_states():
        return torch_checkpoint(run, *leaves, use_reentrant=False)
    return torch_checkpoint(run, *leaves, use_reentrant=False, context_fn=_same_states)


def _same_states() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a region runs under in forward, and when it is computed again: then with the tracker's states of now."""
    then = get_cuda_rng_tracker().get_states()

    @contextmanager
    def again() -> Iterator[None]:
        now = get_cuda_rng_tracker().get_states()
        get_cuda_rng_tracker().set_states(then)
        try:
            yield
        finally:
            get_cuda_rng_tracker().set_states(now)

    return nullcontext(), again()


class CheckpointFunction:
    """``checkpoint`` under the name and with the arguments of DeepSpeed's autograd function."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """``checkpoint(function, *args)``; what it returns is appended to ``all_outputs`` too."""
        outputs = checkpoint(function, *args)
        all_outputs += list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        return outputs


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say where the inputs of checkpointed regions wait for backward, from now on, in this process.

    It acts on ``checkpoint`` and on torch.utils.checkpoint alike. ``initialize`` calls it where the config names
    ``activation_checkpointing.cpu_checkpointing``.

    Args:
        mpu_: says how large the model parallel group is, where there is one.
        deepspeed_config: path, dict or ``Config`` with an "activation_checkpointing" block.
        partition_activations: divide inputs over the model parallel group.
        contiguous_checkpointing, num_checkpoints, synchronize, profile: accepted; docs/config-keys.md says why they
            change nothing.
        checkpoint_in_cpu: in host memory; None takes the config's ``cpu_checkpointing``.

    Raises:
        ValueError: the config has a mistake, or inputs are to be divided over a group of several ranks.
    """
    global _configured
    block = load(deepspeed_config).activation_checkpointing
    partitions = block.partition_activations if partition_activations is None else partition_activations
    size = mpu_.get_model_parallel_world_size() if hasattr(mpu_, "get_model_parallel_world_size") else 1
    if partitions and size > 1:
        raise ValueError(
            f"partition_activations over a model parallel group of {size} ranks is not built: set it to false, and"
            " cpu_checkpointing to true (inputs then wait in host memory)"
        )
    in_cpu = block.cpu_checkpointing if checkpoint_in_cpu is None else checkpoint_in_cpu
    save_through(_inputs if in_cpu else None)
    _configured = True


def configure_from(config: Config) -> None:
    """``configure`` from a resolved config that names ``cpu_checkpointing``; any other leaves things as they are."""
    if config.is_given("activation_checkpointing.cpu_checkpointing"):
        configure(deepspeed_config=config)


def is_configured() -> bool:
    """Whether ``configure`` has been called."""
    return _configured


def reset() -> None:
    """Let go of inputs that no backward will ask for, and of the host memory kept for the next step.

    For evaluation with gradients on: what the last two regions saved is otherwise held until the next forward.
    """
    _inputs.clear()


def host_bytes() -> int:
    """Bytes of inputs in host memory now."""
    return _inputs.host_bytes
