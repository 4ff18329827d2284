"""A checkpoint of ours to read from, written by any number of ranks, whatever the reader's.

The indexes of all ranks together say where each element of a parameter is. A read joins what it needs from the files
of several ranks; bytes are compared with their digests before they are given.

    weight     |0                                  12,000|        a parameter of 12,000 elements
    on disk    |--- rank 0 ---|--- rank 1 ---|- rank 2 --|        saved by three ranks
    read       |         wanted [3,000, 9,000)  |                 by one of two
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.blocks import Blocks
from tritonspeed.checkpoint.data_file import DataFile, Verify, read_whole
from tritonspeed.checkpoint.errors import CheckpointError, CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    MOST_JSON_BYTES,
    STATE,
    RankIndex,
    parse_index,
    parse_manifest,
    rank_folder,
)
from tritonspeed.checkpoint.places import Place, find_places, within
from tritonspeed.checkpoint.record import GRADIENT, MASTER, OUTBOX, PARAMETERS
from tritonspeed.checkpoint.run_facts import run_facts
from tritonspeed.checkpoint.source import ParameterFacts, RunFacts
from tritonspeed.checkpoint.state_file import check_safetensors, digest_of_file, read_state_tensors
from tritonspeed.checkpoint.tree import decode
from tritonspeed.offload.commit_record import digest_of

RUN = "run"  # where a rank's state has the fields of RunFacts


class StoredCheckpoint:
    """A ``Source`` over one checkpoint's folder. All ranks' indexes are read now, values when they are asked for.

    Args:
        path: of the checkpoint: the folder with ``manifest.json``.
        verify: "full" compares the digest of every run of bytes that is read; "sampled" those of headers, of each
            file's first run and of every eighth; "none" looks at the sizes of files alone.
        on_bytes: told of bytes as they are read.

    Attributes:
        manifest: what the checkpoint says of itself.
        parameters: by first name; an alias is found too, where a name is asked for.
        total_bytes: of all flats of all ranks.

    Raises:
        CorruptCheckpoint: there is no whole checkpoint; which file, and why.
        CheckpointError: the system does not let it be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], verify: Verify = "full", on_bytes: Callable[[int], None] | None = None
    ) -> None:
        if verify not in ("full", "sampled", "none"):
            raise ValueError(f"verify is {verify!r}, must be 'full', 'sampled' or 'none'")
        self.path = Path(path)
        self.verify: Verify = verify
        where = self.path / MANIFEST
        self.manifest = parse_manifest(read_whole(where, MOST_JSON_BYTES), str(where))
        self.parameters: Mapping[str, ParameterFacts] = self.manifest.parameters
        self._first_names = _first_names(self.parameters, str(where))
        self.indexes = [self._index(rank) for rank in range(self.manifest.world)]
        self.files = [self._files_of(index) for index in self.indexes]
        self._places, self._outbox = find_places(self.files, self.parameters, str(self.path))
        self._kinds = self._kinds_of_all()
        self._scalars = self._numbers()
        self._blocks = Blocks(on_bytes=on_bytes)
        self._states: dict[int, dict[str, Any]] = {}

    @property
    def total_bytes(self) -> int:
        """Of all flats of all ranks."""
        return sum(file.record.numel * file.record.dtype.itemsize for files in self.files for file in files)

    # what there is

    def _folder(self, rank: int) -> Path:
        return self.path / rank_folder(rank, self.manifest.world)

    def _index(self, rank: int) -> RankIndex:
        """A rank's index, which must be the one that the manifest was written for."""
        folder = self._folder(rank)
        try:
            found = os.lstat(folder).st_mode
        except OSError as error:
            raise CorruptCheckpoint(f"{folder} is missing: {error.strerror}") from error
        if not stat.S_ISDIR(found):
            raise CorruptCheckpoint(f"{folder} is no folder, or a link to one elsewhere")
        content = read_whole(folder / INDEX, MOST_JSON_BYTES)
        if digest_of(content) != self.manifest.indexes[rank]:
            raise CorruptCheckpoint(f"{folder / INDEX} is not the one that {MANIFEST} was written for")
        index = parse_index(content, str(folder / INDEX))
        said = (index.save_id, index.rank, index.world)
        wanted = (self.manifest.save_id, rank, self.manifest.world)
        if said != wanted:
            raise CorruptCheckpoint(f"{folder / INDEX} is of (save, rank, world) {said}, expected {wanted}")
        return index

    def _files_of(self, index: RankIndex) -> list[DataFile]:
        folder, where = self._folder(index.rank), self._folder(index.rank) / INDEX
        for layout in index.layouts:
            for i in layout:
                facts = self.parameters.get(i.name)
                if facts is None or i.hi > prod(facts.shape):
                    known = "is no parameter of" if facts is None else f"has {prod(facts.shape)} elements in"
                    raise CorruptCheckpoint(f"{where}: [{i.lo}, {i.hi}) of {i.name!r}, which {known} {MANIFEST}")
        files = [
            DataFile(folder / f.file, f, index.layouts[f.layout], index.rank, index.world, self.parameters, self.verify)
            for f in index.files
        ]
        for before, after in pairwise(files):
            before.after, after.before = after, before
        return files

    def _kinds_of_all(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {name: set() for name in self.parameters}
        for kind, name in self._places:
            found[name].add(kind)
        for _, name in self._outbox:
            found[name].add(OUTBOX)
        for name, facts in self.parameters.items():
            if not prod(facts.shape):  # nothing of it is nothing missing
                found[name].add(MASTER if facts.trainable else PARAMETERS)
        return {name: frozenset(kinds) for name, kinds in found.items()}

    def _numbers(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for index in self.indexes:
            for values, names in index.scalars:
                for name in names:
                    if name not in self.parameters:
                        where = self._folder(index.rank) / INDEX
                        raise CorruptCheckpoint(f"{where}: numbers of {name!r}, which is no parameter of {MANIFEST}")
                    found[name] = {**values, **found.get(name, {})}
        return found

    # values

    def kinds(self, name: str) -> frozenset[str]:
        """What there is of a parameter. "outbox" is there where any rank has one; then "gradient" can be read even if
        it is not named.

        Raises:
            MismatchedCheckpoint: there is no such parameter.
        """
        return self._kinds[self._known(name)]

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened parameter, (hi - lo,), on the CPU, in the dtype they were kept in.

        "gradient" is what was summed, and to it, in fp32 and by rank, what each rank had not given to a sum yet.

        Raises:
            MismatchedCheckpoint: there is no such parameter, or it has nothing of that kind.
            CorruptCheckpoint: the bytes are not what was written.
        """
        name = self._known(name)
        self._check_interval(name, lo, hi)
        places = self._places.get((kind, name))
        waiting = [self._outbox[r, name] for r in range(self.manifest.world) if (r, name) in self._outbox]
        if kind != GRADIENT or not waiting:
            if places is None and kind not in self._kinds[name]:
                raise MismatchedCheckpoint(f"{self.path} has no {kind} of {name!r}")
            return self._join(places or [], lo, hi)
        total = torch.zeros(hi - lo) if places is None else self._join(places, lo, hi).float()
        for each in waiting:
            total += self._join(each, lo, hi)
        return total

    def read_own(self, kind: str, rank: int, name: str, lo: int, hi: int) -> Tensor | None:
        """The same of what rank ``rank`` alone had: "outbox"; None where it had none.

        Raises:
            MismatchedCheckpoint: there is no such parameter.
            CorruptCheckpoint: the bytes are not what was written.
        """
        name = self._known(name)
        self._check_interval(name, lo, hi)
        places = self._outbox.get((rank, name)) if kind == OUTBOX else None
        return None if places is None else self._join(places, lo, hi)

    def _known(self, name: str) -> str:
        if name not in self._first_names:
            raise MismatchedCheckpoint(f"{self.path} has no parameter {name!r}")
        return self._first_names[name]

    def _check_interval(self, name: str, lo: int, hi: int) -> None:
        numel = prod(self.parameters[name].shape)
        if not 0 <= lo <= hi <= numel:
            raise ValueError(f"[{lo}, {hi}) of {name!r}, which has {numel} elements")

    def _join(self, places: list[Place], lo: int, hi: int) -> Tensor:
        """Elements [lo, hi), from one file or several; where dtypes differ, in one that holds all."""
        dtypes = [place.file.record.dtype for place in places]
        dtype = reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32)
        found = list(within(places, lo, hi))
        for place in found:
            place.file.check_header()  # sizes are true before memory is asked for
        values = self._empty(hi - lo, dtype)
        for place in found:
            a, b = max(lo, place.lo), min(hi, place.hi)
            into = values[a - lo : b - lo]
            if place.file.record.dtype == dtype:
                self._fill(into, place, a)
            else:
                part = self._empty(b - a, place.file.record.dtype)
                self._fill(part, place, a)
                into.copy_(part)
        return values

    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        try:
            return self._blocks.empty(numel, dtype)
        except (MemoryError, RuntimeError) as error:
            what = f"{numel:,} elements of {dtype} do not fit into memory"
            raise CheckpointError(f"{self.path}: {what}: {error}") from error

    def _fill(self, values: Tensor, place: Place, first: int) -> None:
        """Elements of the parameter from ``first`` on, all in one file, into ``values`` of its dtype."""
        start, end = place.in_bytes(first, first + values.numel())
        into = values.view(torch.uint8)
        indexes = place.blocks(start, end)
        for index in indexes:
            block = place.file.blocks[index]
            a, b = max(start, block.lo), min(end, block.hi)
            with self._blocks.block(place.file, index, indexes[-1]) as held:
                into[a - start : b - start].copy_(held[a - block.lo : b - block.lo])

    # what is no parameter

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers of a parameter: {"step": 12.0}.

        Raises:
            MismatchedCheckpoint: there is no such parameter.
        """
        return self._scalars.get(self._known(name), {})

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What rank ``rank`` kept for itself; empty where there was no such rank.

        Raises:
            CorruptCheckpoint: it is not what was written.
        """
        if not 0 <= rank < self.manifest.world:
            return {}
        if rank not in self._states:
            index, where = self.indexes[rank], self._folder(rank)
            tensors = {}
            if index.state_digest:
                tensors = read_state_tensors(where / STATE, index.state_digest if self.verify != "none" else None)
            try:
                state = {} if index.state is None else decode(index.state, tensors, "state")
            except (ValueError, RecursionError) as error:
                raise CorruptCheckpoint(f"{where / INDEX}: {error}") from error
            if not isinstance(state, dict):
                raise CorruptCheckpoint(f"{where / INDEX}: the state is a {type(state).__name__}, must be a dict")
            self._states[rank] = state
        return self._states[rank]

    @cached_property
    def facts(self) -> RunFacts:
        """Where the run stood, as rank 0 said."""
        where = f"{self._folder(0) / INDEX}: the state's {RUN!r}"
        return run_facts(self.rank_state(0).get(RUN, {}), self.manifest.world, where)

    def close(self) -> None:
        """Let go of files and memory."""
        self._blocks.close()

    def __enter__(self) -> StoredCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_all(self) -> None:
        """Compare everything that there is, as far as ``verify`` says: every rank's files and state, and the sizes of
        ``model/``.

        Raises:
            CorruptCheckpoint: what is wrong, and where.
        """
        for index, files in zip(self.indexes, self.files, strict=True):
            for file in files:
                file.check_header()
                for i in filter(file.is_compared, range(len(file.blocks))):
                    with self._blocks.block(file, i):
                        pass
            state = self._folder(index.rank) / STATE
            if index.state_digest and digest_of_file(state) != index.state_digest:
                raise CorruptCheckpoint(f"{state} is not what was written: its digest does not match")
            self.rank_state(index.rank)
        _ = self.facts
        model = self.path / "model"
        if model.is_dir():
            for path in sorted(model.glob("*.safetensors")):
                check_safetensors(path)


def verify(path: str | os.PathLike[str], every_byte: bool = True, on_bytes: Callable[[int], None] | None = None) -> int:
    """Check a whole checkpoint: all ranks' files and states, and the sizes of ``model/``.

    Args:
        path: of the checkpoint: the folder with ``manifest.json``.
        every_byte: compare every digest; False compares headers, sizes, states, and one of eight runs.
        on_bytes: told of bytes as they are read.

    Returns:
        The step that it was saved at.

    Raises:
        CorruptCheckpoint: which file is not what was written, and where.
    """
    with StoredCheckpoint(path, "full" if every_byte else "sampled", on_bytes) as found:
        found.check_all()
        return found.manifest.step


def _first_names(parameters: Mapping[str, ParameterFacts], where: str) -> dict[str, str]:
    """{name or alias: first name}."""
    found = {name: name for name in parameters}
    for name, facts in parameters.items():
        for alias in facts.aliases:
            if found.setdefault(alias, name) != name:
                raise CorruptCheckpoint(f"{where}: {alias!r} is a name of {name!r} and of {found[alias]!r}")
    return found
