"""Values from safetensors files, tensor by tensor: into plain models, sharded ones, and ones not made yet.

    ts.zero.load_safetensors(engine.module, "llama-7b/")     # any stage: each rank reads its own part, nothing is sent
    ts.zero.load_safetensors(meta_model, "llama-7b/")        # no memory yet: read when each unit is made

    plain          every element
    stages 0 to 2  every element into the parameters, the rank's part into the masters
    stage 3        the rank's part into masters and shards; the parameters too, where somebody holds them whole
    zero.Init      as stage 3
    meta device    remembered on the model: ``materialise`` takes values from the files, one unit at a time

In memory at once are ``PART_ELEMS`` elements in the file's dtype; of masters on disk, the rank's part of one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonspeed.zero.bucket import Bucket, ShardState
from tritonspeed.zero.group import group_of, place_of
from tritonspeed.zero.tensor_files import PART_ELEMS, TensorFiles, some_names

Rename = Callable[[str], "str | None"]
_REMEMBERED = "_tritonspeed_values"


class LoadedKeys(NamedTuple):
    """What did not match, named as ``load_state_dict`` names it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class _Target:
    """A tensor of the model, the names it has there, and the name of its values in the files."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    source: str | None = None


class Remembered:
    """Where a model on the meta device takes its values from, later. Kept in the model's ``__dict__``."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[Tensor, TensorFiles, str]] = {}  # holds the tensors: their ids stay theirs

    def add(self, tensor: Tensor, files: TensorFiles, source: str) -> None:
        """``tensor``'s values are those called ``source`` in ``files``."""
        self._sources[id(tensor)] = (tensor, files, source)

    def has(self, tensor: Tensor) -> bool:
        """Whether there are values for ``tensor``."""
        return id(tensor) in self._sources

    def read(self, tensor: Tensor, into: Tensor | None) -> None:
        """Fill ``into``, of any dtype, with the values of ``tensor``, and forget them. None: just forget."""
        _, files, source = self._sources.pop(id(tensor))
        if into is not None:
            _fill(into, files, source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied model has tensors of its own


def remembered_for(model: nn.Module, tensor: Tensor) -> Remembered | None:
    """What was remembered, on ``model`` or a part of it, for a tensor on the meta device; None is nothing."""
    for module in model.modules():
        remembered = module.__dict__.get(_REMEMBERED)
        if remembered is not None and remembered.has(tensor):
            return remembered
    return None


@torch.no_grad()
def load_safetensors(
    model: nn.Module, path: str | os.PathLike[str], strict: bool = True, rename: Rename | None = None
) -> LoadedKeys:
    """Load parameters and persistent buffers from safetensors files, wherever the model's values live.

    Every rank calls it and reads what it keeps; nothing is sent. Values are converted to the dtype they are kept in:
    fp32 masters take fp32 values as they are, whatever the parameters' dtype. Optimizer states stay as they are. On
    the meta device a parameter is made in its own dtype, as ``load_state_dict`` would fill it.

    Args:
        model: plain, sharded at any stage (``engine.module``), built under ``zero.Init``, or on the meta device: then
            its values are read when ``initialize`` or ``zero.shard`` makes it, instead of ``reset_parameters``.
        path: a ``.safetensors`` file, an index of such files, or a folder with ``model.safetensors`` or
            ``model.safetensors.index.json``, as Hugging Face writes it.
        strict: names must match; tied parameters need one of their names.
        rename: a name in the files → the model's; None leaves that tensor out.

    Returns:
        Names that the files lack, and names that the model lacks.

    Raises:
        ValueError: names that do not match (``strict``), other shapes, other kinds of numbers, files that are absent
            or damaged. Nothing has been changed then, unless a file breaks off while it is read.

    Example:
        >>> with torch.device("meta"):
        ...     model = Llama(config)
        >>> ts.zero.load_safetensors(model, "llama-7b/")
        >>> engine, *_ = ts.initialize(model=model, config="ds_config.json")
    """
    files = TensorFiles(path)
    targets = list(_targets(model))
    keys = _match(targets, files, rename)
    if strict and any(keys):
        what = [
            f"{kind}: {some_names(names)}" for kind, names in zip(("missing", "unexpected"), keys, strict=True) if names
        ]
        raise ValueError(
            f"{files.path} does not fit {type(model).__name__}, by name {'; '.join(what)}: translate names with"
            " rename=, or load what fits with strict=False"
        )
    found = [target for target in targets if target.source is not None]
    _check_fit(found, files)
    remembered = model.__dict__.get(_REMEMBERED) or Remembered()
    for target in found:
        assert target.source is not None, "only targets with a source are loaded"
        if group_of(target.tensor) is not None:
            _load_managed(target.tensor, files, target.source)
        elif target.tensor.device.type == "meta":
            remembered.add(target.tensor, files, target.source)
            model.__dict__[_REMEMBERED] = remembered
        else:
            _fill(target.tensor, files, target.source)
    return keys


def _targets(model: nn.Module) -> Iterator[_Target]:
    """Every parameter and persistent buffer once, with all its names: those of ``state_dict``, in its order.

    Through ``dict``'s own methods: asking a module would make sharded parameters whole.
    """
    found: dict[int, _Target] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = [item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set]
        for name, tensor in [*dict.items(module._parameters), *kept]:
            if tensor is not None:
                target = found.setdefault(id(tensor), _Target(tensor))
                target.names.append(f"{prefix}.{name}" if prefix else name)
    yield from found.values()


def _match(targets: list[_Target], files: TensorFiles, rename: Rename | None) -> LoadedKeys:
    """Give every target its source. Of a tied tensor's names the last one counts, as in ``load_state_dict``."""
    sources: dict[str, str] = {}
    for name in files.entries:
        ours = name if rename is None else rename(name)
        if ours is None:
            continue
        if ours in sources:
            raise ValueError(f"rename= makes {ours!r} of both {sources[ours]!r} and {name!r}")
        sources[ours] = name
    known = {name for target in targets for name in target.names}
    for target in targets:
        target.source = next((sources[name] for name in reversed(target.names) if name in sources), None)
    missing = [target.names[0] for target in targets if target.source is None]
    return LoadedKeys(missing, [source for ours, source in sources.items() if ours not in known])


def _check_fit(targets: list[_Target], files: TensorFiles) -> None:
    wrong = []
    for target in targets:
        entry, tensor = files.entries[target.source or ""], target.tensor
        if entry.shape != tuple(tensor.shape):
            wrong.append(f"{target.names[0]!r} is {tuple(tensor.shape)} and the file has {entry.shape}")
        elif entry.dtype.is_floating_point != tensor.is_floating_point():
            wrong.append(f"{target.names[0]!r} is {tensor.dtype} and the file has {entry.dtype}: quantised?")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{files.path} does not fit the model: {'; '.join(wrong[:8])}{more}")


def _fill(tensor: Tensor, files: TensorFiles, source: str) -> None:
    """All of a tensor that is nobody's bucket's."""
    if not tensor.is_contiguous():
        tensor.detach().copy_(files.read(source, 0, tensor.numel()).view(tensor.shape))
        return
    flat = tensor.detach().view(-1)
    for lo, values in files.parts(source, 0, flat.numel(), PART_ELEMS):
        flat[lo : lo + values.numel()].copy_(values)


def _load_managed(p: Tensor, files: TensorFiles, source: str) -> None:
    """What this rank holds of a parameter in a bucket."""
    group, bucket, index = place_of(p)
    bucket.settle()  # an update that is still to come would be of the old values
    if bucket.state is ShardState.GATHERING:
        group.wait()
    span = bucket.layout.spans[index]
    lo, hi = span.offset, span.end
    if bucket.state is ShardState.SHARDED:
        lo, hi = max(lo, bucket.own[0]), min(hi, bucket.own[1])
    # masters on disk that are committed are copied from slot to slot at each change: one change for each tensor then
    part_elems = PART_ELEMS if bucket.master_flat is None else max(1, hi - lo)
    for start, values in files.parts(source, lo - span.offset, hi - span.offset, part_elems):
        write_values(bucket, span.offset + start, values)


def write_values(bucket: Bucket, lo: int, values: Tensor) -> None:
    """Set the bucket's elements from ``lo`` on, in everything that this rank holds of them."""
    hi = lo + values.numel()
    if bucket.state is not ShardState.SHARDED:
        bucket.whole[lo:hi].copy_(values)
    for (first, last), write in ((bucket.owned, bucket.write_master), (bucket.own, bucket.write_shard)):
        start, end = max(lo, first), min(hi, last)
        if start < end:
            write(start, values[start - lo : end - lo])
