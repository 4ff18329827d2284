"""A rank's folder on a disk: two slots for everything that must survive, and a commit record.

    <path>/tritonspeed/rank-0-of-2/
        lock                             held by the run that uses the folder
        layers.0.master.0.safetensors    slot 0 of the masters of bucket layers.0: read during this step,
        layers.0.master.1.safetensors    slot 1: written during it
        layers.0.parameters.safetensors  one slot: what follows from others is written in place
        committed.json                   which slots the last step left, with digests

A step reads the committed slots and writes the others. ``commit`` waits until the disk has them, replaces the record by
renaming, and only then flips the slots. Whenever the machine stops, the record names files that nobody has touched
since they were complete. A checkpoint links the committed slots; a slot that is linked is never written into again.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from tritonspeed.offload.commit_record import (
    NAME,
    CommitRecord,
    CorruptState,
    committed,
    read_record,
    verify,
    write_record,
)
from tritonspeed.offload.direct import DiskError, Pool, Traffic
from tritonspeed.offload.disk_flat import DiskFlat
from tritonspeed.offload.durable import sync_folder
from tritonspeed.offload.heap import give_back_freed_blocks
from tritonspeed.offload.options import Requests
from tritonspeed.offload.page_file import PageFile, Piece, free_bytes

__all__ = ["CorruptState", "DiskError", "DiskFlat", "DiskFolder", "committed", "verify"]

_log = logging.getLogger("tritonspeed")


class DiskFolder:
    """One rank's folder, ``<path>/tritonspeed/rank-<r>-of-<w>/``, held by this run alone.

    What an earlier run left is replaced when the first flat is made; a warning names its last committed step. Runs go
    on from checkpoints, which have the files they need under names of their own (``DiskFlat.hold``).

    Args:
        path: a folder on the disk; made where only its last part is missing.
        rank, world: whose state it is.
        requests: sizes and numbers of disk requests.

    Raises:
        ValueError: the folder cannot be written, or another run holds it.
    """

    _lock: int | None = None  # a descriptor, while it is held

    def __init__(
        self, path: str | os.PathLike[str], rank: int = 0, world: int = 1, requests: Requests | None = None
    ) -> None:
        give_back_freed_blocks()  # who keeps state on a disk has no memory to spare
        self.rank, self.world = rank, world
        self.folder = Path(path) / "tritonspeed" / f"rank-{rank}-of-{world}"
        _make(Path(path), self.folder)
        self._lock = _hold(self.folder)
        _held_folders.add(self)
        self.pool = Pool(requests or Requests())
        self._flats: dict[tuple[str, str], DiskFlat] = {}
        self._last: CommitRecord | None = None
        self._edited: list[DiskFlat] | None = None  # while ``editing``
        self._broken = ""

    @property
    def traffic(self) -> Traffic:
        """What this folder's files took so far."""
        return self.pool.traffic

    def flat(
        self,
        bucket: str,
        kind: str,
        dtype: torch.dtype,
        numel: int,
        pieces: Sequence[Piece] = (),
        slots: int = 2,
    ) -> DiskFlat:
        """Make a flat of zeros; its place on the disk is taken at once.

        Args:
            bucket, kind: name it; the kind is master, exp_avg, ...
            pieces: what of it is named in the file.
            slots: 2, or 1 for what follows from other flats and need not survive.

        Raises:
            ValueError: there is one of that name already, or the pieces do not fit.
            OSError: the disk is full, with needed and free bytes.
        """
        if slots not in (1, 2):
            raise ValueError(f"{kind} of {bucket}: {slots} slots, must be 1 or 2")
        if (bucket, kind) in self._flats:
            raise ValueError(f"{self.folder}: {kind} of {bucket} is there already")
        self.check_usable()
        if not self._flats:
            self._clear()
        file = PageFile(bucket, kind, dtype, numel, tuple(pieces), self.rank, self.world)
        stem = f"{quote(bucket, safe='')}.{quote(kind, safe='')}"
        names = [f"{stem}.safetensors"] if slots == 1 else [f"{stem}.{slot}.safetensors" for slot in range(2)]
        self._flats[bucket, kind] = flat = DiskFlat(self, file, [self.folder / name for name in names])
        return flat

    def commit(self, step: int, facts: dict[str, Any] | None = None) -> None:
        """Make all that was stored since the last commit the committed state, of all flats at once.

        When it returns, ``step`` survives a kill and a power cut. When it raises, the last one does, and what was
        stored is still there to be committed, unless the disk could not say what it has.

        Args:
            facts: what else belongs to the step (JSON): counts, scales, hyperparameters.
        """
        flats = list(self._flats.values())
        for flat in flats:
            flat.settle()
        self._commit([flat for flat in flats if flat.is_changed], flats, flats, step, facts or {})

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Edits inside are committed together at the end, and show then; after an error, none of them.

        Example:
            >>> with folder.editing():
            ...     for lo, values in changes:
            ...         flat.edit(lo, values)
        """
        assert self._edited is None, f"{self.folder}: editing within editing"
        self._edited = []
        try:
            yield
            self._commit_again(self._edited)
        except BaseException:
            for flat in self._edited:
                flat.discard()
            raise
        finally:
            self._edited = None

    def edited(self, flat: DiskFlat) -> None:
        """A flat's other slot holds what is to be committed, with the last step and facts."""
        if self._edited is None:
            try:
                self._commit_again([flat])
            except BaseException:
                flat.discard()
                raise
        elif flat not in self._edited:
            self._edited.append(flat)

    def drop(self, flat: DiskFlat) -> None:
        """Forget a flat; the commit record names it no more."""
        key = flat.contents.bucket, flat.contents.kind
        del self._flats[key]
        if self._last is not None and key in self._last.flat_keys():  # else no record: a full disk has no room for one
            self._commit_again([])

    def _commit_again(self, flips: list[DiskFlat]) -> None:
        """The last commit, with other contents of some flats; what was stored waits for its own commit."""
        if self._last is not None:
            recorded = self._last.flat_keys()
            flats = [flat for key, flat in self._flats.items() if key in recorded]
            self._commit(flips, flats, flips, self._last.step, self._last.facts)

    def _commit(
        self, flips: list[DiskFlat], flats: list[DiskFlat], synced: list[DiskFlat], step: int, facts: dict[str, Any]
    ) -> None:
        """Make a record of ``flats`` the committed one; ``flips`` of them change slots."""
        self.check_usable()
        for flat in flips:
            flat.complete()
        try:
            for handle in [handle for flat in synced for handle in flat.syncs()]:
                handle.wait()
            if any(flat.has_new_name for flat in flats):  # the record must not be there before what it names
                sync_folder(self.folder)
        except OSError as error:  # asked again, the system forgets what it lost
            self._broken = f"what was written could not be synced ({error})"
            raise DiskError(error.errno, error.strerror, error.filename or str(self.folder)) from error
        records = tuple(flat.record(flat in flips) for flat in flats)
        record = CommitRecord(step, self.rank, self.world, records, facts)
        try:
            write_record(self.folder, record)
        except OSError as error:
            stands = f"step {self._last.step} is" if self._last else "nothing is"
            text = f"step {step} could not be committed: {error.strerror} ({free_bytes(self.folder):,} bytes are free)"
            raise DiskError(error.errno, f"{text}; {stands} committed", str(self.folder / NAME)) from error
        self._last = record
        for flat in flats:
            flat.flip(flat in flips)
        try:
            sync_folder(self.folder)
        except OSError as error:  # which of the two records a power cut leaves is not known: touch neither's files
            self._broken = f"the commit of step {step} could not be synced ({error.strerror})"
            raise DiskError(error.errno, self._broken, str(self.folder)) from error

    def discard(self) -> None:
        """Forget what was stored since the last commit."""
        for flat in self._flats.values():
            flat.discard()

    def check_usable(self) -> None:
        """Raises if the folder is closed, or an error left its state on the disk unknown."""
        if self._lock is None:
            raise ValueError(f"{self.folder}: the folder is closed")
        if self._broken:
            raise DiskError(errno.EIO, f"{self._broken}: start again from a checkpoint", str(self.folder))

    def close(self) -> None:
        """Wait for what is under way and give the folder back; what is committed stays."""
        if self._lock is None:
            return
        self.discard()
        self.pool.close()
        for flat in self._flats.values():
            flat.close()
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.forget_lock()

    def forget_lock(self) -> None:
        """Close the lock's descriptor; the lock itself lives as long as another process has it open."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.forget_lock()

    def _clear(self) -> None:
        """Remove what an earlier run left, the record first: it must never name files that are gone."""
        try:
            old = read_record(self.folder)
            _log.warning(
                "%s: replacing what an earlier run left, step %d committed at %s; a run does not go on from there: if "
                "this one should, engine.load_checkpoint(save_dir) takes the last checkpoint that was saved",
                self.folder,
                old.step,
                old.time,
            )
        except FileNotFoundError:
            pass
        except CorruptState as error:
            _log.warning("%s: replacing what an earlier run left, damaged: %s", self.folder, error)
        with suppress(FileNotFoundError):
            (self.folder / NAME).unlink()
            sync_folder(self.folder)
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.tmp")):
            path.unlink()
        others = {path.name for path in self.folder.parent.glob("rank-0-of-*")} - {f"rank-0-of-{self.world}"}
        if others and self.rank == 0:
            _log.warning(
                "%s: runs of other numbers of ranks left files here too: %s", self.folder.parent, sorted(others)
            )


def _make(path: Path, folder: Path) -> None:
    """The rank's folder, durably; ValueError says why not."""
    try:
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}: is the disk mounted? name one that exists")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "lock"
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        for above in (folder, folder.parent, path):
            sync_folder(above)
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written: {error.strerror}: name a folder of a local disk that this user may write to "
            "(nvme_path)"
        ) from error


def _hold(folder: Path) -> int:
    """Lock the folder; a descriptor that holds the lock."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    if not _locks(descriptor):
        gc.collect()  # an engine that nobody can reach any more gives its folder back
        if not _locks(descriptor):
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            remedy = "close the engine that uses it" if holder == str(os.getpid()) else "wait for it, or end it"
            raise ValueError(
                f"{folder}: another run holds this folder, process {holder}: {remedy}, or name another folder"
            )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave_locks_to_parent() -> None:
    """A forked child (a data loader's worker) must not hold the folder beyond the life of the run."""
    for folder in list(_held_folders):
        folder.forget_lock()


_held_folders: weakref.WeakSet[DiskFolder] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_locks_to_parent)
