"""The plan of a sharded model as a table for people."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

from tritonspeed.zero import ShardedModel, ZeroOptimizer
from tritonspeed.zero.bucket import Bucket


def _when(bucket: Bucket) -> str:
    if bucket.mesh.world == 1:
        return "one rank: nothing to gather"
    if bucket.frees:
        return "all ranks, before each use of the unit"
    if bucket.trainable and bucket.owned == bucket.own:
        return "all ranks, after each step"
    return "never: whole on every rank"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _lives(bucket: Bucket) -> str:
    """The tiers of its masters and moments, and of its parameter shard."""
    tiers = [bucket.tier] if bucket.trainable else []
    if bucket.shard is not None or bucket.shard_flat is not None:
        tiers.append(bucket.shard_tier)
    return " + ".join(tier.name.lower() for tier in tiers) or "device"


def _gradient(bucket: Bucket, optimizer: ZeroOptimizer | None) -> str:
    if optimizer is None or not bucket.trainable:
        return "none"
    kept = _short(bucket.types.accumulate)
    return f"{_short(bucket.types.reduce)} sent, {kept} kept" if bucket.types.reduce else kept


def explain_plan(sharded: ShardedModel, optimizer: ZeroOptimizer | None) -> str:
    """One row per bucket: unit, parameters, slice per rank, dtypes, bytes on this rank now, gathers.

    Args:
        sharded: the model.
        optimizer: its optimizer, for the bytes of the states; None leaves them out.
    """
    stage, mesh = sharded.stage, sharded.mesh
    title = f"ZeRO stage {stage.number} · {mesh.world} rank(s) · {mesh.backend} · {mesh.device}"
    table = Table(title=title)
    for name in ("unit", "parameters", "elements", "slice", "compute", "master", "lives", "gradient", "bytes here"):
        table.add_column(name, justify="right" if name in ("parameters", "elements", "slice", "bytes here") else "left")
    table.add_column("who gathers when")
    for bucket in sharded.buckets:
        states = optimizer.states.bytes_of(bucket) if optimizer else 0
        whole = 0 if bucket.frees else bucket.layout.numel * bucket.types.compute.itemsize
        aliased = bucket.master is not None and not bucket.frees and bucket.types.compute == bucket.types.master
        own = (None if aliased else bucket.master, bucket.shard, bucket.grad, bucket.outbox)
        kept = [t for t in own if t is not None]
        table.add_row(
            bucket.name,
            str(len(bucket.parameters)),
            f"{sum(s.numel for s in bucket.layout.spans):,}",
            f"{bucket.layout.slice_numel:,}",
            _short(bucket.types.compute),
            _short(bucket.types.master) if bucket.trainable else "frozen",
            _lives(bucket),
            _gradient(bucket, optimizer),
            f"{whole + sum(t.nbytes for t in kept) + states:,}",
            _when(bucket),
        )
    held = sharded.ledger.bytes_of
    table.caption = " · ".join(f"{name} {held[name]:,} bytes" for name in held) + " on this rank now"
    text = StringIO()
    Console(file=text, width=140, force_jupyter=False, force_terminal=False).print(table)
    return text.getvalue()
