"""Which checkpoints of a folder to try, in order."""

from __future__ import annotations

import logging
from pathlib import Path

from tritonspeed.checkpoint.deepspeed.universal import LATEST
from tritonspeed.checkpoint.errors import CheckpointError
from tritonspeed.checkpoint.folder import check_tag, committed, find, latest_tag
from tritonspeed.checkpoint.manifest import MANIFEST
from tritonspeed.checkpoint.opening import DEEPSPEED, PLAIN, UNIVERSAL, kind_of, latest_universal

log = logging.getLogger("tritonspeed")


def candidates(folder: Path, tag: str | None = None) -> list[Path]:
    """Checkpoints to try, the best first; empty where there is none.

    A tag that was named is the only one. Otherwise what ``latest`` names comes first, then ours from the newest to the
    oldest, of those that ``latest`` has named. A folder that is a checkpoint itself is taken as it is.

    Raises:
        CheckpointError: there is none with the tag that was named; says which there are.
    """
    if tag is not None:
        try:
            return [find(folder, tag)]
        except CheckpointError:
            if (folder / check_tag(tag)).is_dir():
                return [folder / tag]  # another format's; or damaged, as whoever opens it will say
            raise
    if (folder / MANIFEST).exists() or kind_of(folder) in (DEEPSPEED, UNIVERSAL):
        return [folder]
    ours = [path for path, manifest in committed(folder) if manifest.facts.get("latest", True)]
    latest = latest_tag(folder)
    if latest is None and not ours and (folder / LATEST).is_file():
        return candidates(folder, latest_universal(folder))
    if latest is None:
        if not (folder / "latest").exists() and not ours:
            return [folder] if kind_of(folder) == PLAIN else []
        log.warning("%s: 'latest' is missing or names nothing; the newest checkpoint is taken", folder)
        return ours
    try:
        first = candidates(folder, latest)
    except CheckpointError:
        log.warning("%s: 'latest' names %r, which is not there; the newest that is there is taken", folder, latest)
        first = []
    return [*first, *(path for path in ours if path not in first)]
