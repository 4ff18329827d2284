"""Bytes of one process, measured alike for every system.

`StoragePeak` counts storages: every tensor that passes a dispatcher call while it is entered, each storage once, at
its current size, until it dies. It sees parameters, gradients, states, activations and buckets, also those that C++
makes through the dispatcher; it does not see memory outside tensors (gloo's own staging). `resident_bytes` is the
kernel's number and sees everything, with the allocator's slack.
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def resident_bytes() -> tuple[int, int]:
    """(resident now, highest since `reset_resident_peak`), as Linux counts them."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_resident_peak() -> None:
    """Let the kernel count the high-water mark from here on."""
    Path("/proc/self/clear_refs").write_text("5")


class StoragePeak(TorchDispatchMode):
    """The highest sum of live storages' bytes while entered, in `peak_bytes`; `live_bytes` is the sum now.

    Enter it before the first tensor to be counted is made. Systems that free by resizing a storage do it behind the
    dispatcher's back, so the resize is watched too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.finalizers: dict[int, weakref.finalize] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> "StoragePeak":
        self.original_resize = torch.UntypedStorage.resize_
        original = self.original_resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self.count_storage(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010 — its stub says that it never returns
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        torch.UntypedStorage.resize_ = self.original_resize
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Take the storage under `tensor` into the sum, or note that its size has changed."""
        local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's bytes are its local shard's
        if local.device.type != "meta":
            self.count_storage(local.untyped_storage())

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Take one storage into the sum at its current size."""
        key = storage._cdata
        num_bytes = storage.nbytes()
        if key not in self.sizes:
            self.finalizers[key] = weakref.finalize(storage, self.forget, key)
        self.live_bytes += num_bytes - self.sizes.get(key, 0)
        self.sizes[key] = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def forget(self, key: int) -> None:
        """The storage has died."""
        self.live_bytes -= self.sizes.pop(key)
        self.finalizers.pop(key)

    def restart_peak(self) -> None:
        """Count the peak from here on."""
        self.peak_bytes = self.live_bytes
