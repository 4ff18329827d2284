"""Weights alone, as Hugging Face keeps them, as a checkpoint to read from.

fp32 values are masters, 16-bit ones are parameters: nobody can know more of them than they say. What is no
floating-point number is a buffer. A file does not say which of its tensors a model registers as a buffer otherwise, or
trains: every other tensor counts as a trained parameter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.errors import CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.record import MASTER, PARAMETERS
from tritonspeed.checkpoint.source import ParameterFacts, RunFacts
from tritonspeed.zero.tensor_files import TensorFiles

_MASTERS = (torch.float32, torch.float64)


class PlainWeights:
    """A ``Source`` over safetensors files. They have no digests: what is checked are sizes.

    Args:
        path: a ``.safetensors`` file, an index of several, or the folder with either.

    Raises:
        CorruptCheckpoint: there are no such files, or they are damaged; which, and why.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.facts = Path(path), RunFacts()
        try:
            self._files = TensorFiles(path)
        except (ValueError, OSError) as error:
            raise CorruptCheckpoint(str(error)) from error
        entries = self._files.entries
        self.parameters: Mapping[str, ParameterFacts] = {
            name: ParameterFacts(e.shape, e.dtype) for name, e in entries.items() if e.dtype.is_floating_point
        }
        self._buffers = [name for name in entries if name not in self.parameters]

    def kinds(self, name: str) -> frozenset[str]:
        """Its values, of one kind or the other.

        Raises:
            MismatchedCheckpoint: there is no such parameter.
        """
        if name not in self.parameters:
            raise MismatchedCheckpoint(f"{self.path} has no parameter {name!r}")
        return frozenset({MASTER if self.parameters[name].dtype in _MASTERS else PARAMETERS})

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened parameter, (hi - lo,), on the CPU.

        Raises:
            MismatchedCheckpoint: there is no such parameter, or it has nothing of that kind.
            CorruptCheckpoint: the file has become shorter.
        """
        if kind not in self.kinds(name):
            raise MismatchedCheckpoint(f"{self.path} has no {kind} of {name!r}: these are weights alone")
        return self._read(name, lo, hi)

    def read_own(self, kind: str, rank: int, name: str, lo: int, hi: int) -> Tensor | None:
        """None: there were no ranks."""
        return None

    def scalars(self, name: str) -> Mapping[str, float]:
        """Empty: there was no optimizer."""
        return {}

    def rank_state(self, rank: int) -> dict[str, Any]:
        """ "buffers", where there are any, for every rank."""
        if not self._buffers:
            return {}
        entries = self._files.entries
        return {"buffers": {n: self._read(n, 0, entries[n].numel).view(entries[n].shape) for n in self._buffers}}

    def close(self) -> None:
        """Nothing is open between reads."""

    def _read(self, name: str, lo: int, hi: int) -> Tensor:
        numel = self._files.entries[name].numel
        if not 0 <= lo <= hi <= numel:
            raise ValueError(f"[{lo}, {hi}) of {name!r}, which has {numel} elements")
        try:
            return self._files.read(name, lo, hi)
        except (ValueError, OSError) as error:
            raise CorruptCheckpoint(str(error)) from error
