"""Small files and names that survive a power cut."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file under another name, sync it and rename it: whoever opens it finds all of it.

    Its folder is not synced.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, content)
        os.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it, neither at once nor its name."""
    with open(path, "wb", buffering=0) as stream:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(stream.fileno(), rest) :]
        os.fsync(stream.fileno())
