"""Checkpoints that real DeepSpeed has made, from the archive beside the tests; see fixtures/deepspeed/README.md."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint import Source
from tritonspeed.checkpoint.deepspeed.files import DeepSpeedCheckpoint
from tritonspeed.checkpoint.deepspeed.universal import UniversalCheckpoint

ARCHIVE = Path(__file__).parent / "fixtures/deepspeed/checkpoints.tar.xz"


def unpack(folder: Path) -> Path:
    """All cases, each a folder of its own."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Made:
    """One case: the checkpoint, and what must be read from it.

    Attributes:
        path: of the tag's folder.
        truth: {"master|name": ..., "exp_avg|name": ..., "parameters|name": ..., "buffer|name": ..., "batches": ...}.
        facts: losses before and after, scheduler, config.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.path = folder / "checkpoint" / (folder / "checkpoint" / self.latest).read_text().strip()
        self.truth: dict[str, Tensor] = torch.load(folder / "truth.pt", weights_only=True)
        self.facts: dict[str, Any] = json.loads((folder / "truth.json").read_text())

    @property
    def latest(self) -> str:
        """The file that names the tag."""
        return "latest_universal" if self.is_universal else "latest"

    @property
    def is_universal(self) -> bool:
        """Whether it went through ds_to_universal."""
        return self.name.endswith("-universal")

    def open(self, **settings: Any) -> Source:
        """The checkpoint as a source."""
        kind = UniversalCheckpoint if self.is_universal else DeepSpeedCheckpoint
        return kind(self.path, **settings)

    def values(self) -> dict[tuple[str, str], Tensor]:
        """(kind, name) → what it must be, without buffers."""
        parts = {tuple(key.split("|")): value for key, value in self.truth.items() if "|" in key}
        return {(kind, name): value for (kind, name), value in parts.items() if kind != "buffer"}
