"""The folder that checkpoints stand in: tags, ``latest``, what is committed, and who may write.

    save_dir/latest                               text: a tag
    save_dir/global_step12/                       a committed checkpoint
    save_dir/.global_step12.<save_id>/            one that is being written, or was when its save died
    save_dir/.global_step12.<save_id>.replaced/   what a new one of the same tag has taken the place of
    save_dir/.lock                                held by the process that saves
    save_dir/.<save_id>.open-0                    there until a save has ended; all such: see ``commit``

What is visible is whole: a checkpoint gets its name by one renaming, and loses it by one before anything of it goes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritonspeed.checkpoint.errors import CheckpointBusy, CheckpointError, CorruptCheckpoint
from tritonspeed.checkpoint.manifest import MANIFEST, MOST_JSON_BYTES, Manifest, parse_manifest, plain_name
from tritonspeed.offload.durable import sync_folder, write_durably

LATEST, LOCK = "latest", ".lock"
MOST_TAG_BYTES = 200  # a hidden name has 27 more, and file systems take 255
_HIDDEN = re.compile(r"\.(?P<tag>.+)\.(?P<save_id>[0-9a-f]{16})(?P<replaced>\.replaced)?", re.DOTALL)
_LEFTOVER = re.compile(rf"\.{LATEST}\.([0-9a-f]{{16}}|tmp)|\.[0-9a-f]{{16}}\.(open|done|failed)-[0-9]+")
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_log = logging.getLogger("tritonspeed")


def check_tag(tag: str) -> str:
    """The tag, if a checkpoint can have it.

    Raises:
        ValueError: a path, a hidden name, a name that is taken, or one that is too long.
    """
    try:
        plain_name(tag)
    except ValueError as error:
        raise ValueError(f"tag {tag!r}: must be a plain name: no path, not empty, not '.' or '..'") from error
    if tag.startswith(".") or tag == LATEST:
        raise ValueError(f"tag {tag!r}: must not begin with a dot, nor be {LATEST!r}: these names have a meaning here")
    if not tag.isprintable() or tag != tag.strip() or len(tag.encode()) > MOST_TAG_BYTES:
        raise ValueError(f"tag {tag!r}: must be printable, without spaces around it, at most {MOST_TAG_BYTES} bytes")
    return tag


def hidden_name(tag: str, save_id: str, replaced: bool = False) -> str:
    """Name of a checkpoint's folder while it has no tag."""
    return f".{tag}.{save_id}" + (".replaced" if replaced else "")


# reading


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint at ``path``.

    Raises:
        CorruptCheckpoint: it has none, or a damaged one.
    """
    place = Path(path) / MANIFEST
    try:
        with open(place, "rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) > MOST_JSON_BYTES:
                raise CorruptCheckpoint(f"{place}: {size:,} bytes: this is no manifest")
            return parse_manifest(stream.read(), str(place))
    except OSError as error:
        raise CorruptCheckpoint(f"{place}: {error.strerror}: no checkpoint was committed here") from error


def committed(folder: str | os.PathLike[str]) -> list[tuple[Path, Manifest]]:
    """Checkpoints of ours in ``folder``, newest first; by when they were saved, then by step.

    One with a damaged manifest is left out, with a warning. Bytes are not checked here.
    """
    found = []
    for path in _whole(Path(folder)):
        try:
            found.append((path, read_manifest(path)))
        except CorruptCheckpoint as error:
            _log.warning("left out: %s", error)
    return sorted(found, key=lambda each: (each[1].time, each[1].step), reverse=True)


def latest_tag(folder: str | os.PathLike[str]) -> str | None:
    """What ``latest`` names; None where there is no such file, or it names nothing that could be a tag."""
    try:
        with open(Path(folder) / LATEST, encoding="utf-8") as stream:
            return check_tag(stream.read(4 * MOST_TAG_BYTES).strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s: cannot be used: %s", Path(folder) / LATEST, error)
        return None


def find(folder: str | os.PathLike[str], tag: str) -> Path:
    """The checkpoint of that tag.

    Raises:
        ValueError: ``tag`` cannot be one.
        CheckpointError: there is none; says which there are.
    """
    check_tag(tag)
    found = {_tag_of(path): path for path in _whole(Path(folder))}
    if tag not in found:
        there = ", ".join(sorted(found)) or "none"
        raise CheckpointError(f"{folder}: no checkpoint {tag!r} was committed here; there are: {there}")
    return found[tag]


def _tag_of(path: Path) -> str:
    hidden = _HIDDEN.fullmatch(path.name)
    return hidden["tag"] if hidden else path.name


def _has_manifest(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _hidden(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Folders of saves that have not ended, or ended halfway; the newest of a tag first, replaced ones last."""
    with suppress(FileNotFoundError):
        paths = [path for path in folder.iterdir() if path.name.startswith(".") and path.is_dir()]
        for path in sorted(paths, key=lambda path: (path.name.endswith(".replaced"), -_written_ns(path))):
            if match := _HIDDEN.fullmatch(path.name):
                yield path, match


def _written_ns(path: Path) -> int:
    with suppress(OSError):
        return (path / MANIFEST).stat().st_mtime_ns
    return 0


def _whole(folder: Path) -> list[Path]:
    """Folders with a manifest: visible ones, and a hidden one where a save died between two renamings."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".") and _has_manifest(path)]
    except FileNotFoundError:
        return []
    tags = {path.name for path in visible}
    for path, match in _hidden(folder):
        if match["tag"] not in tags and _has_manifest(path):
            tags.add(match["tag"])
            named = folder / match["tag"]  # perhaps it has just been renamed
            visible.append(named if _has_manifest(named) else path)
    return visible


# writing


def make_durably(folder: Path) -> None:
    """Make a folder and those above it that are missing, and sync the names of what was made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def write_latest(folder: str | os.PathLike[str], tag: str) -> None:
    """Make ``latest`` name ``tag``: the old one or the new one, whenever the machine stops."""
    write_durably(Path(folder) / LATEST, check_tag(tag).encode())
    sync_folder(Path(folder))


def remove(path: Path) -> None:
    """Delete a hidden folder, its manifest first: what is left after a stop is not taken for a checkpoint.

    That it is hidden has been synced.
    """
    if path.is_symlink():
        path.unlink()
        return
    with suppress(FileNotFoundError):
        (path / MANIFEST).unlink()
        sync_folder(path)
    shutil.rmtree(path, ignore_errors=True)


def check_place(folder: Path, tag: str) -> None:
    """Raises CheckpointError where a tag's place is taken by something that is not ours to replace."""
    path = folder / tag
    if os.path.lexists(path) and not _has_manifest(path) and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{path} is there and was not written by tritonspeed: remove it, or save under another tag or in another "
            "folder"
        )


def publish(folder: Path, hidden: Path, tag: str, save_id: str) -> Path | None:
    """Give a whole hidden checkpoint its tag: the commit. The folder is not synced.

    Returns:
        What had the tag until now, hidden; to be removed.
    """
    target, old = folder / tag, None
    if _has_manifest(target):
        old = folder / hidden_name(tag, save_id, replaced=True)
        os.rename(target, old)
    try:
        os.rename(hidden, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    return old


def clear(folder: Path) -> None:
    """End what saves that died have left; only for who holds the lock.

    One that was whole gets its tag, where the tag is free: its save died between two renamings. All else goes.
    """
    hidden = list(_hidden(folder))
    if hidden:
        sync_folder(folder)  # whoever hid them may have died before doing so
    for path, match in hidden:
        named = folder / match["tag"]
        if not os.path.lexists(named) and _has_manifest(path):
            try:
                read_manifest(path)
                os.rename(path, named)
                sync_folder(folder)
                _log.warning("%s: the save of it was cut off after it was whole; it has its name now", named)
                continue
            except CorruptCheckpoint as error:
                _log.warning("removed: %s", error)
        remove(path)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def prune(folder: Path, keep_last: int, written: str) -> None:
    """Remove all but the ``keep_last`` newest checkpoints.

    Never ``written``, nor what ``latest`` names, nor a copy or renamed one: somebody wants to keep that.
    """
    ours = [(path, made) for path, made in committed(folder) if path.name == made.tag and not path.is_symlink()]
    kept = {written, latest_tag(folder)}
    hidden = []
    for path, made in ours[keep_last:]:
        if path.name not in kept:
            hidden.append(folder / hidden_name(made.tag, made.save_id, replaced=True))
            os.rename(path, hidden[-1])
    if hidden:
        sync_folder(folder)
    for path in hidden:
        remove(path)


@dataclass(eq=False)
class Lock:
    """Who may write into the folder, for as long as this process lives or until ``release``.

    Attributes:
        descriptor: None where the file system knows no locks: nobody is kept out, and a warning has said so.
    """

    descriptor: int | None

    @classmethod
    def take(cls, folder: Path) -> Lock:
        """Take it.

        Raises:
            CheckpointBusy: another process has it; names it.
            OSError: the folder cannot be written.
        """
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "an unknown process"
            os.close(descriptor)
            raise CheckpointBusy(
                f"{folder}: {holder} is saving into this folder: wait for it, or save into another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: the file system knows no locks (%s): only one run may save here", folder, error.strerror)
            return cls(None)
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk has no room for a name
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        lock = cls(descriptor)
        _locks.add(lock)
        return lock

    def release(self) -> None:
        """Let others write."""
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close the descriptor; the lock itself lives as long as another process has it open."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_locks_to_parent() -> None:
    """A forked child (a data loader's worker) must not hold the folder beyond the life of the run."""
    for lock in list(_locks):
        lock.forget()


os.register_at_fork(after_in_child=_leave_locks_to_parent)
