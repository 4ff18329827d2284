"""A checkpoint in our format made by hand: text, headers and bytes, without the code that saves."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tritonspeed.checkpoint import ParameterFacts
from tritonspeed.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    STATE,
    FileRecord,
    Interval,
    Manifest,
    RankIndex,
    index_text,
    manifest_text,
    rank_folder,
)
from tritonspeed.checkpoint.record import OUTBOX
from tritonspeed.checkpoint.tree import encode
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.page_file import PageFile, Piece, header_bytes, whole_pages


@dataclass
class Rank:
    """What one rank writes: flats as (bucket, kind, dtype, intervals with values), and its state."""

    flats: list[tuple[str, str, list[tuple[str, int, int, Tensor]]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    scalars: list[tuple[dict[str, float], tuple[str, ...]]] = field(default_factory=list)


def cut(numel: int, world: int, rng: random.Random) -> list[int]:
    """[0, ..., numel]: where ``world`` ranks' parts end, any of them possibly nothing."""
    return [0, *sorted(rng.randint(0, numel) for _ in range(world - 1)), numel]


def write(
    path: Path,
    parameters: Mapping[str, ParameterFacts],
    ranks: Sequence[Rank],
    *,
    run_bytes: int = 4096,
    gap: int = 0,
    step: int = 7,
) -> Path:
    """Write it whole.

    Args:
        run_bytes: of what one digest is of.
        gap: elements of padding between two parameters, and behind the last.
    """
    path.mkdir(parents=True)
    indexes = []
    for rank, content in enumerate(ranks):
        folder = path / rank_folder(rank, len(ranks))
        folder.mkdir()
        files, layouts = [], []
        for bucket, kind, parts in content.flats:
            file, flat, layout = _flat(bucket, kind, parts, parameters, (rank, len(ranks)), gap)
            name = f"{bucket}.{kind}.safetensors"
            header, data = header_bytes(file), flat.view(torch.uint8).numpy().tobytes()
            (folder / name).write_bytes(header + data + bytes(whole_pages(len(data)) - len(data)))
            runs = [
                (lo, min(lo + run_bytes, len(data)), digest_of(data[lo : lo + run_bytes]))
                for lo in range(0, len(data), run_bytes)
            ]
            if layout not in layouts:
                layouts.append(layout)
            at = layouts.index(layout)
            files.append(
                FileRecord(name, bucket, kind, file.dtype, file.numel, at, len(header), digest_of(header), tuple(runs))
            )
        state, tensors = encode(content.state, "state")
        if tensors:
            (folder / STATE).write_bytes(save(tensors))
        index = RankIndex(
            "save-1",
            rank,
            len(ranks),
            tuple(files),
            tuple(layouts),
            tuple(content.scalars),
            state,
            digest_of((folder / STATE).read_bytes()) if tensors else "",
        )
        (folder / INDEX).write_text(index_text(index))
        indexes.append(digest_of((folder / INDEX).read_bytes()))
    manifest = Manifest(
        f"global_step{step}", "save-1", step, "2026-01-01T00:00:00+00:00", len(ranks), parameters, tuple(indexes)
    )
    (path / MANIFEST).write_text(manifest_text(manifest))
    return path


def _flat(
    bucket: str,
    kind: str,
    parts: list[tuple[str, int, int, Tensor]],
    parameters: Mapping[str, ParameterFacts],
    of: tuple[int, int],
    gap: int,
) -> tuple[PageFile, Tensor, tuple[Interval, ...]]:
    pieces, layout, values, end = [], [], [], 0
    for name, lo, hi, part in parts:
        pieces.append(Piece.of(name, parameters[name].shape, end, lo, hi))
        layout.append(Interval(name, lo, hi, end))
        values += [part, torch.zeros(gap, dtype=part.dtype)]
        end += hi - lo + gap
    flat = torch.cat(values) if values else torch.zeros(0)
    return PageFile(bucket, kind, flat.dtype, flat.numel(), tuple(pieces), *of), flat, tuple(layout)


def spread(values: Mapping[str, Mapping[str, Tensor]], world: int, rng: random.Random, buckets: int = 2) -> list[Rank]:
    """Every (kind, parameter) cut unevenly over ranks; parameters dealt into buckets.

    Args:
        values: {kind: {parameter: its flattened values}}; of an outbox every rank has all, times its rank + 1.
    """
    ranks = [Rank() for _ in range(world)]
    for kind, tensors in values.items():
        names = sorted(tensors)
        for bucket in range(buckets):
            dealt = names[bucket::buckets]
            cuts = {name: cut(tensors[name].numel(), world, rng) for name in dealt}
            for rank, content in enumerate(ranks):
                parts = []
                for name in dealt:
                    lo, hi = (0, cuts[name][-1]) if kind == OUTBOX else cuts[name][rank : rank + 2]
                    if hi > lo:
                        part = tensors[name][lo:hi]
                        parts.append((name, lo, hi, part * (rank + 1) if kind == OUTBOX else part))
                if parts:
                    content.flats.append((f"bucket{bucket}", kind, parts))
    return ranks
