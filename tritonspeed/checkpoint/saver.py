"""Saving a checkpoint: at once, or from a snapshot in a thread while training goes on.

    rank 0    takes the folder's lock, ends what dead saves left, makes the hidden folder    collective
    all       see it                                                                         collective
    all       snapshot; ``start`` returns here
    all       write files and state; index.json                                              files alone, from here on
    rank 0    manifest, tag, latest, prune; lets go of the lock
    all       know the outcome

See ``writer`` for the files, ``commit`` for how the ranks agree.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from tritonspeed.checkpoint.commit import SETTLE_S, Commit, Publication, new_save_id, poll, reason_of
from tritonspeed.checkpoint.errors import CheckpointBusy, CheckpointError, SaveFailed
from tritonspeed.checkpoint.folder import Lock, check_place, clear, hidden_name, make_durably
from tritonspeed.checkpoint.job import Job, SaveReport
from tritonspeed.checkpoint.manifest import STATE, RankIndex
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.tree import encode
from tritonspeed.checkpoint.writer import Writer, file_name, layout_of
from tritonspeed.comm.collectives import broadcast_text, exchange, gather_texts
from tritonspeed.comm.mesh import Mesh
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.durable import write_synced
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.offload.pool import HostPool

_log = logging.getLogger("tritonspeed")
_UNIT = "checkpoint"


@dataclass
class _Save:
    """One save under way on this rank."""

    job: Job
    commit: Commit
    lock: Lock | None
    state: Any
    tensors: dict[str, Tensor]
    records: Sequence[Record]
    began: float
    buffers: list[Tensor] = field(default_factory=list)  # of the snapshot
    stall_s: float = 0.0
    error: BaseException | None = None  # of what came before writing
    thread: threading.Thread | None = None
    outcome: SaveReport | BaseException | None = None


class Saver:
    """Saves checkpoints of the ranks of a mesh. Its calls are collective, but for ``check`` and ``in_progress``.

    Args:
        requests: sizes and numbers of disk requests.
        empty: (elements, dtype) → host memory, for snapshots.
        keep_buffers: keep the memory of a snapshot for the next one, which then costs no page faults and no locking of
            pages. At most what one snapshot takes; otherwise it goes when the save has ended.

    Attributes:
        last: what the last save that was committed took.

    Example:
        >>> saver.start(job)  # training goes on
        >>> saver.wait()      # committed, or SaveFailed
    """

    def __init__(
        self,
        mesh: Mesh,
        requests: Requests | None = None,
        empty: Callable[[int, torch.dtype], Tensor] = host_empty,
        keep_buffers: bool = True,
    ) -> None:
        self.mesh = mesh
        self.last: SaveReport | None = None
        self._requests, self._empty = requests or Requests(), empty
        self._keeps_buffers = keep_buffers
        self._buffers = HostPool(lambda purpose, num_bytes: None)
        self._current: _Save | None = None
        _savers.add(self)

    @property
    def in_progress(self) -> bool:
        """A background save has not ended yet."""
        thread = self._current.thread if self._current is not None else None
        return thread is not None and thread.is_alive()

    def save(self, job: Job) -> Path:
        """Save and wait until it is committed.

        Raises:
            SaveFailed: nothing was committed, on any rank; the text is the same on all.
            CheckpointBusy: another process is saving into this folder.
        """
        began = time.perf_counter()
        self.wait()
        save = self._begin(job, began)
        self._snapshot(save, [r for r in job.records if r.flat is not None])
        self._run(save)
        return self._ended(save)

    def start(self, job: Job) -> None:
        """Take a snapshot, and save it in a thread. Waits for the previous save first, and raises what became of it.

        Raises:
            SaveFailed, CheckpointBusy: as ``save``, before anything was written.
        """
        began = time.perf_counter()
        self.wait()
        save = self._begin(job, began)
        self._snapshot(save, job.records)
        save.stall_s = time.perf_counter() - save.began
        save.thread = threading.Thread(target=self._run, args=(save,), name="tritonspeed-save")
        self._current = save
        save.thread.start()

    def wait(self) -> Path | None:
        """Until the background save is committed; None where there was none.

        Raises:
            SaveFailed: it was not, on any rank.
        """
        save = self._current
        if save is None or save.thread is None:
            return None
        save.thread.join()
        self._current = None
        return self._ended(save)

    def check(self) -> None:
        """Raise what a background save that has ended failed with; nothing while it goes on, or after a good one."""
        if self._current is not None and not self.in_progress and isinstance(self._current.outcome, BaseException):
            self.wait()

    def _ended(self, save: _Save) -> Path:
        if isinstance(save.outcome, SaveReport):
            self.last = report = save.outcome
            if self.mesh.rank == 0:
                _log.info(
                    "saved %s in %.2f s; training stood still for %.2f s",
                    report.path,
                    report.seconds,
                    report.stall_seconds,
                )
            return report.path
        assert save.outcome is not None, f"the save of {save.job.tag} ended without an outcome"
        raise save.outcome

    def _begin(self, job: Job, began: float) -> _Save:
        """What the ranks do together: agree on a hidden folder that all of them see."""
        mesh = self.mesh
        if mesh.is_simulated:
            raise ValueError("a simulated mesh has no values to save")
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        folder = Path(job.folder).absolute()  # the thread may outlive a change of directory
        state, tensors, error, lock = None, {}, "", None
        try:
            state, tensors = encode(job.state, "state")
            _check_records(job)
        except (ValueError, TypeError) as wrong:
            error = str(wrong)
        told = {"save_id": new_save_id(), "tag": job.tag, "busy": "", "error": error}
        if mesh.rank == 0 and not error:
            lock = _open_folder(folder, told)
        try:
            told = json.loads(broadcast_text(mesh, json.dumps(told) if mesh.rank == 0 else None, 0, _UNIT))
            commit = Commit(folder, told["tag"], told["save_id"], mesh.rank, mesh.world, mesh.timeout_s)
            if told["busy"]:
                raise CheckpointBusy(told["busy"])
            if told["error"]:
                raise SaveFailed(commit.said({0: told["error"]}))
            self._agree(commit, error)
        except BaseException:
            if lock is not None:
                Commit(folder, told["tag"], told["save_id"], 0, mesh.world, 0).abandon()
                lock.release()
            raise
        return _Save(job, commit, lock, state, tensors, job.records, began)

    def _agree(self, commit: Commit, error: str) -> None:
        """Raise SaveFailed on all ranks if any has an error, or does not see the folder that rank 0 has made."""
        if not error and not poll(commit.hidden.is_dir, SETTLE_S):
            error = f"it does not see {commit.hidden}, which rank 0 has made: all hosts must share the folder"
        try:
            if not error:
                commit.open()
        except OSError as wrong:
            error = reason_of(wrong, commit.folder)
        mine = torch.tensor([float(bool(error))], dtype=torch.float64, device=self.mesh.device)
        if exchange(self.mesh, mine).any():
            reasons = enumerate(gather_texts(self.mesh, error, _UNIT))
            raise SaveFailed(commit.said({rank: reason for rank, reason in reasons if reason}))

    def _snapshot(self, save: _Save, records: Sequence[Record]) -> None:
        """Values of their own for ``records``; an error is this rank's to tell the others, not to raise here."""
        wanted = {id(record) for record in records}
        taken: list[Record] = []
        save.records = taken

        def empty(numel: int, dtype: torch.dtype) -> Tensor:
            buffer = self._buffers.lend("snapshot", numel, dtype, lambda: self._empty(numel, dtype))
            save.buffers.append(buffer)
            return buffer

        try:
            for record in save.job.records:
                taken.append(record.snapshot(empty) if id(record) in wanted else record)
            self._buffers.clear()  # what other records needed
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
        except BaseException as error:
            save.error = error
            if not isinstance(error, Exception):  # Ctrl-C
                save.commit.give_up(error)
                self._let_go(save)
                raise

    def _run(self, save: _Save) -> None:
        """Write, commit and conclude; never raises but for what is no error."""
        commit, job, wrote = save.commit, save.job, time.perf_counter()
        num_bytes = 0
        try:
            try:
                num_bytes = self._write(save)
            except BaseException as error:
                commit.give_up(error)
                if not isinstance(error, Exception):  # Ctrl-C
                    raise
            write_s = time.perf_counter() - wrote
            path = commit.conclude(Publication(job.parameters, job.step, job.facts, job.set_latest, job.keep_last))
            seconds = time.perf_counter() - save.began
            stall_s = save.stall_s if save.thread is not None else seconds
            save.outcome = SaveReport(path, num_bytes, seconds, write_s, stall_s)
        except Exception as error:
            save.outcome = error
        finally:
            self._let_go(save)

    def _let_go(self, save: _Save) -> None:
        for record in save.records:
            if record.held is not None:
                record.held.release()
        save.records = ()
        if self._keeps_buffers:
            for buffer in save.buffers:
                self._buffers.take_back("snapshot", buffer)
        save.buffers = []
        if save.lock is not None:
            with suppress(OSError):
                save.lock.release()

    def _write(self, save: _Save) -> int:
        """All this rank has to write; the bytes of its files."""
        if save.error is not None:
            raise save.error
        commit, job = save.commit, save.job
        writer = Writer(self._requests)
        try:
            written = writer.write(commit.own, save.records, job.parameters)
        finally:
            writer.close()
        state_digest = ""
        if save.tensors:
            content = safetensors_bytes(save.tensors)
            write_synced(commit.own / STATE, content)
            state_digest = digest_of(content)
        if job.extras is not None:
            job.extras(commit.hidden, save.records)
        commit.done(
            RankIndex(
                save_id=commit.save_id,
                rank=commit.rank,
                world=commit.world,
                files=written.files,
                layouts=written.layouts,
                scalars=tuple((dict(values), tuple(names)) for values, names in job.scalars),
                state=save.state,
                state_digest=state_digest,
            )
        )
        return written.num_bytes


def _check_records(job: Job) -> None:
    """What would only fail while writing: two records of one file, names that are no parameter's."""
    names: set[str] = set()
    for record in job.records:
        layout_of(record.file, job.parameters)
        if (name := file_name(record.file)) in names:
            raise ValueError(f"two records are {record.file.kind} of {record.file.bucket}")
        names.add(name)


def _open_folder(folder: Path, told: dict[str, str]) -> Lock | None:
    """Rank 0: the folder is there, ours alone, without leftovers, and has a hidden folder for this save.

    Args:
        told: what all ranks will be told; where it fails, "busy" or "error" says why.
    """
    lock = None
    try:
        make_durably(folder)
        lock = Lock.take(folder)
        if lock.descriptor is not None:  # else another run may be in the middle of a save
            clear(folder)
        check_place(folder, told["tag"])
        (folder / hidden_name(told["tag"], told["save_id"])).mkdir()
        return lock
    except CheckpointBusy as error:
        told["busy"] = str(error)
    except (OSError, CheckpointError) as error:
        told["error"] = reason_of(error, folder)
    if lock is not None:
        lock.release()
    return None


_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def _finish_all() -> None:
    """The interpreter ends: saves that are under way come first."""
    for saver in list(_savers):
        try:
            saver.wait()
        except Exception as error:
            _log.error("%s", error)


# atexit comes too late: a pool takes no more work once the interpreter has begun to end. What pools themselves
# register with comes in reverse order, so before theirs.
threading._register_atexit(_finish_all)  # pyrefly: ignore[missing-attribute]
