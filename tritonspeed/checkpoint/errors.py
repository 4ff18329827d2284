"""What can be wrong with a checkpoint, by what is to be done about it."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the text says which file, why, and what to do."""


class CorruptCheckpoint(CheckpointError):
    """The bytes are not what was written, or this never was a checkpoint: take an older one."""


class MismatchedCheckpoint(CheckpointError, ValueError):
    """A good checkpoint of something else than this model, optimizer or run."""


class CheckpointBusy(CheckpointError):
    """Another process is saving into this folder."""


class SaveFailed(CheckpointError):
    """Nothing was committed; what was there before is untouched. The text names the rank and the reason."""
