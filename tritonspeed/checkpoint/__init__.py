"""Checkpoints: plain safetensors for any number of ranks, stage and tier, committed whole or not at all.

    ts.checkpoint.save(model, folder), ts.checkpoint.load(model, folder)      without an engine; verify(folder)

    record     one flat run of values that a rank has to save       manifest   the JSON beside the files
    source     a checkpoint to read from, whoever wrote it          errors     what can be wrong with one

The format is specified in docs/checkpoint-format.md.
"""

from tritonspeed.checkpoint.errors import (
    CheckpointBusy,
    CheckpointError,
    CorruptCheckpoint,
    MismatchedCheckpoint,
    SaveFailed,
)
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.sharded import load, save
from tritonspeed.checkpoint.source import ParameterFacts, RunFacts, Source
from tritonspeed.checkpoint.stored import StoredCheckpoint, verify

__all__ = [
    "CheckpointBusy",
    "CheckpointError",
    "CorruptCheckpoint",
    "MismatchedCheckpoint",
    "ParameterFacts",
    "Record",
    "RunFacts",
    "SaveFailed",
    "Source",
    "StoredCheckpoint",
    "load",
    "save",
    "verify",
]
