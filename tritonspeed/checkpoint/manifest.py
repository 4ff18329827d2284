"""The JSON of a checkpoint: one manifest for all ranks, one index for each. See docs/checkpoint-format.md.

    manifest.json                who, when, which parameters, and the digest of every rank's index
    rank-0-of-2/index.json       the rank's files, what stands where in them, and a digest of every run of bytes

Both carry a digest of themselves. Whatever was read is checked, field by field, before anything is done with it: file
names are plain names, numbers are integers in bounds, intervals lie in order within what they are intervals of.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from tritonspeed.checkpoint.errors import CorruptCheckpoint
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.commit_record import digest_of
from tritonspeed.offload.page_file import DTYPES, whole_pages

FORMAT = "tritonspeed.checkpoint.1"
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.safetensors"
MOST_ELEMS = 2**53  # beyond it a JSON number is no exact integer
MOST_JSON_BYTES = 2**30
MOST_DIMENSIONS = 64  # of a tensor in PyTorch
MOST_SCALAR = sys.float_info.max
_PLAIN_NAME = re.compile(r"[^/\\\0]{1,255}")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can have it, and no name that is written or printed


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [lo, hi) of the flattened parameter ``name``; the first is element ``start`` of the flat."""

    name: str
    lo: int
    hi: int
    start: int


@dataclass(frozen=True)
class FileRecord:
    """One file of a rank.

    Attributes:
        file: its name in the rank's folder.
        bucket, kind, dtype, numel: of the flat.
        layout: which of the index's layouts says what stands where.
        begin: where the flat begins, in bytes.
        header: xxh3_64 of the bytes before that.
        digests: (lo, hi, xxh3_64) of runs of the flat, in bytes; together they are all of it.
    """

    file: str
    bucket: str
    kind: str
    dtype: torch.dtype
    numel: int
    layout: int
    begin: int
    header: str
    digests: tuple[tuple[int, int, str], ...]

    @property
    def file_bytes(self) -> int:
        """Header, flat and filler."""
        return self.begin + whole_pages(self.numel * self.dtype.itemsize)


@dataclass(frozen=True)
class RankIndex:
    """What one rank has written.

    Attributes:
        save_id: of the save that it belongs to.
        files, layouts: see ``FileRecord``.
        scalars: ({"step": 12.0}, the parameters that have these), the optimizer's numbers.
        state: the rank's own state, encoded; its tensors are in ``state.safetensors``.
        state_digest: xxh3_64 of that file; empty where there is none.
    """

    save_id: str
    rank: int
    world: int
    files: tuple[FileRecord, ...] = ()
    layouts: tuple[tuple[Interval, ...], ...] = ()
    scalars: tuple[tuple[dict[str, float], tuple[str, ...]], ...] = ()
    state: Any = None
    state_digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        tag: its name.
        save_id: of the save; every rank's index has it too.
        step: optimizer steps.
        time: UTC, ISO 8601.
        world: ranks.
        parameters: every parameter, by its first name.
        indexes: xxh3_64 of every rank's ``index.json``, by rank.
        facts: small things to know without reading on: versions, stage, precision, whether ``latest`` was to name it.
    """

    tag: str
    save_id: str
    step: int
    time: str
    world: int
    parameters: Mapping[str, ParameterFacts]
    indexes: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def rank_folder(rank: int, world: int) -> str:
    """Name of a rank's folder."""
    return f"rank-{rank}-of-{world}"


def _sealed(content: dict[str, Any]) -> str:
    """JSON with a digest of itself in front."""
    text = json.dumps({"digest": _digest(content), **content}, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def _digest(content: dict[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON."""
    parameters = {
        name: {
            "shape": list(facts.shape),
            "dtype": DTYPES[facts.dtype],
            "trainable": facts.trainable,
            **({"aliases": list(facts.aliases)} if facts.aliases else {}),
        }
        for name, facts in manifest.parameters.items()
    }
    return _sealed(
        {
            "format": FORMAT,
            "tag": manifest.tag,
            "save_id": manifest.save_id,
            "step": manifest.step,
            "time": manifest.time,
            "world": manifest.world,
            "facts": manifest.facts,
            "indexes": list(manifest.indexes),
            "parameters": parameters,
        }
    )


def index_text(index: RankIndex) -> str:
    """A rank's index as JSON."""
    files = [
        {
            "file": f.file,
            "bucket": f.bucket,
            "kind": f.kind,
            "dtype": DTYPES[f.dtype],
            "numel": f.numel,
            "layout": f.layout,
            "begin": f.begin,
            "header": f.header,
            "digests": [list(run) for run in f.digests],
        }
        for f in index.files
    ]
    return _sealed(
        {
            "format": FORMAT,
            "save_id": index.save_id,
            "rank": index.rank,
            "world": index.world,
            "files": files,
            "layouts": [[[i.name, i.lo, i.hi, i.start] for i in layout] for layout in index.layouts],
            "scalars": [[values, list(names)] for values, names in index.scalars],
            "state": index.state,
            "state_digest": index.state_digest,
        }
    )


# reading: nothing is taken on trust


class _Bad(ValueError):
    """What is wrong, within a file that the caller names."""


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """A manifest's JSON, checked.

    Args:
        where: for the error.

    Raises:
        CorruptCheckpoint: what is wrong with it.
    """
    try:
        content = _open(text)
        world = _integer(content, "world", 1, 2**20)
        parameters = {}
        for name, entry in _mapping(content["parameters"], "parameters").items():
            shape = tuple(_bounded(n, f"shape of {name!r}", 0) for n in _sequence(entry["shape"], "shape"))
            if len(shape) > MOST_DIMENSIONS:
                raise _Bad(f"{name!r} has {len(shape)} dimensions")
            _bounded(prod(shape), f"elements of {name!r}", 0)
            aliases = tuple(_text(a, "alias") for a in _sequence(entry.get("aliases", []), "aliases"))
            parameters[_text(name, "name")] = ParameterFacts(
                shape, _dtype(entry["dtype"]), _truth(entry["trainable"]), aliases
            )
        indexes = tuple(_matching(d, _DIGEST, "digest") for d in _sequence(content["indexes"], "indexes"))
        if len(indexes) != world:
            raise _Bad(f"{len(indexes)} indexes of {world} ranks")
        return Manifest(
            tag=_text(content["tag"], "tag"),
            save_id=_text(content["save_id"], "save_id"),
            step=_integer(content, "step", 0, MOST_ELEMS),
            time=_text(content["time"], "time"),
            world=world,
            parameters=parameters,
            indexes=indexes,
            facts=dict(_mapping(content["facts"], "facts")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{where}: the manifest is damaged: {_said(error)}") from error


def parse_index(text: str | bytes, where: str) -> RankIndex:
    """A rank's index, checked.

    Args:
        where: for the error.

    Raises:
        CorruptCheckpoint: what is wrong with it.
    """
    try:
        content = _open(text)
        layouts = tuple(_layout(each) for each in _sequence(content["layouts"], "layouts"))
        files = tuple(_file(each, layouts) for each in _sequence(content["files"], "files"))
        if len({f.file for f in files}) != len(files):
            raise _Bad("two files of one name")
        world = _integer(content, "world", 1, 2**20)
        digest = content["state_digest"]
        return RankIndex(
            save_id=_text(content["save_id"], "save_id"),
            rank=_integer(content, "rank", 0, world - 1),
            world=world,
            files=files,
            layouts=layouts,
            scalars=tuple(_numbers(each) for each in _sequence(content["scalars"], "scalars")),
            state=content["state"],
            state_digest=_matching(digest, _DIGEST, "digest") if digest else "",
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{where}: the index is damaged: {_said(error)}") from error


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)


def _open(text: str | bytes) -> dict[str, Any]:
    if len(text) > MOST_JSON_BYTES:
        raise _Bad(f"{len(text):,} bytes of JSON")
    content = json.loads(text, parse_constant=_no_constant)
    digest = _mapping(content, "the file").pop("digest", None)
    if digest != _digest(content):
        raise _Bad("its digest does not match")
    if content.get("format") != FORMAT:
        raise _Bad(f"format {content.get('format')!r}, this version reads {FORMAT!r}")
    return content


def _no_constant(text: str) -> Any:
    raise _Bad(f"{text} is no number of this format")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{what}: {type(value).__name__} where an object is expected")
    return value


def _sequence(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise _Bad(f"{what}: {type(value).__name__} where a list is expected")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or _HALF_A_PAIR.search(value):
        raise _Bad(f"{what}: {value!r:.80} where a text is expected")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad(f"{value!r:.40} where true or false is expected")
    return value


def _bounded(value: Any, what: str, low: int, high: int = MOST_ELEMS) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Bad(f"{what}: {value!r}, must be a whole number in [{low}, {high}]")
    return value


def _integer(content: Mapping[str, Any], key: str, low: int, high: int) -> int:
    return _bounded(content[key], key, low, high)


def _matching(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _Bad(f"{what}: {value!r}")
    return value


def plain_name(value: Any) -> str:
    """A file's name that leads nowhere else.

    Raises:
        ValueError: a path, an empty name, "." or "..".
    """
    name = _matching(value, _PLAIN_NAME, "not a plain file name")
    if _text(name, "file name") in (".", ".."):
        raise _Bad(f"not a plain file name: {name!r}")
    return name


def _dtype(value: Any) -> torch.dtype:
    for dtype, name in DTYPES.items():
        if name == value:
            return dtype
    raise _Bad(f"dtype {value!r} is none of {', '.join(DTYPES.values())}")


def _layout(value: Any) -> tuple[Interval, ...]:
    found, end = [], 0
    for each in _sequence(value, "layout"):
        name, lo, hi, start = _sequence(each, "interval")
        made = Interval(_text(name, "name"), _bounded(lo, "lo", 0), _bounded(hi, "hi", 0), _bounded(start, "start", 0))
        if not (made.lo <= made.hi and made.start >= end):
            raise _Bad(f"interval {each!r} does not follow element {end}")
        end = made.start + made.hi - made.lo
        found.append(made)
    return tuple(found)


def _file(value: Any, layouts: Sequence[tuple[Interval, ...]]) -> FileRecord:
    entry = _mapping(value, "file")
    name, dtype = plain_name(entry["file"]), _dtype(entry["dtype"])
    numel = _integer(entry, "numel", 0, MOST_ELEMS)
    layout = layouts[_integer(entry, "layout", 0, len(layouts) - 1)]
    if layout and layout[-1].start + layout[-1].hi - layout[-1].lo > numel:
        raise _Bad(f"{name}: its layout goes beyond its {numel} elements")
    begin = _integer(entry, "begin", 0, MOST_ELEMS)
    if begin % 4096:
        raise _Bad(f"{name}: begins at {begin}, not on a page")
    digests, end = [], 0
    for run in _sequence(entry["digests"], "digests"):
        lo, hi, digest = _sequence(run, "digest")
        if _bounded(lo, "lo", 0) != end or _bounded(hi, "hi", 1) <= lo:
            raise _Bad(f"{name}: run [{lo!r}, {hi!r}) does not follow byte {end}")
        end = hi
        digests.append((lo, hi, _matching(digest, _DIGEST, "digest")))
    if end != numel * dtype.itemsize:
        raise _Bad(f"{name}: digests of {end} bytes, it has {numel * dtype.itemsize}")
    return FileRecord(
        file=name,
        bucket=_text(entry["bucket"], "bucket"),
        kind=_text(entry["kind"], "kind"),
        dtype=dtype,
        numel=numel,
        layout=entry["layout"],
        begin=begin,
        header=_matching(entry["header"], _DIGEST, "digest"),
        digests=tuple(digests),
    )


def _numbers(value: Any) -> tuple[dict[str, float], tuple[str, ...]]:
    values, names = _sequence(value, "scalars")
    found = {}
    for key, number in _mapping(values, "scalars").items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= MOST_SCALAR:
            raise _Bad(f"scalar {key!r}: {number!r:.40} is no number of the format")
        found[key] = number
    return found, tuple(_text(name, "name") for name in _sequence(names, "names"))
