"""Host memory of exactly the size asked for, that begins on a page: what direct I/O and a GPU's copies want.

torch's own allocators give 64-byte boundaries, and ``Tensor.pin_memory()`` rounds each block up to a power of two
(1.78 × the bytes of a real model). One anonymous private map per buffer is page-aligned and as large as it must be; it
counts towards a limit on data (``ulimit -d``), and large pages keep the number of segments of a disk request small.
"""

from __future__ import annotations

import logging
import mmap
import resource

import torch
from torch import Tensor

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 * 2**20

_log = logging.getLogger("tritonspeed")


class _Pages(mmap.mmap):
    """An anonymous map; page-locked for the GPU while ``locked_at`` is its address."""

    locked_at: int | None = None

    def __del__(self) -> None:
        # before the map itself goes: a driver that still holds pages which were given back would copy from others
        if self.locked_at is not None and (runtime := torch.cuda.cudart()) is not None:
            runtime.cudaHostUnregister(self.locked_at)


def host_empty(numel: int, dtype: torch.dtype, pin: bool = False) -> Tensor:
    """Uninitialised host memory that begins on a page, given back when the last tensor on it is garbage.

    Args:
        numel: elements; nothing is rounded up but to the last page.
        pin: page-lock it, so that a GPU copies to and from it asynchronously. Nothing happens without a GPU. Where the
            driver refuses, a warning says so and the memory stays ordinary: copies are right, and slower. The owner
            keeps the tensor until copies under way have ended; no allocator watches over it.

    Returns:
        (numel,) of ``dtype``.

    Raises:
        ValueError: ``numel`` is negative.
        MemoryError: the machine, or a limit, does not give so much.
    """
    if numel < 0:
        raise ValueError(f"host_empty: {numel} elements, must be at least 0")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    num_bytes = numel * dtype.itemsize
    try:
        pages = _Pages(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        bound = "none" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"
        raise MemoryError(
            f"{num_bytes:,} bytes of host memory were refused ({error.strerror}; limit on data, ulimit -d: {bound}): "
            "offload to nvme, or use smaller and fewer buffers"
        ) from error
    if num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without large pages: the same memory in small ones
            _log.debug("no large pages for %d bytes of host memory", num_bytes)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    if pin and torch.cuda.is_available():
        _lock(pages, tensor.data_ptr(), num_bytes)
    return tensor


def _lock(pages: _Pages, address: int, num_bytes: int) -> None:
    """Page-lock a map for the GPU; a refusal is a warning."""
    runtime = torch.cuda.cudart()
    assert runtime is not None, "a GPU is available and CUDA's runtime is not"
    error = int(runtime.cudaHostRegister(address, num_bytes, 0))
    if error == 0:
        pages.locked_at = address
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    bound = "none" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"
    _log.warning(
        "page-locking %s bytes was refused (CUDA error %d; limit on locked memory, ulimit -l: %s): copies between host "
        "and GPU go through ordinary memory and do not overlap; raise the limit, or set pin_memory to false",
        f"{num_bytes:,}",
        error,
        bound,
    )
