"""A disk that loses power: a log of the system calls that change a folder, played back as far as a cut would let them.

What was synced is there: of a file its bytes, of a folder its entries. Of the rest, any: 512-byte sectors of writes,
and names that came, went or changed.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

CALLS = ("pwritev", "pwrite", "write", "posix_fallocate", "fdatasync", "fsync")
NAME_CALLS = ("rename", "link", "unlink", "mkdir", "rmdir")
SECTOR_BYTES = 512

Entries = dict[tuple[int, str], int]  # (folder, name) → a file or a folder, by number


class Log:
    """Every call that changes what is under ``root``, in order, and what was there before the first of them.

    Attributes:
        events: the calls; ("acknowledged", number) is for the caller to add.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._numbers: dict[int, int] = {}  # inode → number; the system gives inodes of deleted files to new ones
        self._folders: set[int] = set()
        self._count = 0
        self._files: dict[int, bytes] = {}
        self._entries: Entries = {}
        self._root = self._new(root.stat().st_ino)
        self._folders.add(self._root)
        for path in sorted(root.rglob("*")):
            number = self._new(path.stat().st_ino)
            self._entries[self._numbers[path.parent.stat().st_ino], path.name] = number
            if path.is_dir():
                self._folders.add(number)
            else:
                self._files[number] = path.read_bytes()
        self._really = {name: getattr(os, name) for name in CALLS + NAME_CALLS}
        for name in CALLS + NAME_CALLS:
            monkeypatch.setattr(os, name, getattr(self, name))

    def _new(self, inode: int) -> int:
        self._count += 1
        self._numbers[inode] = self._count
        return self._count

    def _of(self, descriptor: int) -> int:
        """The number of an open file; one that is new is entered under its name."""
        inode = os.fstat(descriptor).st_ino
        if inode not in self._numbers:
            folder, name = self._place(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.events.append(("enter", folder, name, self._new(inode)))
        return self._numbers[inode]

    def _place(self, path: str | Path, dir_fd: int | None = None) -> tuple[int, str]:
        folder = os.fstat(dir_fd).st_ino if dir_fd is not None else Path(path).parent.stat().st_ino
        return self._numbers[folder], Path(path).name

    def _forget(self, path: str | Path, dir_fd: int | None = None) -> None:
        """A name goes, and may be the last one."""
        if os.access(path, os.F_OK, dir_fd=dir_fd):
            found = os.stat(path, dir_fd=dir_fd)
            if found.st_nlink == 1:
                self._numbers.pop(found.st_ino, None)

    def pwritev(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.events.append(("write", self._of(descriptor), offset, bytes(buffers[0])))
        return self._really["pwritev"](descriptor, buffers, offset)

    def pwrite(self, descriptor: int, content: bytes, offset: int) -> int:
        self.events.append(("write", self._of(descriptor), offset, bytes(content)))
        return self._really["pwrite"](descriptor, content, offset)

    def write(self, descriptor: int, content: memoryview) -> int:
        number = self._of(descriptor)
        self.events.append(("write", number, os.lseek(descriptor, 0, os.SEEK_CUR), bytes(content)))
        return self._really["write"](descriptor, content)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        self.events.append(("write", self._of(descriptor), offset, bytes(length)))
        self._really["posix_fallocate"](descriptor, offset, length)

    def fdatasync(self, descriptor: int) -> None:
        self._really["fdatasync"](descriptor)
        self.events.append(("sync", self._of(descriptor)))

    def fsync(self, descriptor: int) -> None:
        self._really["fsync"](descriptor)
        self.events.append(("sync", self._of(descriptor)))

    def rename(self, source: Path, target: Path) -> None:
        (folder, name), (same, new_name) = self._place(source), self._place(target)
        assert folder == same, f"{source} is renamed into another folder"
        event = ("rename", folder, name, new_name, self._numbers[os.stat(source).st_ino])
        self._forget(target)
        self._really["rename"](source, target)
        self.events.append(event)

    def link(self, source: Path, target: Path) -> None:
        self._really["link"](source, target)
        self.events.append(("enter", *self._place(target), self._numbers[os.stat(source).st_ino]))

    def unlink(self, path: Path, *, dir_fd: int | None = None) -> None:
        event = ("leave", *self._place(path, dir_fd))
        self._forget(path, dir_fd)
        self._really["unlink"](path, dir_fd=dir_fd)
        self.events.append(event)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._really["mkdir"](path, mode)
        self.events.append(("enter", *self._place(path), self._new(os.stat(path).st_ino)))
        self._folders.add(self._count)

    def rmdir(self, path: Path, *, dir_fd: int | None = None) -> None:
        event = ("leave", *self._place(path, dir_fd))
        inode = os.stat(path, dir_fd=dir_fd).st_ino
        self._really["rmdir"](path, dir_fd=dir_fd)
        del self._numbers[inode]
        self.events.append(event)

    def play(self, num_events: int, random_: random.Random, loses_syncs: bool = False) -> tuple[dict[str, bytes], int]:
        """({path: contents} after a cut behind so many events, the last acknowledged number)."""
        files = {number: bytearray(content) for number, content in self._files.items()}
        entries, acknowledged = dict(self._entries), 0
        writes: list[tuple[Any, ...]] = []  # not synced yet
        names: list[tuple[Any, ...]] = []
        for event in self.events[:num_events]:
            if event[0] == "write":
                writes += _sectors(*event[1:])
            elif event[0] == "sync" and not loses_syncs:
                for part in [part for part in writes if part[0] == event[1]]:
                    _put(files, *part)
                for change in [change for change in names if change[1] == event[1]]:
                    _change(entries, *change)
                writes = [part for part in writes if part[0] != event[1]]
                names = [change for change in names if change[1] != event[1]]
            elif event[0] in ("enter", "rename", "leave"):
                names.append(event)
            elif event[0] == "acknowledged":
                acknowledged = event[1]
        share = random_.choice((0.0, 0.5, 1.0))
        for part in writes:
            if random_.random() < share:
                _put(files, *part)
        share = random_.choice((0.0, 0.5, 1.0))
        for change in names:
            if random_.random() < share:
                _change(entries, *change)
        return self._tree(entries, files), acknowledged

    def _tree(self, entries: Entries, files: dict[int, bytearray]) -> dict[str, bytes]:
        """Paths from the root on; what no path leads to is gone."""
        found: dict[str, bytes] = {}

        def walk(folder: int, above: str) -> None:
            for (parent, name), number in entries.items():
                if parent == folder and number in self._folders:
                    walk(number, f"{above}{name}/")
                elif parent == folder:
                    found[above + name] = bytes(files.get(number, b""))

        walk(self._root, "")
        return found


def _sectors(number: int, offset: int, content: bytes) -> list[tuple[int, int, bytes]]:
    starts = range(0, len(content), SECTOR_BYTES)
    return [(number, offset + i, content[i : i + SECTOR_BYTES]) for i in starts]


def _change(entries: Entries, what: str, folder: int, name: str, *more: Any) -> None:
    if what == "enter":
        entries[folder, name] = more[0]
        return
    entries.pop((folder, name), None)
    if what == "rename":
        target, number = more
        entries[folder, target] = number


def _put(files: dict[int, bytearray], number: int, offset: int, content: bytes) -> None:
    file = files.setdefault(number, bytearray())
    file.extend(bytes(max(0, offset + len(content) - len(file))))
    file[offset : offset + len(content)] = content


def rebuilt(root: Path, files: dict[str, bytes]) -> Path:
    """What is left, on a disk."""
    root.mkdir()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
