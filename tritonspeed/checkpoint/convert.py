"""One kind of checkpoint made into another, in a stream: what is in memory is a few parts of a few megabytes.

    tritonspeed    everything there is, cut for one rank; any number of ranks loads it
    universal      DeepSpeed's: masters, moments, counters
    huggingface    parameters and buffers: a folder that ``from_pretrained`` opens

What the target has no place for is left out, and said. Values are copied bit by bit but where a dtype is asked for.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tritonspeed.checkpoint.deepspeed.universal import write_universal
from tritonspeed.checkpoint.model_folder import CONFIG, GENERATION_CONFIG, ModelFolder, weights_kind
from tritonspeed.checkpoint.model_folder import NAME as MODEL
from tritonspeed.checkpoint.opening import NAMES, OURS, PLAIN, UNIVERSAL, kind_of, locate, open_source
from tritonspeed.checkpoint.record import GRADIENT, MASTER, OUTBOX, PARAMETERS, Record
from tritonspeed.checkpoint.saver import Job, Saver
from tritonspeed.checkpoint.source import ParameterFacts, Source
from tritonspeed.checkpoint.weights_file import MAX_SHARD_BYTES
from tritonspeed.comm import Mesh
from tritonspeed.offload.durable import sync_folder
from tritonspeed.offload.heap import give_back_freed_blocks
from tritonspeed.offload.page_file import PageFile, Piece
from tritonspeed.version import __version__
from tritonspeed.zero.layout import Layout, lay_out

Target = Literal["tritonspeed", "universal", "huggingface"]
TARGETS: tuple[Target, ...] = (OURS, UNIVERSAL, PLAIN)
BUCKET_ELEMS = 2**28  # of one file: 1 GiB of fp32
ELEMENT_BYTES = 4  # of what places are aligned for
_NOT_STATES = frozenset((MASTER, PARAMETERS, GRADIENT, OUTBOX))
_OF_ONE_RANK = ("random", "data")


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source, target: paths of the two checkpoints.
        kind: what the first one is, in words.
        num_parameters, num_elems: read.
        num_bytes: written.
        left_out: what the target has not, in words.
    """

    source: Path
    target: Path
    kind: str
    num_parameters: int
    num_elems: int
    num_bytes: int
    left_out: tuple[str, ...]


def convert(
    source_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    to: Target = OURS,
    tag: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    exclude_frozen: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Read a checkpoint of any kind and write one of the kind ``to``.

    Args:
        source_path: of a checkpoint, a folder of checkpoints, or weights.
        target_path: what to make; nothing may be there yet. Of ours it is ``save_dir/tag``, and ``latest`` beside it
            names it.
        to: what kind to make.
        tag: which of a folder of checkpoints; None is the one that ``latest`` names.
        dtype: of the weights, for "huggingface"; None is what modules compute with.
        max_shard_bytes: of one file, for "huggingface".
        exclude_frozen: leave out what is not trained.
        on_progress: told of elements read and of how many there are.

    Raises:
        ValueError: no such kind, nothing to read, or something at ``target_path`` already.
        CheckpointError: the source is damaged, or the target could not be written.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r}: must be one of {', '.join(TARGETS)}")
    if dtype is not None and (to != PLAIN or not dtype.is_floating_point):
        raise ValueError(f"dtype={dtype} with to={to!r}: a floating-point dtype, and only weights are cast")
    target = Path(target_path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already: name one that is not, or remove it")
    give_back_freed_blocks()  # of 1 GiB, 122 MiB were in memory, not 697; to weights 160, not 392
    path = locate(Path(source_path), tag)
    source = open_source(path)
    try:
        plan = _Plan(source, to, exclude_frozen, on_progress)
        num_bytes = _WRITERS[to](plan, target, dtype, max_shard_bytes)
    finally:
        source.close()
    kind = NAMES[kind_of(path) or PLAIN]
    return Conversion(path, target, kind, len(plan.parameters), plan.num_elems, num_bytes, tuple(plan.left_out()))


class _Plan:
    """What of a source is to be read, and how far that has come."""

    def __init__(
        self, source: Source, to: Target, exclude_frozen: bool, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self.source, self.to = source, to
        self._on_progress, self._read_elems, self._lock = on_progress, 0, threading.Lock()
        self.parameters: dict[str, ParameterFacts] = {}
        self.kinds: dict[str, tuple[str, ...]] = {}
        self.frozen: list[str] = []
        for name, facts in source.parameters.items():
            has = source.kinds(name)
            if not facts.trainable and (exclude_frozen or not has):
                self.frozen.append(name)
                continue
            self.parameters[name] = facts
            self.kinds[name] = tuple(sorted(_taken(source, name, to)))
        self.num_elems = sum(prod(self.parameters[n].shape) * len(kinds) for n, kinds in self.kinds.items())

    def read(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """As the source; one thread at a time, and counted."""
        with self._lock:
            values = self.source.read(kind, name, lo, hi)
            self._read_elems += hi - lo
            if self._on_progress is not None:
                self._on_progress(self._read_elems, self.num_elems)
        return values

    def left_out(self) -> Iterator[str]:
        """What the target has not, in words."""
        source, facts = self.source, self.source.facts
        if self.frozen:
            yield f"frozen parameters: {len(self.frozen)}"
        if self.to == PLAIN:
            states = sorted(set().union(*(source.kinds(n) for n in self.parameters)) - _NOT_STATES)
            if states:
                yield f"the optimizer's states: {', '.join(states)}"
            if facts.optimizer or facts.scheduler or facts.scaler or facts.global_steps:
                yield "counters, settings of the optimizer, schedule, loss scale"
            if facts.client_state:
                yield "client_state"
        if self.to != OURS and facts.num_accumulated:
            yield f"gradients of {facts.num_accumulated} micro-steps in accumulation"
        if self.to != OURS and any({MASTER, PARAMETERS} <= source.kinds(n) for n in self.parameters):
            which = "masters of" if self.to == PLAIN else "values of"
            yield f"{which} 16-bit parameters that are not their masters, rounded"
        own = source.rank_state(0)
        if self.to != OURS and any(key in own for key in _OF_ONE_RANK):
            yield "random states and the data's position"
        if self.to == OURS and facts.world > 1 and any(key in own for key in _OF_ONE_RANK):
            yield "what other ranks than 0 kept for themselves: random states, data position, client_state"


def _taken(source: Source, name: str, to: Target) -> set[str]:
    """Which kinds of a parameter's values the target has a place for."""
    has = set(source.kinds(name))
    if to == PLAIN:
        return {weights_kind(source, name)}
    if to == UNIVERSAL:
        return has - {GRADIENT, OUTBOX} - ({PARAMETERS} if MASTER in has else set())
    # what the ranks have not added up yet is added up: nobody will be one of them
    return has - {OUTBOX} | {GRADIENT} if OUTBOX in has else has


def _write_plain(plan: _Plan, target: Path, dtype: torch.dtype | None, max_shard_bytes: int | None) -> int:
    parameters = {
        name: replace(facts, dtype=dtype) if dtype is not None and facts.dtype.is_floating_point else facts
        for name, facts in plan.parameters.items()
    }
    buffers = plan.source.rank_state(0).get("buffers", {})
    folder = ModelFolder(parameters, buffers, _configs_beside(plan.source.path), max_shard_bytes)
    hidden = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.write_from(_Counted(plan), hidden)
        os.rename(hidden, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder.plan.num_bytes


class _Counted:
    """The source, of the plan's parameters alone; what is read is counted."""

    def __init__(self, plan: _Plan) -> None:
        source = plan.source
        self.path, self.facts, self.parameters, self.read = source.path, source.facts, plan.parameters, plan.read
        self.kinds, self.read_own, self.scalars = source.kinds, source.read_own, source.scalars
        self.rank_state, self.close = source.rank_state, source.close


def _configs_beside(path: Path) -> dict[str, str]:
    """A model's configs, where a checkpoint has them: in itself, in its ``model/``, or in the folder around it."""
    found: dict[str, str] = {}
    for folder in (path / MODEL, path if path.is_dir() else path.parent, path.parent):
        for file in (CONFIG, GENERATION_CONFIG):
            if file not in found and (folder / file).is_file():
                found[file] = (folder / file).read_text(encoding="utf-8")
    return found


def _write_universal(plan: _Plan, target: Path, dtype: torch.dtype | None, max_shard_bytes: int | None) -> int:
    write_universal(_Counted(plan), target)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _write_ours(plan: _Plan, target: Path, dtype: torch.dtype | None, max_shard_bytes: int | None) -> int:
    source, facts = plan.source, plan.source.facts
    own = source.rank_state(0)
    # what has been added up is added up over the ranks there were; their number is what it is divided by
    state = {**own, "run": {**own.get("run", {}), **asdict(facts)}}
    state.setdefault("client_state", facts.client_state)
    scalars: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for name in plan.parameters:
        if numbers := source.scalars(name):
            scalars.setdefault(tuple(sorted(numbers.items())), []).append(name)
    job = Job(
        folder=target.parent,
        tag=target.name,
        records=list(_records(plan)),
        scalars=[(dict(numbers), tuple(names)) for numbers, names in scalars.items()],
        state=state,
        parameters=source.parameters,  # frozen ones without values are named all the same
        step=facts.global_steps,
        facts={"tritonspeed": __version__, "torch": torch.__version__, "converted_from": plan.source.path.name},
    )
    saver = Saver(Mesh(rank=0, world=1, device=torch.device("cpu"), backend="none"))
    saver.save(job)
    assert saver.last is not None, "a save that is committed has a report"
    return saver.last.num_bytes


def _records(plan: _Plan) -> Iterator[Record]:
    """Parameters of the same kinds and dtypes side by side, as many as one file is to have."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, facts in plan.parameters.items():
        dtypes = tuple((kind, _dtype_of(plan.source, kind, name)) for kind in plan.kinds[name])
        alike.setdefault((facts.trainable, dtypes), []).append(name)
    number = 0
    for (_, dtypes), names in alike.items():
        for some in _in_buckets(names, plan.parameters):
            layout = lay_out([(name, plan.parameters[name].shape) for name in some], ELEMENT_BYTES, 1)
            pieces = tuple(Piece.of(span.name, span.shape, span.offset) for span in layout.spans)
            for kind, dtype in dtypes:
                file = PageFile(f"part-{number:05d}", kind, dtype, layout.numel, pieces)
                yield Record(file, _reader(plan, layout, kind, dtype))
            number += 1


def _in_buckets(names: Sequence[str], parameters: dict[str, ParameterFacts]) -> Iterator[list[str]]:
    bucket: list[str] = []
    filled = 0
    for name in names:
        numel = prod(parameters[name].shape)
        if bucket and filled + numel > BUCKET_ELEMS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(name)
        filled += numel
    yield bucket


def _dtype_of(source: Source, kind: str, name: str) -> torch.dtype:
    """What a kind of a parameter is kept in."""
    return source.read(kind, name, 0, min(1, prod(source.parameters[name].shape))).dtype


def _reader(plan: _Plan, layout: Layout, kind: str, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    def read(lo: int, hi: int) -> Tensor:
        values = torch.zeros(hi - lo, dtype=dtype)
        for piece in layout.pieces(lo, hi):
            part = plan.read(kind, piece.span.name, piece.in_span, piece.in_span + piece.numel)
            values[piece.in_interval :][: piece.numel].copy_(part)
        return values

    return read


_WRITERS: dict[str, Callable[[_Plan, Path, torch.dtype | None, int | None], int]] = {
    OURS: _write_ours,
    UNIVERSAL: _write_universal,
    PLAIN: _write_plain,
}
