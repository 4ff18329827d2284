"""How the ranks of one save agree, through files in the shared folder alone: a thread of each may do it.

    .<save_id>.open-1                     rank 1 is at it; room on the disk to say why, should it fail
    .<save_id>.done-1                     all of its files are on disk, ``rank-1-of-2/index.json`` too: its commit
    .<save_id>.failed-1                   it gave up, and why
    .<tag>.<save_id>/manifest.json        rank 0 has seen that all are done; next, the folder gets its tag
    .<save_id>.open-0                     when this goes, the checkpoint is committed
    .<save_id>.failed-0                   nothing was committed, and why

A rank's file changes its name once, as the last thing it does before it waits. Nobody asks torch.distributed anything:
training uses it meanwhile.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from tritonspeed.checkpoint.errors import SaveFailed
from tritonspeed.checkpoint.folder import LATEST, check_place, hidden_name, prune, publish, remove
from tritonspeed.checkpoint.manifest import INDEX, MANIFEST, Manifest, RankIndex, index_text, manifest_text, rank_folder
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.durable import sync_folder, write_durably, write_synced
from tritonspeed.offload.page_file import free_bytes

REASON_BYTES = 8192  # set aside by every rank beforehand: the reason may be a full disk
MOST_REASON_CHARS = 1000  # of a text that takes up to six bytes of JSON each, beside two names
MOST_PAUSE_S = 0.02
EAGER_RANKS = 16  # more than these ask less often, so that all together ask a shared file system no more
FAREWELL_S = 30.0  # how long rank 0 leaves the reason of a failure for others to read
SETTLE_S = 2.0  # a shared folder may show what another host did a little later
_log = logging.getLogger("tritonspeed")


def new_save_id() -> str:
    """16 hex digits that no other save has."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Publication:
    """What rank 0 says of a checkpoint.

    Attributes:
        parameters, step, facts: of the manifest.
        set_latest: ``latest`` names it.
        keep_last: so many of the newest stay; None keeps all.
    """

    parameters: Mapping[str, ParameterFacts]
    step: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    set_latest: bool = True
    keep_last: int | None = None


@dataclass
class Commit:
    """One rank's part in one save.

    Attributes:
        folder: what the checkpoint will stand in.
        tag, save_id: its name, and which save it is.
        timeout_s: how long to wait for another rank, once this one has done its part.
    """

    folder: Path
    tag: str
    save_id: str
    rank: int
    world: int
    timeout_s: float
    _given_up: str = ""
    _in_place: bool = False

    @property
    def hidden(self) -> Path:
        """The folder while it is being written."""
        return self.folder / hidden_name(self.tag, self.save_id)

    @property
    def own(self) -> Path:
        """This rank's folder in it."""
        return self.hidden / rank_folder(self.rank, self.world)

    def _of(self, rank: int) -> Path:
        return self.hidden / rank_folder(rank, self.world)

    def _sign(self, state: Literal["open", "done", "failed"], rank: int) -> Path:
        return self.folder / f".{self.save_id}.{state}-{rank}"

    def open(self) -> None:
        """This rank's folder, and room to say why if it comes to that.

        Raises:
            OSError: the disk is full, read-only, or the hidden folder is not to be seen from here.
        """
        self.own.mkdir()
        self._sign("open", self.rank).write_bytes(b" " * REASON_BYTES)

    def done(self, index: RankIndex) -> None:
        """This rank has written all it has to: its commit, behind which it can fail no more."""
        write_durably(self.own / INDEX, index_text(index).encode())
        sync_folder(self.own)
        if self.rank != 0:
            os.rename(self._sign("open", self.rank), self._sign("done", self.rank))

    def give_up(self, error: BaseException) -> None:
        """This rank cannot: say so."""
        self._given_up = reason_of(error, self.folder)
        if self.rank != 0:
            self._say(self._given_up)

    def _say(self, reason: str) -> None:
        """Write why this rank failed, into room that is its own already: its files go first."""
        if not self._in_place:
            shutil.rmtree(self.own, ignore_errors=True)
        try:
            with open(self._sign("open", self.rank), "r+b") as stream:
                stream.write(json.dumps(reason).encode().ljust(REASON_BYTES))
            os.rename(self._sign("open", self.rank), self._sign("failed", self.rank))
        except OSError as error:
            _log.error("rank %d cannot tell the others: %s (%s)", self.rank, reason, error)

    def conclude(self, publication: Publication) -> Path:
        """The outcome, the same on all ranks; rank 0 brings it about.

        Returns:
            The committed checkpoint.

        Raises:
            SaveFailed: which rank failed and why, or which are missing.
        """
        if self.rank != 0:
            return self._await_outcome()
        digests, reasons = self._gather()
        if not reasons:
            try:
                self._publish(publication, digests)
                return self.folder / self.tag
            except Exception as error:
                reasons = {0: reason_of(error, self.folder)}
        raise SaveFailed(self._failed(reasons))

    def _gather(self) -> tuple[list[str], dict[int, str]]:
        """(digest of every rank's index, reason of every rank that failed); rank 0, once all have answered."""
        digests: dict[int, str] = {}
        reasons = {0: self._given_up} if self._given_up else {}

        def answered() -> bool:
            for rank in set(range(self.world)) - digests.keys() - reasons.keys():
                if (content := self._index_of(rank)) is not None:
                    digests[rank] = digest_of(content)
                    if f'"save_id": "{self.save_id}"'.encode() not in content[:200]:
                        reasons[rank] = "its index is of another save"
                elif (content := _read(self._sign("failed", rank))) is not None:
                    reasons[rank] = json.loads(content)
            return len(digests.keys() | reasons.keys()) == self.world

        if not poll(answered, self.timeout_s, self.world):
            for rank in set(range(self.world)) - digests.keys() - reasons.keys():
                reasons[rank] = f"was not heard of for {self.timeout_s:g} s after rank 0 had done its part"
        return [digests.get(rank, "") for rank in range(self.world)], reasons

    def _publish(self, publication: Publication, digests: list[str]) -> None:
        """Manifest, tag, ``latest``. What may find the disk full comes before the commit."""
        check_place(self.folder, self.tag)
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        facts = {**publication.facts, "latest": publication.set_latest}
        manifest = Manifest(
            self.tag, self.save_id, publication.step, now, self.world, publication.parameters, tuple(digests), facts
        )
        latest = self.folder / f".{LATEST}.{self.save_id}"
        try:
            if publication.set_latest:
                write_synced(latest, self.tag.encode())
            sync_folder(self.hidden)  # the manifest must not be there before what it speaks of
            write_durably(self.hidden / MANIFEST, manifest_text(manifest).encode())
            sync_folder(self.hidden)
            old = publish(self.folder, self.hidden, self.tag, self.save_id)
            self._in_place = True
            if publication.set_latest:
                os.rename(latest, self.folder / LATEST)
            sync_folder(self.folder)
        except BaseException:
            with suppress(OSError):
                latest.unlink()
            raise
        self._sign("open", 0).unlink(missing_ok=True)
        try:
            if old is not None:
                remove(old)
            if publication.keep_last is not None:
                prune(self.folder, publication.keep_last, self.tag)
        except OSError as error:  # the next save tries again
            _log.warning("%s: old checkpoints could not be removed: %s", self.folder, error)

    def _failed(self, reasons: Mapping[int, str]) -> str:
        """Tell all ranks, remove the folder; what was told."""
        text = self.said(reasons)
        if not self._in_place:
            with suppress(OSError):  # before anybody's files go: what has a manifest is taken for whole
                (self.hidden / MANIFEST).unlink()
                sync_folder(self.hidden)
        self._say(text)
        poll(lambda: not any(self._is_here(rank) for rank in range(1, self.world)), min(FAREWELL_S, self.timeout_s))
        self.abandon()
        return text

    def abandon(self) -> None:
        """Rank 0: remove what there is of this save."""
        remove(self.hidden)
        for path in self.folder.glob(f".{self.save_id}.*"):
            with suppress(OSError):
                path.unlink()

    def _index_of(self, rank: int) -> bytes | None:
        """The index of a rank that is done."""
        if rank != 0 and not self._sign("done", rank).exists():
            return None
        return _read(self._of(rank) / INDEX)

    def _is_here(self, rank: int) -> bool:
        """A rank that has answered and not left yet."""
        return self._sign("done", rank).exists() or self._sign("failed", rank).exists()

    def _leave(self) -> None:
        for state in ("done", "failed"):
            with suppress(OSError):
                self._sign(state, self.rank).unlink()

    def _await_outcome(self) -> Path:
        """What rank 0 made of it, on the other ranks."""
        gone_since: list[float] = []
        verdict: list[str] = []

        def concluded() -> bool:
            is_open = _read(self._sign("open", 0), 1) is not None
            if (content := _read(self._sign("failed", 0))) is not None:
                shutil.rmtree(self.own, ignore_errors=True)
                self._leave()
                verdict.append(json.loads(content))
            elif not is_open and self._is_published():
                self._leave()
                verdict.append("")
            elif not is_open:  # rank 0 has been cleared away, or this host's view of the folder is late
                gone_since.append(time.monotonic())
                if gone_since[-1] - gone_since[0] > SETTLE_S:
                    verdict.append(self._not_known("rank 0 is gone"))
            return bool(verdict)

        if not poll(concluded, 2 * self.timeout_s, self.world):  # rank 0 may have waited for a third one
            verdict.append(self._not_known(self._who_is_missing()))
        if not verdict[0]:
            return self.folder / self.tag
        raise SaveFailed(verdict[0])

    def said(self, reasons: Mapping[int, str]) -> str:
        """The error's text, the same on all ranks."""
        return self._not_saved("; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items())))

    def _not_saved(self, why: str) -> str:
        if len(why) > MOST_REASON_CHARS:
            why = why[:MOST_REASON_CHARS] + " ..."
        if self._in_place:
            return f"checkpoint {self.tag!r} is in {self.folder}, and may not survive a power cut: {why}"
        return f"checkpoint {self.tag!r} was not saved: {why}; what was in {self.folder} before is as it was"

    def _not_known(self, why: str) -> str:
        return f"checkpoint {self.tag!r} may not be saved: {why}; what was in {self.folder} before is as it was"

    def _is_published(self) -> bool:
        content = _read(self.folder / self.tag / MANIFEST, 400)
        return content is not None and f'"save_id": "{self.save_id}"'.encode() in content

    def _who_is_missing(self) -> str:
        missing = [str(rank) for rank in range(self.world) if rank and self._index_of(rank) is None] or ["0"]
        return f"rank {', '.join(missing)} did not finish within {2 * self.timeout_s:g} s after rank {self.rank} had"


def reason_of(error: BaseException, folder: Path) -> str:
    """Why, with what to do about it."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}" if not str(error) or isinstance(error, KeyError) else str(error)
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{error.strerror or error}"
    with suppress(OSError):
        if error.errno == errno.ENOSPC and "free" not in text:
            return f"{text}: {free_bytes(folder):,} bytes are free: free some, or save into another folder"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}: name a folder that this user may write to, on a file system that is not read-only"
    return text


def _read(path: Path, num_bytes: int = -1) -> bytes | None:
    """A file's contents; None where it is not there (yet)."""
    try:
        with open(path, "rb") as stream:
            return stream.read(num_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None


def poll(is_done: Callable[[], bool], timeout_s: float, num_ranks: int = 1) -> bool:
    """Ask again and again, in growing pauses; whether it came true in time."""
    pause_s, until = 0.0005, time.monotonic() + timeout_s
    most_pause_s = MOST_PAUSE_S * max(1.0, num_ranks / EAGER_RANKS)
    while not is_done():
        if time.monotonic() > until:
            return False
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, most_pause_s)
    return True
