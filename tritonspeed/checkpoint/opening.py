"""A checkpoint opened, whoever wrote it: what a folder is, is told by the files in it.

manifest.json                                          ours
*_model_states.pt, *_optim_states.pt                   DeepSpeed's, one file or more of each rank
zero/<parameter>/fp32.pt                               DeepSpeed's universal
latest, or a tag that is given                         the folder of checkpoints: one of the above is in it
model.safetensors, model.safetensors.index.json        weights alone
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tritonspeed.checkpoint.data_file import Verify
from tritonspeed.checkpoint.deepspeed.files import DeepSpeedCheckpoint
from tritonspeed.checkpoint.deepspeed.universal import LATEST, UniversalCheckpoint
from tritonspeed.checkpoint.errors import CorruptCheckpoint
from tritonspeed.checkpoint.folder import check_tag, committed, find, latest_tag
from tritonspeed.checkpoint.manifest import MANIFEST
from tritonspeed.checkpoint.plain import PlainWeights
from tritonspeed.checkpoint.source import Source
from tritonspeed.checkpoint.stored import StoredCheckpoint
from tritonspeed.zero.tensor_files import INDEX, SINGLE, some_names

OURS, DEEPSPEED, UNIVERSAL, PLAIN = "tritonspeed", "deepspeed", "universal", "huggingface"
NAMES = {
    OURS: "a checkpoint of tritonspeed",
    DEEPSPEED: "a checkpoint of DeepSpeed",
    UNIVERSAL: "a universal checkpoint of DeepSpeed",
    PLAIN: "plain weights",
}


def open_source(
    path: str | os.PathLike[str],
    tag: str | None = None,
    verify: Verify = "full",
    on_bytes: Callable[[int], None] | None = None,
) -> Source:
    """A checkpoint to read from.

    Args:
        path: of one checkpoint, of a folder of checkpoints, or of a ``.safetensors`` file.
        tag: which of a folder of checkpoints; None is the one that ``latest`` names.
        verify: of ours: which digests are compared.
        on_bytes: of ours: told of bytes as they are read.

    Raises:
        ValueError: there is no checkpoint; says what is there.
        CorruptCheckpoint: there is one, and it is damaged.
    """
    found = locate(Path(path), tag)
    kind = kind_of(found)
    if kind == OURS:
        return StoredCheckpoint(found, verify, on_bytes)
    if kind == DEEPSPEED:
        return DeepSpeedCheckpoint(found, verify)
    if kind == UNIVERSAL:
        return UniversalCheckpoint(found, verify)
    return PlainWeights(found)


def kind_of(path: Path) -> str | None:
    """What stands at ``path`` itself: one of ``NAMES``, or None."""
    if path.is_file():
        return PLAIN if path.name.endswith((".safetensors", ".safetensors.index.json")) else None
    if (path / MANIFEST).exists():
        return OURS
    if next(path.glob("*_model_states.pt"), None) or next(path.glob("*_optim_states.pt"), None):
        return UNIVERSAL if (path / "zero").is_dir() else DEEPSPEED
    if next(path.glob("zero/*/fp32.pt"), None):
        return UNIVERSAL
    return PLAIN if (path / SINGLE).exists() or (path / INDEX).exists() else None


def locate(path: Path, tag: str | None = None) -> Path:
    """The one checkpoint that is meant: a folder, or a file.

    Raises:
        ValueError: there is none; says what is there.
        CorruptCheckpoint: the one that is named, by ``tag`` or by ``latest``, is not there.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}: name a checkpoint, a folder of checkpoints, or a .safetensors file")
    kind = kind_of(path)
    if tag is None and (kind in (OURS, DEEPSPEED, UNIVERSAL) or path.is_file()):
        if kind is None:
            raise ValueError(_no_file(path))
        return path
    named = tag if tag is not None else _latest(path)
    if named is None:
        if kind == PLAIN:
            return path
        raise ValueError(_nothing(path))
    inner = path / check_tag(named)
    if inner.is_dir() and kind_of(inner) is not None:
        return inner
    if any(manifest.tag == named for _, manifest in committed(path)):
        return find(path, named)  # its save died between two renamings
    if tag is None and kind == PLAIN:
        return path
    said = f"the tag {named!r}" if tag is not None else f"'latest' of {path} names {named!r}, which"
    there = _tags(path)
    raise CorruptCheckpoint(
        f"{said} is no checkpoint in {path}: {_contents(inner)}; checkpoints there: {some_names(there) or 'none'}"
    )


def _latest(path: Path) -> str | None:
    """What a folder of checkpoints names; a universal one where there is no other."""
    found = latest_tag(path)
    return latest_universal(path) if found is None and (path / LATEST).is_file() else found


def latest_universal(path: Path) -> str:
    """The tag that a folder of checkpoints names for DeepSpeed's ``load_universal``."""
    return check_tag((path / LATEST).read_bytes()[:4096].decode(errors="replace").strip())


def _tags(path: Path) -> list[str]:
    """Names of checkpoints in a folder."""
    return sorted(each.name for each in path.iterdir() if each.is_dir() and kind_of(each) not in (None, PLAIN))


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "there is no such folder"
    return f"it has {some_names(sorted(each.name for each in path.iterdir())) or 'nothing'}"


def _no_file(path: Path) -> str:
    remedy = "name a folder, or a .safetensors file"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        remedy = f"a {path.suffix} file of weights is pickle, which is not read: save it with safetensors first"
    return f"{path} is no checkpoint: {remedy}"


def _nothing(path: Path) -> str:
    tags = _tags(path)
    if tags:
        return f"{path} has no 'latest' that names one of its checkpoints, {some_names(tags)}: name one of them (tag)"
    return (
        f"{path} is no checkpoint: {_contents(path)}. Expected is a folder with {MANIFEST} (tritonspeed's), "
        f"*_model_states.pt (DeepSpeed's), zero/ (its universal), {SINGLE} or {INDEX} (weights), or 'latest' beside "
        "such folders"
    )
