"""Ranks on one CPU host exchange through memory they share, not through the loopback network.

Each rank owns one window of /dev/shm that all others map. A rank *posts* what it has into its own window, the others
read it where it stands: an all-gather is one copy in and one out, and a reduce-scatter adds the peers' blocks without
copying them at all. 58 MiB bf16 on 2 ranks of a 2-core machine, medians: all-gather 11 ms by gloo sends and receives,
5.5 here; reduce-scatter 19 and 9, of which 8 are the sum itself (bench/systems/wire.py).

Every rank opens the same streams in the same order, so that where one stands, and whether it fits, follows from its
number alone. What is larger than a region goes through it in pieces, two halves in turn. A window begins with counters
that only its owner writes, two for each of the last streams, each n · 2²⁰ + pieces for stream n:

    posted    how many pieces are complete in the owner's window
    done      how many pieces the owner has read from everybody's

A half may be overwritten when every peer has done the piece that it held. Plain loads and stores order these counters
against the data on x86-64 (total store order); other processors, and ranks on several hosts, use gloo.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import socket
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = "/dev/shm"
WINDOW_BYTES = 16 << 20  # of every rank
REGION_BYTES = 4 << 20  # of a stream at most: a few streams are under way at once, and all of it stays in cache
PAGE_BYTES = 4096
COUNTERS = PAGE_BYTES // 8 // 2  # streams that have counters at a time
PIECES = 1 << 20
SPIN_CHECKS, YIELD_CHECKS = 200, 2000  # before sleeping: a peer is a few hundred microseconds behind at most
NAP_S = 50e-6
LOOK_EVERY_S = 1.0  # how often a waiting rank looks whether the peer still lives


@dataclass(slots=True)
class Stream:
    """One operation's way through every window.

    Each rank posts ``num_parts`` parts of ``part_bytes``, in ``num_pieces`` pieces of at most ``piece_bytes`` of each.
    """

    number: int
    start: int
    end: int
    num_parts: int
    part_bytes: int
    piece_bytes: int
    num_pieces: int
    read: bool = False  # this rank has read all of it: by the same order, so will the others

    def piece(self, index: int) -> tuple[int, int]:
        """[lo, hi) of piece ``index``, in bytes of a part."""
        return index * self.piece_bytes, min((index + 1) * self.piece_bytes, self.part_bytes)

    def place(self, index: int, part: int) -> int:
        """Where in a window piece ``index`` of a part stands: the halves of the region take turns."""
        return self.start + (index % 2 * self.num_parts + part) * self.piece_bytes


class SharedWindows:
    """This rank's window and its peers'. Made by ``open_windows``.

    Args:
        rank: this rank.
        windows: the mapped windows in rank order.
        pids: the ranks' processes.
        timeout_s: how long to wait for a peer.
    """

    def __init__(self, rank: int, windows: list[mmap.mmap], pids: list[int], timeout_s: float) -> None:
        self.rank, self.pids, self.timeout_s = rank, pids, timeout_s
        self.peers = [r for r in range(len(pids)) if r != rank]
        self.num_streams = 0
        self._counters = [memoryview(w).cast("q") for w in windows]
        self._bytes = [torch.frombuffer(w, dtype=torch.uint8) for w in windows]
        self._streams: list[Stream] = []  # not yet known to be done by everybody
        self._head = PAGE_BYTES

    def open(self, part_bytes: int, num_parts: int) -> Stream | None:
        """A way for the next operation, the same on every rank; None where there is no room now.

        Args:
            part_bytes: what goes to one reader; a multiple of 64.
            num_parts: different parts each rank posts: 1 if all peers read the same.
        """
        piece_bytes, num_pieces = part_bytes, 1
        if part_bytes * num_parts > REGION_BYTES:
            piece_bytes = REGION_BYTES // 2 // num_parts // 64 * 64
            num_pieces = -(-part_bytes // piece_bytes)
        size = -(-piece_bytes * num_parts * min(num_pieces, 2) // PAGE_BYTES) * PAGE_BYTES
        for start in (self._head, PAGE_BYTES):
            clash = [s for s in self._streams if s.start < start + size and start < s.end]
            if start + size <= WINDOW_BYTES and all(s.read for s in clash):
                break
        else:
            return None
        if len(self._streams) >= COUNTERS // 2 and not clash:  # many small ones: the oldest's counters come round
            if not self._streams[0].read:
                return None
            clash = self._streams[:1]
        for stream in clash:
            for peer in self.peers:
                self._wait_for(peer, "done", stream, stream.num_pieces)
            self._streams.remove(stream)
        self.num_streams += 1
        self._head = start + size
        stream = Stream(self.num_streams, start, start + size, num_parts, part_bytes, piece_bytes, num_pieces)
        self._streams.append(stream)
        return stream

    def post(self, stream: Stream, index: int, parts: list[Tensor]) -> None:
        """Write piece ``index`` of ``parts`` (uint8, part_bytes each) into this rank's window, for the others to
        read."""
        for peer in self.peers if index >= 2 else ():
            self._wait_for(peer, "done", stream, index - 1)
        lo, hi = stream.piece(index)
        for number, part in enumerate(parts):
            at = stream.place(index, number)
            self._bytes[self.rank][at : at + hi - lo].copy_(part[lo:hi])
        self._set("posted", stream, index + 1)

    def peek(self, stream: Stream, index: int, peer: int, part: int) -> Tensor:
        """Piece ``index`` of a part of ``peer``'s, uint8, as it stands in its window; waits until it is posted."""
        self._wait_for(peer, "posted", stream, index + 1)
        lo, hi = stream.piece(index)
        at = stream.place(index, part)
        return self._bytes[peer][at : at + hi - lo]

    def done(self, stream: Stream, index: int) -> None:
        """This rank has read piece ``index`` of everybody's."""
        stream.read = index + 1 == stream.num_pieces
        self._set("done", stream, index + 1)

    def _set(self, which: str, stream: Stream, num_pieces: int) -> None:
        self._counters[self.rank][self._place(which, stream)] = stream.number * PIECES + num_pieces

    def _place(self, which: str, stream: Stream) -> int:
        return stream.number % COUNTERS + (COUNTERS if which == "done" else 0)

    def _wait_for(self, peer: int, which: str, stream: Stream, num_pieces: int) -> None:
        counters, place, wanted = self._counters[peer], self._place(which, stream), stream.number * PIECES + num_pieces
        checks, start, looked = 0, 0.0, 0.0
        while counters[place] < wanted:
            checks += 1
            if checks <= SPIN_CHECKS:
                continue
            if checks <= YIELD_CHECKS:
                os.sched_yield()
                continue
            time.sleep(NAP_S)
            now = time.monotonic()
            start, looked = start or now, looked or now
            if now - looked > LOOK_EVERY_S:
                looked = now
                self._check_alive(peer)
            if now - start > self.timeout_s:
                raise RuntimeError(f"rank {self.rank} has waited {self.timeout_s:.0f} s for rank {peer}")

    def _check_alive(self, peer: int) -> None:
        try:
            os.kill(self.pids[peer], 0)
        except ProcessLookupError:
            raise RuntimeError(f"rank {peer} has ended (process {self.pids[peer]} is gone)") from None
        except PermissionError:
            pass


def _host() -> str:
    """What ranks with the same /dev/shm share, and others do not."""
    try:
        place = os.stat(FOLDER)
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()} {place.st_dev} {place.st_ino}"
    except OSError:
        return f"no shared memory on {socket.gethostname()} {secrets.token_hex(8)}"


def _create() -> tuple[str, mmap.mmap] | None:
    path = f"{FOLDER}/tritonspeed-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, WINDOW_BYTES)  # a full /dev/shm says so here, not by a signal later
        return path, mmap.mmap(handle, WINDOW_BYTES)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)


def _map(path: str) -> mmap.mmap | None:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(handle, WINDOW_BYTES)
    finally:
        os.close(handle)


def open_windows(rank: int, world: int, group: dist.ProcessGroup | None, timeout_s: float) -> SharedWindows | None:
    """Map a window of every rank. Collective; None, on every rank, where the ranks do not share memory.

    The files are unlinked before this returns: whatever happens later, nothing is left in /dev/shm.
    """
    own = _create() if platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux" else None
    offers: list[tuple[str, str | None, int] | None] = [None] * world
    dist.all_gather_object(offers, (_host(), own[0] if own else None, os.getpid()), group=group)
    known = [offer for offer in offers if offer is not None]
    shared = len({host for host, _, _ in known}) == 1 and all(path is not None for _, path, _ in known)
    windows: list[mmap.mmap | None] = []
    if shared:
        windows = [own[1] if r == rank and own else _map(path or "") for r, (_, path, _) in enumerate(known)]
    mapped: list[bool | None] = [None] * world
    dist.all_gather_object(mapped, bool(windows) and None not in windows, group=group)
    if own:
        os.unlink(own[0])
    if not all(mapped):
        return None
    return SharedWindows(rank, [w for w in windows if w is not None], [pid for _, _, pid in known], timeout_s)
