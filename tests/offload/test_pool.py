"""Buffers come back and are lent again: by size, the oldest first, each once, and only when nobody copies any more."""

from __future__ import annotations

import torch

from tritonspeed.offload.pool import HostPool


class Log:
    def __init__(self) -> None:
        self.counted = {"a": 0, "b": 0}
        self.num_made = 0
        self.pool = HostPool(self.count)

    def count(self, purpose: str, num_bytes: int) -> None:
        self.counted[purpose] += num_bytes

    def lend(self, purpose: str, numel: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.num_made += 1
            return torch.empty(numel, dtype=dtype)

        return self.pool.lend(purpose, numel, dtype, make)


class Copying:
    def __init__(self) -> None:
        self.was_waited_for = False

    def wait(self) -> None:
        self.was_waited_for = True


def test_what_comes_back_is_lent_again_the_oldest_first():
    log = Log()
    one, two = log.lend("a", 100), log.lend("a", 100)
    assert one.data_ptr() != two.data_ptr()
    for buffer in (two, one):
        log.pool.take_back("a", buffer)
    assert [log.lend("a", 100).data_ptr() for _ in range(2)] == [two.data_ptr(), one.data_ptr()]
    assert log.num_made == 2 and log.counted == {"a": 400, "b": 0}


def test_purposes_sizes_and_types_have_buffers_of_their_own():
    log = Log()
    log.pool.take_back("a", log.lend("a", 100))
    log.lend("b", 100)
    log.lend("a", 101)
    log.lend("a", 100, torch.float32)
    assert log.num_made == 4 and log.counted == {"a": 200 + 202 + 400, "b": 200}


def test_a_copy_under_way_is_waited_for_before_its_buffer_is_lent():
    log, copying = Log(), Copying()
    log.pool.take_back("a", log.lend("a", 8), after=copying)
    log.lend("a", 9)
    assert not copying.was_waited_for
    log.lend("a", 8)
    assert copying.was_waited_for


def test_clearing_waits_and_counts_back_what_is_free():
    log, copying = Log(), Copying()
    log.lend("b", 3)  # stays out
    log.pool.take_back("a", log.lend("a", 8), after=copying)
    log.pool.clear()
    assert copying.was_waited_for and log.counted == {"a": 0, "b": 6}
    log.lend("a", 8)
    assert log.num_made == 3
