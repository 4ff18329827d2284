"""Saving: what is committed is whole, and a save that fails leaves what was there."""

from __future__ import annotations

import torch
from safetensors import safe_open
from saving import KINDS, WHOLE, checked, index_of, job, mesh_of_one, whole_flat

from tritonspeed.checkpoint.folder import committed, find, latest_tag
from tritonspeed.checkpoint.manifest import rank_folder
from tritonspeed.checkpoint.save import Saver
from tritonspeed.comm.mesh import mesh_of


def test_what_is_saved_is_plain_safetensors(tmp_path):
    path = Saver(mesh_of_one()).save(job(tmp_path, 3))
    assert path == tmp_path / "global_step3" and checked(path) == 3
    assert latest_tag(tmp_path) == "global_step3" and find(tmp_path, "global_step3") == path
    for kind in KINDS:
        flat, at = whole_flat(kind, 3), 0
        with safe_open(path / "rank-0-of-1" / f"layers.0.{kind}.safetensors", "pt") as file:
            for name, shape in WHOLE.items():
                numel = torch.Size(shape).numel()
                assert torch.equal(file.get_tensor(name), flat[at : at + numel].view(shape))
                at += numel
    index = index_of(path, 0, 1)
    assert index.scalars == (({"step": 3.0}, tuple(WHOLE)),)
    assert [i.name for i in index.layouts[0]] == list(WHOLE) and len(index.layouts) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"latest", ".lock", "global_step3"}


def saves(folder, steps):
    mesh = mesh_of()
    saver = Saver(mesh)
    for step in steps:
        path = saver.save(job(folder, step, mesh.rank, mesh.world))
    return str(path)


def test_every_rank_writes_its_slice(tmp_path, ranks):
    paths = ranks(3, saves, tmp_path, [1, 2])
    assert paths == [str(tmp_path / "global_step2")] * 3
    assert [checked(path) for path, _ in committed(tmp_path)] == [2, 1]
    assert {p.name for p in (tmp_path / "global_step2").iterdir()} == {
        "manifest.json",
        *(rank_folder(rank, 3) for rank in range(3)),
    }
