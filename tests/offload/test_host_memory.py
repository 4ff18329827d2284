"""Host memory: on a page, exact, counted by a limit, given back."""

from __future__ import annotations

import gc
import logging
import mmap
import resource
from pathlib import Path

import pytest
import torch

from tritonspeed.offload.memory import host_empty

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", (1, 7, 4096, 3 * 2**20 + 1))
def test_it_begins_on_a_page_and_holds_what_is_written(numel, dtype):
    held = host_empty(numel, dtype)
    assert held.data_ptr() % mmap.PAGESIZE == 0
    assert held.shape == (numel,) and held.dtype == dtype
    assert held.untyped_storage().nbytes() == numel * dtype.itemsize  # not rounded up to a power of two
    wanted = torch.arange(numel).remainder(100).to(dtype)
    assert torch.equal(held.copy_(wanted), wanted)


def test_nothing_is_a_tensor_too():
    assert host_empty(0, torch.bfloat16).shape == (0,)
    with pytest.raises(ValueError, match="-1 elements"):
        host_empty(-1, torch.float32)


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(lo, 16) <= address < int(hi, 16) for lo, hi in ranges)


def test_it_is_given_back_with_the_last_view():
    held = host_empty(512 * 2**20, torch.uint8)  # never touched, so it takes addresses alone
    last, view = held.data_ptr() + held.nbytes - 1, held[5:10].view(5, 1)
    del held
    gc.collect()
    assert is_mapped(last)
    view.fill_(1)
    del view
    gc.collect()
    assert not is_mapped(last)


def test_a_limit_on_data_counts_it():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, before[1]))
    try:
        with pytest.raises(MemoryError, match=r"8,589,934,592 bytes of host memory were refused .*ulimit -d: 8,589"):
            host_empty(8 * 2**30, torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_pinning_without_a_gpu_does_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host_empty(10, torch.float32, pin=True).numel() == 10


class Runtime:
    """What of CUDA's runtime is used; answers with ``error``."""

    def __init__(self, error: int) -> None:
        self.error, self.locked, self.was_mapped = error, {}, []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        self.was_mapped.append(is_mapped(address))
        return 0


@pytest.mark.parametrize("error", (0, 2))
def test_pinned_memory_is_locked_exactly_and_unlocked_before_it_goes(monkeypatch, caplog, error):
    runtime = Runtime(error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        held = host_empty(5000, torch.float32, pin=True)
    assert runtime.locked == ({} if error else {held.data_ptr(): 20_000})
    assert ("ulimit -l" in caplog.text) == bool(error)
    held.fill_(1)
    del held
    gc.collect()
    assert runtime.locked == {} and runtime.was_mapped == ([] if error else [True])


@pytest.mark.gpu
def test_a_gpu_sees_it_as_page_locked():
    held = host_empty(2**20, torch.float32, pin=True).fill_(3)
    assert held.is_pinned()
    assert torch.equal(held.to("cuda", non_blocking=True).cpu(), held)
