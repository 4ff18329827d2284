"""What one rank of a sharded model has to save: its own slice of every bucket, whatever the stage and tier.

    masters      trained parameters                                  optimizer's states    whatever it has
    parameters   frozen ones; trained ones that do not follow        gradient, outbox      between micro-steps of an
                 from the masters, being rounded at random                                 accumulation

At stage 0 every rank has everything, and still saves 1/N: together they write as fast as they can, and nothing twice.
Nothing is copied here; ``Record.snapshot`` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonspeed.checkpoint.record import GRADIENT, MASTER, OUTBOX, PARAMETERS, Record
from tritonspeed.checkpoint.source import ParameterFacts
from tritonspeed.offload.disk import DiskFlat
from tritonspeed.offload.page_file import PageFile, Piece
from tritonspeed.zero import ShardedModel
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.states import ShardedStates

Scalars = list[tuple[dict[str, float], tuple[str, ...]]]


@dataclass(frozen=True)
class Collected:
    """What a rank has to save of a model.

    Attributes:
        records: its flats.
        scalars: the optimizer's numbers, with the parameters that have them.
        parameters: every parameter of the model, the same on every rank.
    """

    records: list[Record]
    scalars: Scalars
    parameters: dict[str, ParameterFacts]


def collect(sharded: ShardedModel, exclude_frozen: bool = False) -> Collected:
    """Everything that ``restore`` needs of a model and its optimizer; waits for updates under way.

    Args:
        exclude_frozen: leave frozen parameters out; they are named all the same.
    """
    stepper = sharded.stepper
    if stepper is not None:
        stepper.late.finish()
    records: list[Record] = []
    scalars: Scalars = []
    for bucket in sharded.buckets:
        if bucket.trainable or not exclude_frozen:
            records += _values(bucket, _rounds_at_random(sharded))
        if bucket.trainable and stepper is not None:
            records += _states(bucket, stepper.states)
            records += _gradients(bucket)
            scalars += [(numbers, tuple(sorted(names))) for numbers, names in stepper.states.scalars(bucket)]
    return Collected(records, scalars, facts_of(sharded))


def facts_of(sharded: ShardedModel) -> dict[str, ParameterFacts]:
    """Every parameter of a model, in unit order."""
    names: dict[int, list[str]] = {}
    for name, p in sharded.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found = {}
    for bucket in sharded.buckets:
        for p, span in zip(bucket.parameters, bucket.layout.spans, strict=True):
            aliases = tuple(name for name in names.get(id(p), ()) if name != span.name)
            found[span.name] = ParameterFacts(span.shape, bucket.types.compute, bucket.trainable, aliases)
    return found


def _rounds_at_random(sharded: ShardedModel) -> bool:
    groups = sharded.stepper.inner.param_groups if sharded.stepper is not None else []
    return any(group.get("stochastic_rounding") for group in groups)


def _file(bucket: Bucket, kind: str, dtype: torch.dtype, names: Collection[str] | None = None) -> PageFile:
    """Of this rank's slice; None names every parameter in it."""
    lo, hi = bucket.own
    pieces = tuple(
        Piece.of(p.span.name, p.span.shape, p.in_interval, p.in_span, p.in_span + p.numel)
        for p in bucket.layout.pieces(lo, hi)
        if names is None or p.span.name in names
    )
    return PageFile(bucket.name, kind, dtype, hi - lo, pieces, bucket.mesh.rank, bucket.mesh.world)


def _whole_flat(flat: DiskFlat | None, bucket: Bucket) -> DiskFlat | None:
    """A flat that is the very file to save: of this rank's slice and no more."""
    return flat if flat is not None and bucket.owned == bucket.own else None


def _values(bucket: Bucket, rounds_at_random: bool) -> Iterator[Record]:
    first = bucket.own[0]

    def read(lo: int, hi: int) -> Tensor:
        return bucket.read_master(first + lo, first + hi).detach()

    if not bucket.trainable:
        yield _on_disk(bucket) or Record(_file(bucket, PARAMETERS, bucket.types.compute), read)
        return
    if (flat := _whole_flat(bucket.master_flat, bucket)) is not None:
        yield Record(flat.contents, flat.read, flat)
    else:
        yield Record(_file(bucket, MASTER, bucket.types.master), read)
    if rounds_at_random and bucket.types.compute == torch.bfloat16:
        yield _on_disk(bucket) or Record(_file(bucket, PARAMETERS, bucket.types.compute), _rounded(bucket))


def _on_disk(bucket: Bucket) -> Record | None:
    """The shard, where it is on disk: there it may be larger than the host's memory."""
    flat = bucket.shard_flat
    return None if flat is None else Record(flat.contents, flat.read, flat)


def _rounded(bucket: Bucket) -> Callable[[int, int], Tensor]:
    """What modules compute with, of this rank's slice."""
    first = bucket.own[0]
    if bucket.shard is not None:
        shard = bucket.shard
        return lambda lo, hi: shard[lo:hi]
    return lambda lo, hi: bucket.whole[first + lo : first + hi].detach()


def _states(bucket: Bucket, states: ShardedStates) -> Iterator[Record]:
    opening = threading.Lock()  # a bucket's tiles on disk are opened by one thread at a time
    for key, names in states.kinds(bucket).items():
        flat = _whole_flat(states.flat_of(bucket, key), bucket)
        if flat is not None:
            yield Record(flat.contents, flat.read, flat)
            continue
        dtype = states.dtype(bucket, key)
        file = _file(bucket, key, dtype, names)
        if file.pieces:
            yield Record(file, _reader(bucket, states, key, dtype, opening))


def _reader(
    bucket: Bucket, states: ShardedStates, key: str, dtype: torch.dtype, opening: threading.Lock
) -> Callable[[int, int], Tensor]:
    first = bucket.own[0]

    def read(lo: int, hi: int) -> Tensor:
        with opening:
            found = list(states.views(bucket, key, first + lo, first + hi))
        if len(found) == 1 and found[0][0].numel() == hi - lo and found[0][0].dtype == dtype:
            return found[0][0]
        joined = torch.zeros(hi - lo, dtype=dtype, device=found[0][0].device if found else None)
        for values, start in found:
            joined[start - first - lo :][: values.numel()].copy_(values)
        return joined

    return read


def _gradients(bucket: Bucket) -> Iterator[Record]:
    summed = bucket.own_grad()
    if summed is not None:
        yield Record(_file(bucket, GRADIENT, summed.dtype), lambda lo, hi: summed[lo:hi])
    held = bucket.held_back()
    if held is not None:
        values, indices = held
        spans = [bucket.layout.spans[i] for i in indices]
        pieces = tuple(Piece.of(s.name, s.shape, s.offset) for s in spans)
        file = PageFile(bucket.name, OUTBOX, values.dtype, values.numel(), pieces, bucket.mesh.rank, bucket.mesh.world)
        yield Record(file, lambda lo, hi: values[lo:hi])
