"""``get_accelerator()``: the device of this rank, under the names that scripts ask DeepSpeed's accelerator for."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.integrations.facade import NotProvided

_ON_A_CPU: dict[str, Any] = {  # where torch.cpu has no answer of torch.cuda's name
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
    "initial_seed": torch.initial_seed,
    "default_stream": torch.cpu.current_stream,
    "is_current_stream_capturing": lambda: False,
}


class Accelerator:
    """A GPU, or the CPU where torch sees none. What it does not answer itself, torch.cuda or torch.cpu does.

    Memory of a CPU is that of this process: what it holds, and held at most.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._name = "cuda" if self._on_gpu else "cpu"
        self._compile_backend = "inductor"

    def __getattr__(self, name: str) -> Any:
        if not self._on_gpu and name in _ON_A_CPU:
            return _ON_A_CPU[name]
        if name.startswith("_") or not hasattr(torch.cuda if self._on_gpu else torch.cpu, name):
            raise NotProvided(
                f"get_accelerator().{name} is not provided by tritonspeed: no op is compiled and no memory pinned"
                f" through it, and torch.{self._name} has no such name"
            )
        return getattr(torch.cuda if self._on_gpu else torch.cpu, name)

    # the device

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", "cuda:1" or "cpu"."""
        return self._name if device_index is None or not self._on_gpu else f"cuda:{device_index}"

    def current_device(self) -> int | str:
        """Index of the current GPU; "cpu" where there is none."""
        return torch.cuda.current_device() if self._on_gpu else "cpu"

    def current_device_name(self) -> str:
        """ "cuda:0", or "cpu"."""
        return f"cuda:{torch.cuda.current_device()}" if self._on_gpu else "cpu"

    def device(self, device_index: int | None = None) -> torch.device:
        """As a torch.device."""
        return torch.device(self.device_name(device_index))

    def device_count(self) -> int:
        """GPUs that are visible; 1 for a CPU."""
        return torch.cuda.device_count() if self._on_gpu else 1

    def communication_backend_name(self) -> str:
        """ "nccl" or "gloo"."""
        return "nccl" if self._on_gpu else "gloo"

    def is_available(self) -> bool:
        """True: a CPU always is."""
        return True

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Whether a tensor is on this kind of device."""
        return tensor.device.type == self._name

    def visible_devices_envs(self) -> list[str]:
        """The variable that says which GPUs are seen."""
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env: MutableMapping[str, str], local_accelerator_ids: Sequence) -> None:
        """Write which GPUs are to be seen into an environment."""
        current_env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, local_accelerator_ids))

    def export_envs(self) -> list[str]:
        """Beginnings of the variables that other hosts need."""
        return ["NCCL"] if self._on_gpu else []

    # what it can do

    def is_bf16_supported(self) -> bool:
        """Whether bf16 runs here; on a CPU it does."""
        return not self._on_gpu or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """True: on a CPU slowly."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """The types to train in."""
        return [torch.float, torch.half, *([torch.bfloat16] if self.is_bf16_supported() else [])]

    def is_triton_supported(self) -> bool:
        """Whether Triton's kernels run on it."""
        return self._on_gpu and torch.cuda.get_device_capability()[0] >= 8

    def is_synchronized_device(self) -> bool:
        """Whether operations end before they return."""
        return not self._on_gpu

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def get_compile_backend(self) -> str:
        """Of torch.compile."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Keep the name of torch.compile's backend."""
        self._compile_backend = backend

    # random numbers

    def random(self) -> Any:
        """torch.random."""
        return torch.random

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """The state of the device's generator."""
        if not self._on_gpu:
            return torch.get_rng_state()
        return torch.cuda.get_rng_state() if device_index is None else torch.cuda.get_rng_state(device_index)

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Set it."""
        if not self._on_gpu:
            torch.set_rng_state(new_state)
        elif device_index is None:
            torch.cuda.set_rng_state(new_state)
        else:
            torch.cuda.set_rng_state(new_state, device_index)

    def default_generator(self, device_index: int) -> torch.Generator:
        """The device's generator."""
        return torch.cuda.default_generators[device_index] if self._on_gpu else torch.default_generator

    # memory

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""
        if self._on_gpu:
            torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes held by tensors."""
        return torch.cuda.memory_allocated(device_index) if self._on_gpu else _process_bytes()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes held at most."""
        return torch.cuda.max_memory_allocated(device_index) if self._on_gpu else _most_process_bytes()

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes taken from the device."""
        return torch.cuda.memory_reserved(device_index) if self._on_gpu else _process_bytes()

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes taken from the device at most."""
        return torch.cuda.max_memory_reserved(device_index) if self._on_gpu else _most_process_bytes()

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """torch's own; of a CPU what a process holds, and held at most."""
        if self._on_gpu:
            return torch.cuda.memory_stats(device_index)
        held, most = _process_bytes(), _most_process_bytes()
        return {"allocated_bytes.all.current": held, "allocated_bytes.all.peak": most}

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Measure the most from here on; a process's most on a CPU cannot be forgotten."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device_index)

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device, or of the machine."""
        if self._on_gpu:
            return torch.cuda.get_device_properties(self.device(device_index)).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes that are free."""
        if self._on_gpu:
            return torch.cuda.mem_get_info(device_index)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
        """A tensor in memory that a GPU reads by itself; on a CPU the tensor as it is."""
        return tensor.pin_memory() if self._on_gpu else tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it is in such memory."""
        return self._on_gpu and tensor.is_pinned()

    # ranges, graphs, types of tensors

    def range_push(self, msg: str, *_: Any, **__: Any) -> None:
        """Begin a named range of a profile."""
        if self._on_gpu:
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self, *_: Any, **__: Any) -> None:
        """End it."""
        if self._on_gpu:
            torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call it."""
        return callback()

    def create_graph(self) -> Any:
        """A CUDA graph; None on a CPU."""
        return torch.cuda.CUDAGraph() if self._on_gpu else None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        """A context that records into it."""
        return torch.cuda.graph(graph, pool, stream) if self._on_gpu else contextlib.nullcontext()

    def replay_graph(self, graph: Any) -> None:
        """Run it."""
        if self._on_gpu:
            graph.replay()

    @property
    def BFloat16Tensor(self) -> Any:
        """Makes a tensor of this type on the device; so do those below."""
        return self._tensor_of(torch.bfloat16)

    ByteTensor = property(lambda self: self._tensor_of(torch.uint8))
    DoubleTensor = property(lambda self: self._tensor_of(torch.float64))
    FloatTensor = property(lambda self: self._tensor_of(torch.float32))
    HalfTensor = property(lambda self: self._tensor_of(torch.float16))
    IntTensor = property(lambda self: self._tensor_of(torch.int32))
    LongTensor = property(lambda self: self._tensor_of(torch.int64))

    def _tensor_of(self, dtype: torch.dtype) -> Callable[[Any], Tensor]:
        def make(values: Any = ()) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._name)

        return make


def _process_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _most_process_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_process_bytes(), most if sys.platform == "darwin" else most * 1024)  # the kernel's figure lags


@cache
def get_accelerator() -> Accelerator:
    """The device of this rank."""
    return Accelerator()
