"""A flat on a disk: a file or two of it, and what of them was written since the last commit."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import xxhash
from torch import Tensor

from tritonspeed.offload.commit_record import FlatRecord, digest_of, header_digest
from tritonspeed.offload.direct import DirectFile, DiskError, Pool, Requested, bytes_of
from tritonspeed.offload.held import Held
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.page_file import PageFile, create
from tritonspeed.offload.runs import Run, Runs
from tritonspeed.offload.tiers import Handle

TILE_BYTES = 16 * 2**20  # of what is copied, converted or checked in memory at once


class Owner(Protocol):
    """What a flat needs of its folder."""

    pool: Pool

    def check_usable(self) -> None:
        """Raises where nothing may be written any more."""

    def edited(self, flat: DiskFlat) -> None:
        """The other slot of a committed flat is to become the committed one, now or soon; nothing else changes."""

    def drop(self, flat: DiskFlat) -> None:
        """The flat goes: no record may name it any more."""


class DiskFlat:
    """A flat on disk, of one slot or two; made by ``DiskFolder.flat``.

    A checkpoint takes the committed slot as it is: between two steps ``hold`` keeps it, and whoever writes the
    checkpoint, in a thread of its own, links it there.

    Attributes:
        numel, dtype: of the flat.
        page_elems: fetches and stores start and end at multiples of it, or at the end.
        has_new_name: a file was replaced since the last commit: the folder must be synced before the next one.

    Example:
        >>> held = flat.hold()  # after a commit; microseconds
        >>> held.place(hidden / "layers.0.master.safetensors")  # "linked", or elsewhere "reflinked" or "copied"
        >>> held.digests()  # ((lo, hi, xxh3_64 in hex), ...), bytes, all of the flat
        >>> held.release()  # when the checkpoint is committed or given up; what was placed stays
    """

    def __init__(self, folder: Owner, file: PageFile, paths: Sequence[Path]) -> None:
        self.numel, self.dtype = file.numel, file.dtype
        self.page_elems = PAGE_BYTES // file.dtype.itemsize
        self.contents, self._folder, self._size = file, folder, file.dtype.itemsize
        self._files: list[DirectFile] = []
        try:
            for path in paths:
                self._files.append(DirectFile(path, folder.pool, create(path, file), file.flat_bytes))
        except OSError:  # the disk is full with the second one: the first takes no more of it
            self._delete()
            raise
        self._header = header_digest(file)
        self._lock = threading.Lock()
        self._slot = 0
        self._is_committed = False
        self._is_edited = False  # the other slot is the committed one with edits, not a step's
        self.has_new_name = False
        self._runs = Runs()  # of the committed slot
        self._written = Runs()  # of the other one, since the last commit

    def __repr__(self) -> str:
        return f"DiskFlat({self.contents.kind} of {self.contents.bucket}, {self.numel} {self.dtype})"

    @property
    def has_two_slots(self) -> bool:
        """What is stored shows after the next commit, not at once."""
        return len(self._files) == 2

    def fetch(self, lo: int, hi: int, into: Tensor) -> Handle:
        """Start reading elements [lo, hi) as last committed, into (hi - lo,) in host memory that begins on a page."""
        self._check(lo, hi, into)
        if not self.has_two_slots:  # a write of the same elements comes first
            with self._lock:
                pending = self._written.overlapping(lo * self._size, hi * self._size)
            for run in pending:
                run.handle.wait()
        return self._files[self._slot].read(lo * self._size, into)

    def store(self, lo: int, values: Tensor) -> Handle:
        """Start writing ``values``, in host memory that begins on a page, from element ``lo`` on.

        Two slots: it shows after the next commit. One slot: at once. Until ``wait``, leave the values alone.
        """
        hi = lo + values.numel()
        self._check(lo, hi, values)
        assert not self._is_edited, f"{self}: stored to while it is edited"
        self._folder.check_usable()
        start, end = lo * self._size, hi * self._size
        with self._lock:
            before = self._written.overlapping(start, end)
        for run in before:  # two writes of the same bytes under way end in any order; an error is behind us
            with suppress(OSError):
                run.handle.wait()
        file = self._writable(self._other)
        futures = [self._folder.pool.start_beside(digest_of, bytes_of(values))] if self.has_two_slots else []
        writes = file.write(start, values)
        handle = Requested([*futures, *writes.futures])
        with self._lock:
            self._written.add(Run(start, end, futures[0] if futures else None, handle))
            if not self.has_two_slots:
                self._runs.add(Run(start, end))
        return handle

    def read(self, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) as last committed, (hi - lo,) in host memory; blocks, any alignment."""
        if not 0 <= lo <= hi <= self.numel:
            raise ValueError(f"{self}: [{lo}, {hi}) is not within [0, {self.numel})")
        first, last = self._on_pages(lo, hi)
        held = host_empty(last - first, self.dtype)
        self.fetch(first, last, held).wait()
        return held[lo - first : hi - first]

    def fill(self, values: Tensor) -> None:
        """The flat's contents, from a tensor of ``numel`` elements of any dtype on any device; blocks."""
        if values.numel() != self.numel:
            raise ValueError(f"{self}: filled with {values.numel()} values")
        self.edit(0, values)

    def edit(self, lo: int, values: Tensor) -> None:
        """Change elements from ``lo`` on in what is committed; blocks until the disk has it. Any alignment and dtype.

        A flat with two slots that has been committed is copied whole into its other slot and committed again, with the
        last step and facts: a stop in between leaves it as it was. ``DiskFolder.editing`` makes one copy of many edits.

        Raises:
            RuntimeError: elements were stored since the last commit: which of the two contents is meant?
        """
        values = values.detach().reshape(-1)
        if not 0 <= lo <= lo + values.numel() <= self.numel:
            raise ValueError(f"{self}: [{lo}, {lo + values.numel()}) is not within [0, {self.numel})")
        self._folder.check_usable()
        if self.has_two_slots and len(self._written) and not self._is_edited:
            raise RuntimeError(f"{self}: edited in the middle of a step: commit or discard it first")
        if values.numel() == 0:
            return
        if self.has_two_slots and self._is_committed:
            if not self._is_edited and values.numel() < self.numel:
                self.complete()
            self._put(self._other, self._written, lo, values)
            self._is_edited = True
            self._folder.edited(self)
            return
        self._put(self._slot, self._runs, lo, values)
        if not self.has_two_slots:
            self._files[0].sync().wait()

    def hold(self) -> Held:
        """Keep what is committed as it is, for a checkpoint, whatever is stored, edited or removed from now on.

        Nothing is copied or read: the file gets a second name, and the next write to this slot goes into a new one.
        Where there is one slot, that write copies the file first. No step may be under way.
        """
        self._folder.check_usable()
        if not self.has_two_slots:
            self.settle()
        return Held(self._files[self._slot], self.contents, self._runs, self._folder.pool)

    def _writable(self, slot: int) -> DirectFile:
        """The slot's file, another one if a checkpoint has it too; what is in the committed slot comes along.

        It is made when it is needed: a step into new files took 7 to 13 % longer than into old ones (384 MiB durably,
        medians of 25 pairs, three times), once for each save. That pays for no thread that makes them ahead.
        """
        file, is_committed = self._files[slot], slot == self._slot
        if (not is_committed and len(self._written)) or not file.is_shared:
            return file
        temporary = file.path.with_name(file.path.name + ".tmp")
        try:
            fresh = DirectFile(temporary, self._folder.pool, create(temporary, self.contents), file.num_bytes)
            if is_committed:
                self._copy(file, fresh, 0, file.num_bytes)
            os.rename(temporary, file.path)  # the name never leads to half a file
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DiskError(
                error.errno,
                f"a checkpoint has this file too, and there can be no new one to write to: {error.strerror}; "
                "removing old checkpoints from this disk frees space",
                str(file.path),
            ) from error
        fresh.path, self.has_new_name = file.path, True
        self._files[slot] = fresh  # requests under way keep the old one open
        return fresh

    def _copy(self, source: DirectFile, target: DirectFile, lo: int, hi: int) -> None:
        held = host_empty(min(TILE_BYTES, hi - lo) // self._size, self.dtype)
        for start in range(lo, hi, TILE_BYTES):
            tile = held[: min(TILE_BYTES, hi - start) // self._size]
            source.read(start, tile).wait()
            target.write(start, tile).wait()

    def _put(self, slot: int, runs: Runs, lo: int, values: Tensor) -> None:
        """Write values of any alignment into a slot, tile by tile; the rest of their first and last page stays."""
        file = self._writable(slot)
        first, last = self._on_pages(lo, lo + values.numel())
        tile = TILE_BYTES // self._size
        held = host_empty(min(tile, last - first), self.dtype)
        for start in range(first, last, tile):
            end = min(start + tile, last)
            into = held[: end - start]
            from_lo, from_hi = max(start, lo), min(end, lo + values.numel())
            if (from_lo, from_hi) != (start, end):
                file.read(start * self._size, into).wait()
            into[from_lo - start : from_hi - start].copy_(values[from_lo - lo : from_hi - lo])
            file.write(start * self._size, into).wait()
            runs.add(Run(start * self._size, end * self._size, digest_of(bytes_of(into))))

    def remove(self) -> None:
        """Delete its files; the flat is not used again. What is committed of others stays so."""
        self.discard()
        self._folder.drop(self)
        self._delete()

    def _delete(self) -> None:
        self.close()
        for file in self._files:
            file.path.unlink(missing_ok=True)

    @property
    def _other(self) -> int:
        """The slot that is written."""
        return len(self._files) - 1 - self._slot

    def _on_pages(self, lo: int, hi: int) -> tuple[int, int]:
        last = -(-hi // self.page_elems) * self.page_elems
        return lo // self.page_elems * self.page_elems, min(last, self.numel)

    def _check(self, lo: int, hi: int, tensor: Tensor) -> None:
        assert 0 <= lo <= hi <= self.numel, f"{self}: [{lo}, {hi}) is not within [0, {self.numel})"
        ends_on_page = hi % self.page_elems == 0 or hi == self.numel
        assert lo % self.page_elems == 0 and ends_on_page, f"{self}: [{lo}, {hi}) is not on pages of {self.page_elems}"
        assert tensor.shape == (hi - lo,) and tensor.dtype == self.dtype, (
            f"{self}: [{lo}, {hi}) and a tensor {tuple(tensor.shape)} of {tensor.dtype}"
        )

    @property
    def is_changed(self) -> bool:
        """The next commit flips its slots."""
        return self.has_two_slots and len(self._written) > 0

    def settle(self) -> None:
        """Wait for what is under way; raises what went wrong."""
        for run in self._written:
            run.handle.wait()
        if not self.has_two_slots:
            self._written = Runs()

    def discard(self) -> None:
        """Forget what was stored since the last commit."""
        for run in self._written:
            with suppress(OSError):
                run.handle.wait()
        self._written, self._is_edited = Runs(), False

    def complete(self) -> None:
        """Make the other slot whole: what was not stored since the last commit comes from the committed slot."""
        source, target = self._files[self._slot], self._writable(self._other)
        for lo, hi in self._written.gaps(0, self.contents.flat_bytes):
            self._copy(source, target, lo, hi)
            for run in self._runs.overlapping(lo, hi):
                if lo <= run.lo and run.hi <= hi:  # its digest stays, so that a damaged source is found, not covered
                    self._written.add(run)
            for start, end in self._written.gaps(lo, hi):
                self._written.add(Run(start, end))
        self._written = self._digested(self._written, self._other)

    def _digested(self, runs: Runs, slot: int) -> Runs:
        """The same runs with all digests; what is not known is read."""
        known = []
        for run in runs:
            digest = run.known_digest()
            if digest is None:
                state = xxhash.xxh3_64()
                held = host_empty(min(TILE_BYTES, run.hi - run.lo) // self._size, self.dtype)
                for start in range(run.lo, run.hi, TILE_BYTES):
                    tile = held[: min(TILE_BYTES, run.hi - start) // self._size]
                    self._files[slot].read(start, tile).wait()
                    state.update(bytes_of(tile))
                digest = state.hexdigest()
            known.append(Run(run.lo, run.hi, digest))
        return Runs(known)

    def syncs(self) -> list[Requested]:
        """Start syncing what was written."""
        return [file.sync() for file in self._files if file.is_dirty]

    def record(self, flips: bool) -> FlatRecord:
        """For the commit record, as after it."""
        slot = self._other if flips else self._slot
        if self.has_two_slots and not flips:
            self._runs = self._digested(self._runs, slot)
        runs = self._written if flips else self._runs
        digests = [(run.lo, run.hi, run.known_digest() or "") for run in runs] if self.has_two_slots else []
        return FlatRecord(
            self.contents.bucket, self.contents.kind, self._files[slot].path.name, slot, self._header, tuple(digests)
        )

    def flip(self, flips: bool) -> None:
        """The commit stands."""
        self._is_committed, self.has_new_name = True, False
        if flips:
            self._slot, self._runs, self._written, self._is_edited = self._other, self._written, Runs(), False

    def close(self) -> None:
        """Give back the files."""
        for file in self._files:
            file.close()
