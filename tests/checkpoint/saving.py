"""What the tests of saving share: small jobs whose values say which step they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from tritonspeed.checkpoint.folder import committed
from tritonspeed.checkpoint.manifest import INDEX, MANIFEST, STATE, RankIndex, parse_index, rank_folder
from tritonspeed.checkpoint.record import Record
from tritonspeed.checkpoint.saver import Job
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.comm.mesh import Mesh
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.page_file import PageFile, Piece, read_header

WHOLE = {"a.weight": (30, 50), "b.bias": (333,), "c": ()}
KINDS = ("master", "exp_avg")


def mesh_of_one(rank: int = 0, world: int = 1, timeout_s: float = 20) -> Mesh:
    return Mesh(rank, world, torch.device("cpu"), "none", timeout_s=timeout_s)


def whole_flat(kind: str, step: int) -> torch.Tensor:
    """All ranks' values of a kind, padded to whole pages per rank."""
    numel = sum(torch.Size(shape).numel() for shape in WHOLE.values())
    flat = torch.zeros(-(-numel // 4096) * 4096)
    flat[:numel] = torch.arange(numel) * (1 + KINDS.index(kind)) + 7 * step
    return flat


def pieces_of(lo: int, hi: int) -> tuple[Piece, ...]:
    """What of the parameters is in elements [lo, hi) of the whole flat."""
    found, at = [], 0
    for name, shape in WHOLE.items():
        numel = torch.Size(shape).numel()
        first, last = max(at, lo), min(at + numel, hi)
        if first < last:
            found.append(Piece.of(name, shape, first - lo, first - at, last - at))
        at += numel
    return tuple(found)


def job(folder: Path, step: int, rank: int = 0, world: int = 1, **changes: Any) -> Job:
    """A rank's slice of two kinds of one bucket, and some state."""
    records = []
    for kind in KINDS:
        flat = whole_flat(kind, step)
        share = -(-flat.numel() // world)
        lo, hi = rank * share, min((rank + 1) * share, flat.numel())
        own = flat[lo:hi]
        file = PageFile("layers.0", kind, torch.float32, hi - lo, pieces_of(lo, hi), rank, world)
        records.append(Record(file, lambda i, j, own=own: own[i:j]))
    values = {
        "folder": folder,
        "tag": f"global_step{step}",
        "records": records,
        "scalars": [({"step": float(step)}, tuple(WHOLE))],
        "state": {"rank": rank, "seen": torch.tensor([step, rank])},
        "parameters": {name: ParameterFacts(shape, torch.float32) for name, shape in WHOLE.items()},
        "step": step,
    }
    return Job(**{**values, **changes})


def index_of(path: Path, rank: int, world: int) -> RankIndex:
    return parse_index((path / rank_folder(rank, world) / INDEX).read_bytes(), str(path))


def checked(path: Path) -> int:
    """The step of a committed checkpoint, after every byte of it was compared; by the specification, not our reader."""
    manifest = next(made for found, made in committed(path.parent) if found == path)
    seen: dict[str, list[torch.Tensor]] = {}
    for rank, digest in enumerate(manifest.indexes):
        own = path / rank_folder(rank, manifest.world)
        assert digest_of((own / INDEX).read_bytes()) == digest, f"{own}: index"
        index = index_of(path, rank, manifest.world)
        assert index.save_id == manifest.save_id and (index.rank, index.world) == (rank, manifest.world)
        assert {p.name for p in own.iterdir()} == {f.file for f in index.files} | {INDEX, STATE}
        assert digest_of((own / STATE).read_bytes()) == index.state_digest
        (seen_by,) = load((own / STATE).read_bytes()).values()
        assert seen_by.tolist() == [manifest.step, rank]
        for file in index.files:
            content = (own / file.file).read_bytes()
            assert len(content) == file.file_bytes and digest_of(content[: file.begin]) == file.header
            assert read_header(own / file.file)[1] == file.begin
            for lo, hi, wanted in file.digests:
                assert digest_of(content[file.begin + lo : file.begin + hi]) == wanted, f"{file.file} [{lo}, {hi})"
            flat = torch.frombuffer(bytearray(content[file.begin :]), dtype=file.dtype)[: file.numel]
            seen.setdefault(file.kind, []).append(flat)
    for kind in KINDS:
        assert torch.equal(torch.cat(seen[kind]), whole_flat(kind, manifest.step)), f"{kind} of {path}"
    assert (path / MANIFEST).is_file()
    return manifest.step
