"""From a checkpoint into a sharded model: every rank reads what it keeps, whoever wrote it and however it was cut.

    fit        names, shapes and the optimizer's kinds are compared; nothing has been changed yet
    fill       masters, parameters, states and gradients, bucket by bucket; no rank talks to another
    publish    what other ranks read is gathered to where it is needed whole (stages 0 to 2, persistent parameters)

A rank that fails in ``fill`` does so alone, so the ranks agree before ``publish``: the caller does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tritonspeed.checkpoint.errors import MismatchedCheckpoint
from tritonspeed.checkpoint.kinds import kept_kinds
from tritonspeed.checkpoint.record import GRADIENT, MASTER, OUTBOX, PARAMETERS
from tritonspeed.checkpoint.source import Source
from tritonspeed.zero import ShardedModel
from tritonspeed.zero.bucket import Bucket, ShardState
from tritonspeed.zero.layout import Span
from tritonspeed.zero.load import write_values
from tritonspeed.zero.tensor_files import PART_ELEMS, some_names

NOT_STATES = frozenset((MASTER, PARAMETERS, GRADIENT, OUTBOX))


@dataclass(frozen=True)
class Wanted:
    """What of a checkpoint is to be loaded.

    Attributes:
        states: the optimizer's, and gradients in accumulation.
        masters: fp32 values for trained parameters; False takes the 16-bit ones where both are there.
        strict: everything must fit; otherwise what fits is loaded, and the rest is listed.
        values: parameters and masters at all; False where the caller sets them.
    """

    states: bool = True
    masters: bool = True
    strict: bool = True
    values: bool = True


@dataclass
class Fit:
    """What of a checkpoint fits a model. Names are the model's, unless they are of what only the checkpoint has.

    Attributes:
        sources: the model's name of a parameter → the checkpoint's.
        missing: parameters of the model that the checkpoint has nothing for.
        unexpected: parameters that only the checkpoint has.
        misshapen: what differs in shape, in words.
        states: bucket's id → {the optimizer's tensor: the model's parameters that the checkpoint has it for}.
        left_out: what else is not loaded, in words.
    """

    sources: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    states: dict[int, dict[str, set[str]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Everything that ``strict`` does not allow, in words."""
        found = []
        if self.missing:
            found.append(f"not in the checkpoint: {some_names(self.missing)}")
        if self.unexpected:
            found.append(f"only in the checkpoint: {some_names(self.unexpected)}")
        return [*found, *self.misshapen, *self.left_out]


def fit(sharded: ShardedModel, source: Source, wanted: Wanted) -> Fit:
    """Compare a checkpoint with a model and its optimizer.

    Raises:
        MismatchedCheckpoint: ``wanted.strict``, and something does not fit. Nothing was changed.
    """
    found = Fit()
    theirs = _by_any_name(source)
    taken = set()
    for bucket in sharded.buckets:
        for span in bucket.layout.spans:
            name = theirs.get(span.name)
            if name is None:
                found.missing.append(span.name)
                continue
            taken.add(name)
            facts = source.parameters[name]
            if facts.shape != span.shape:
                found.misshapen.append(f"{span.name!r} is {span.shape} here and {facts.shape} in the checkpoint")
            elif not source.kinds(name) & {MASTER, PARAMETERS}:
                if bucket.trainable:
                    found.missing.append(span.name)  # frozen ones may have been left out on purpose
            else:
                found.sources[span.name] = name
    taken |= buffers_of(sharded).keys()  # plain weights do not tell them from parameters
    found.unexpected = [name for name in source.parameters if name not in taken]
    if wanted.states and sharded.stepper is not None:
        _fit_states(sharded, source, found)
    complaints = found.complaints()
    if wanted.strict and complaints:
        raise MismatchedCheckpoint(
            f"{source.path} does not fit {type(sharded.model).__name__}: {'; '.join(complaints)}. To load what fits, "
            "and keep the rest as it is, pass load_module_strict=False"
        )
    return found


def _by_any_name(source: Source) -> dict[str, str]:
    """Every name that a parameter has in a checkpoint → its first."""
    found = {alias: name for name, facts in source.parameters.items() for alias in facts.aliases}
    return {**found, **{name: name for name in source.parameters}}


def _fit_states(sharded: ShardedModel, source: Source, found: Fit) -> None:
    """Which of the optimizer's tensors there are values for. What it keeps decides, not its name."""
    stepper = sharded.stepper
    assert stepper is not None, "an optimizer to load states for"
    absent: dict[str, list[str]] = {}
    extra: dict[str, list[str]] = {}
    for bucket in stepper.buckets:
        keeps = kept_kinds(stepper, bucket)
        states: dict[str, set[str]] = {}
        for span in bucket.layout.spans:
            name = found.sources.get(span.name)
            there = source.kinds(name) - NOT_STATES if name is not None else frozenset()
            if not there or span.name not in keeps:
                continue  # never stepped there, or not here
            for kind in there & keeps[span.name]:
                states.setdefault(kind, set()).add(span.name)
            for kind in keeps[span.name] - there:
                absent.setdefault(kind, []).append(span.name)
            for kind in there - keeps[span.name]:
                extra.setdefault(kind, []).append(span.name)
        found.states[id(bucket)] = states
    ours, theirs = type(stepper.inner).__name__, source.facts.optimizer or "another optimizer"
    for kind, names in sorted(absent.items()):
        found.left_out.append(
            f"{ours} keeps {kind}, and {theirs} of the checkpoint has none for {some_names(names, 2)}"
        )
    for kind, names in sorted(extra.items()):
        found.left_out.append(f"{theirs} there has {kind} for {some_names(names, 2)}, which {ours} has not")


@torch.no_grad()
def fill(sharded: ShardedModel, source: Source, found: Fit, wanted: Wanted) -> None:
    """Read this rank's part. No rank talks to another, and what is on disk changes in one commit.

    Raises:
        CorruptCheckpoint: bytes that are not what was written; what was read before has been changed by then.
    """
    stepper = sharded.stepper
    if stepper is not None:
        stepper.late.finish()
        stepper.zero_grad()
    for group in sharded.groups:
        group.reshard()
    with sharded.homes.editing():
        for bucket in sharded.buckets:
            bucket.wait()
            # states first: on disk a tile is written whole, its masters as they were committed before
            if stepper is not None and bucket.trainable and wanted.states:
                _fill_states(sharded, bucket, source, found)
            for span in bucket.layout.spans if wanted.values else ():
                if span.name in found.sources:
                    _fill_values(bucket, span, source, found.sources[span.name], wanted)
    if stepper is not None:
        stepper.states_changed()


def _fill_values(bucket: Bucket, span: Span, source: Source, name: str, wanted: Wanted) -> None:
    """Masters, shards and whole parameters, as far as this rank holds them."""
    kinds = source.kinds(name)
    prefers = MASTER if (wanted.masters and MASTER in kinds) or PARAMETERS not in kinds else PARAMETERS
    lo, hi = max(bucket.owned[0], span.offset), min(bucket.owned[1], span.end)
    _copy(bucket, span, lo, hi, lambda a, b: source.read(prefers, name, a, b), write_values)
    rounded_apart = bucket.trainable and prefers == MASTER and PARAMETERS in kinds
    if rounded_apart and source.parameters[name].dtype == bucket.types.compute:
        _copy(bucket, span, lo, hi, lambda a, b: source.read(PARAMETERS, name, a, b), _write_rounded)


def _copy(
    bucket: Bucket,
    span: Span,
    lo: int,
    hi: int,
    read: Callable[[int, int], Tensor],
    write: Callable[[Bucket, int, Tensor], None],
) -> None:
    # masters on disk are changed run by run of whole pages: as few runs as there can be
    step = PART_ELEMS if bucket.master_flat is None else max(1, hi - lo)
    for start in range(lo, hi, step):
        end = min(start + step, hi)
        write(bucket, start, read(start - span.offset, end - span.offset))


def _write_rounded(bucket: Bucket, lo: int, values: Tensor) -> None:
    """What modules compute with, where it is not the rounded master."""
    hi = lo + values.numel()
    if bucket.state is not ShardState.SHARDED:
        bucket.whole[lo:hi].copy_(values)
    start, end = max(lo, bucket.own[0]), min(hi, bucket.own[1])
    if start < end:
        bucket.write_shard(start, values[start - lo : end - lo])


def _fill_states(sharded: ShardedModel, bucket: Bucket, source: Source, found: Fit) -> None:
    stepper = sharded.stepper
    assert stepper is not None, "an optimizer to load states for"
    names = {span.name: found.sources[span.name] for span in bucket.layout.spans if span.name in found.sources}
    stepper.states.restore(
        bucket,
        found.states.get(id(bucket), {}),
        {ours: source.scalars(theirs) for ours, theirs in names.items()},
        lambda key, span, lo, hi: source.read(key, names[span.name], lo, hi),
    )


@torch.no_grad()
def fill_gradients(sharded: ShardedModel, source: Source, found: Fit, factor: float) -> None:
    """Gradients of an accumulation that goes on. At the same world size a rank takes back its own.

    Args:
        factor: what sums over the ranks of the checkpoint are to be multiplied with, to be such sums here.
    """
    stepper = sharded.stepper
    assert stepper is not None, "an optimizer that accumulates"
    used = []
    for bucket in stepper.buckets:
        names = {i: found.sources.get(span.name) for i, span in enumerate(bucket.layout.spans)}
        here = {i: n for i, n in names.items() if n is not None and source.kinds(n) & {GRADIENT, OUTBOX}}
        if not here:
            continue
        used += [(bucket, i) for i in here]
        if sharded.stage.shards_gradients:
            bucket.take_sum(_summed(bucket, here, source) * factor)
        elif source.facts.world == bucket.mesh.world and not any(GRADIENT in source.kinds(n) for n in here.values()):
            _take_own(bucket, here, source)
        else:
            whole = torch.zeros(bucket.layout.numel, dtype=bucket.types.accumulate)
            whole[slice(*bucket.own)] = _summed(bucket, here, source) * factor
            bucket.hold_back(whole, here)
    sharded.reducer.resume(used)


def _summed(bucket: Bucket, names: dict[int, str], source: Source) -> Tensor:
    """This rank's slice of the sum over the checkpoint's ranks, (P/N,)."""
    first, last = bucket.own
    total = torch.zeros(last - first, dtype=bucket.types.accumulate)
    for i, name in names.items():
        span = bucket.layout.spans[i]
        lo, hi = max(first, span.offset), min(last, span.end)
        if lo < hi:
            total[lo - first : hi - first].copy_(source.read(GRADIENT, name, lo - span.offset, hi - span.offset))
    return total


def _take_own(bucket: Bucket, names: dict[int, str], source: Source) -> None:
    whole = torch.zeros(bucket.layout.numel, dtype=bucket.types.accumulate)
    filled = []
    for i, name in names.items():
        span = bucket.layout.spans[i]
        values = source.read_own(OUTBOX, bucket.mesh.rank, name, 0, span.numel)
        if values is not None:
            whole[span.offset : span.end].copy_(values)
            filled.append(i)
    if filled:
        bucket.hold_back(whole, filled)


@torch.no_grad()
def publish(sharded: ShardedModel) -> None:
    """Give every rank what the others have read, where parameters are whole. Collective."""
    for bucket in sharded.buckets:
        if bucket.frees:
            bucket.regather()
        else:
            bucket.publish().wait()


def buffers_of(sharded: ShardedModel) -> dict[str, Tensor]:
    """Persistent buffers, by name."""
    kept = {}
    for prefix, module in sharded.model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                kept[f"{prefix}.{name}" if prefix else name] = buffer
    return kept


def fit_buffers(sharded: ShardedModel, values: dict[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """The checkpoint's buffers that fit the model's.

    Raises:
        MismatchedCheckpoint: ``strict``, and a buffer differs in shape, is absent, or is only there.
    """
    ours = buffers_of(sharded)
    good = {name: values[name] for name in ours if name in values and values[name].shape == ours[name].shape}
    wrong = sorted({*ours, *values} - set(good))
    if strict and wrong:
        raise MismatchedCheckpoint(
            f"buffers of the checkpoint do not fit {type(sharded.model).__name__}: {some_names(wrong)}. To load what "
            "fits, pass load_module_strict=False"
        )
    return good


@torch.no_grad()
def fill_buffers(sharded: ShardedModel, values: dict[str, Tensor]) -> None:
    """Set persistent buffers."""
    for name, buffer in buffers_of(sharded).items():
        if name in values:
            buffer.copy_(values[name])
