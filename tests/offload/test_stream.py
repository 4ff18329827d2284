"""The ring: every tile once, in order, in no more buffers than there are, stored before a buffer is another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonspeed.offload.stream import Buffer, Ring


class Toy:
    """A tile that writes down what happens to it."""

    def __init__(self, number: int, needs_buffer: bool, log: list[tuple[str, int]], busy: set[int]) -> None:
        self.number, self.needs_buffer, self.log, self.busy = number, needs_buffer, log, busy
        self.buffer: Buffer | None = None

    def fetch_ahead(self, buffer: Buffer | None) -> None:
        self._take(buffer)
        self.log.append(("ahead", self.number))

    def forget(self) -> None:
        self.busy.discard(id(self.buffer))
        self.buffer = None
        self.log.append(("forget", self.number))

    def fetch(self, buffer: Buffer | None) -> None:
        if self.buffer is None or buffer is not self.buffer:
            self._take(buffer)
        self.log.append(("fetch", self.number))

    def _take(self, buffer: Buffer | None) -> None:
        assert self.buffer is None, "what was fetched ahead is fetched into the same buffer"
        assert (buffer is not None) is self.needs_buffer
        if buffer is not None:
            assert id(buffer) not in self.busy, "a buffer that another tile still uses"
            self.busy.add(id(buffer))
        self.buffer = buffer

    def wait(self) -> None:
        self.log.append(("wait", self.number))

    def store(self) -> list[Stored]:
        self.log.append(("store", self.number))
        return [Stored(self)]

    def leave(self) -> None:
        self.log.append(("leave", self.number))
        self.busy.discard(id(self.buffer))
        self.buffer = None


class Stored:
    """The handle of a store."""

    def __init__(self, tile: Toy) -> None:
        self.tile = tile

    def wait(self) -> None:
        self.tile.log.append(("stored", self.tile.number))


def run(kinds: list[bool], num_buffers: int) -> tuple[list[tuple[str, int]], int]:
    """(what happened, buffers that were made)."""
    log: list[tuple[str, int]] = []
    busy: set[int] = set()
    made = []

    def make() -> Buffer:
        made.append(Buffer(8, lambda n, dtype: torch.empty(n, dtype=dtype)))
        return made[-1]

    ring: Ring[Toy] = Ring(num_buffers, make)
    for tile in ring.stream(Toy(i, kind, log, busy) for i, kind in enumerate(kinds)):
        log.append(("work", tile.number))
    return log, len(made)


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_every_tile_goes_its_way_once_in_order(kinds, num_buffers):
    log, num_made = run(kinds, num_buffers)
    assert num_made <= min(num_buffers, sum(kinds))
    for number in range(len(kinds)):
        way = [what for what, i in log if i == number]
        assert way == ["fetch", "wait", "work", "store", "stored", "leave"]
    for event in ("fetch", "work", "leave"):
        assert [i for what, i in log if what == event] == list(range(len(kinds)))


def test_one_buffer_is_serial_and_four_overlap():
    serial, _ = run([True] * 5, 1)
    assert serial == [(what, i) for i in range(5) for what in ("fetch", "wait", "work", "store", "stored", "leave")]
    log, _ = run([True] * 6, 4)
    assert log.index(("fetch", 2)) < log.index(("work", 0))  # read ahead
    assert log.index(("work", 1)) < log.index(("stored", 0))  # written behind


def test_what_is_resident_leaves_at_once_and_takes_no_buffer():
    log, num_made = run([False] * 4, 2)
    assert num_made == 0
    assert all(log.index(("leave", i)) < log.index(("work", i + 1)) for i in range(3))


def test_an_abandoned_stream_leaves_the_ring_as_it_was():
    """An update that fails stops asking; nothing is held that a new stream would wait for."""
    log: list[tuple[str, int]] = []
    ring: Ring[Toy] = Ring(2, lambda: Buffer(8, lambda n, dtype: torch.empty(n, dtype=dtype)))
    stream = ring.stream(Toy(i, True, log, set()) for i in range(5))
    next(stream)
    stream.close()
    again = [tile.number for tile in ring.stream(Toy(i, True, log, set()) for i in range(5))]
    assert again == list(range(5))


@given(st.lists(st.booleans(), max_size=9), st.integers(1, 4), st.data())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_fetched_ahead_is_used_or_forgotten(kinds, num_buffers, data):
    """Whatever was thought to come, what comes goes its way once, and no buffer has two owners or is lost."""
    log: list[tuple[str, int]] = []
    busy: set[int] = set()
    ring: Ring[Toy] = Ring(num_buffers, lambda: Buffer(8, lambda n, dtype: torch.empty(n, dtype=dtype)))
    toys = [Toy(i, kind, log, busy) for i, kind in enumerate(kinds)]
    ring.fetch_ahead([toys[i] for i in data.draw(st.permutations(range(len(toys))))])
    for streamed in (toys[: len(toys) // 2], toys[len(toys) // 2 :]):
        for tile in ring.stream(streamed):
            log.append(("work", tile.number))
    ring.forget()
    assert not busy - {id(None)}
    for number in range(len(kinds)):
        way = [what for what, i in log if i == number]
        assert way[-6:] == ["fetch", "wait", "work", "store", "stored", "leave"]
        assert way[:-6] in ([], ["ahead"], ["ahead", "forget"])


def test_what_comes_as_thought_of_is_not_fetched_twice():
    log: list[tuple[str, int]] = []
    ring: Ring[Toy] = Ring(2, lambda: Buffer(8, lambda n, dtype: torch.empty(n, dtype=dtype)))
    busy: set[int] = set()
    toys = [Toy(i, True, log, busy) for i in range(4)]
    ring.fetch_ahead(toys)
    assert log == [("ahead", 0), ("ahead", 1)]
    assert [tile.number for tile in ring.stream(toys)] == [0, 1, 2, 3]
    assert ring.forget() == [] and ("forget", 0) not in log


def test_a_buffer_is_the_same_memory_for_a_kind():
    buffer = Buffer(8, lambda n, dtype: torch.empty(n, dtype=dtype))
    first = buffer.of("master", torch.float32, 8)
    assert buffer.of("master", torch.float32, 3).data_ptr() == first.data_ptr()
    assert buffer.of("exp_avg", torch.float32, 3).data_ptr() != first.data_ptr()
    assert buffer.of("master", torch.bfloat16, 3).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        buffer.of("master", torch.float32, 9).view(9)
