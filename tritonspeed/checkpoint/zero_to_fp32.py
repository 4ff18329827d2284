"""DeepSpeed's functions that make one fp32 state dict of a checkpoint, under their names; ours and DeepSpeed's alike.

Beside its checkpoints a run puts a script of this name, with DeepSpeed's command line: see ``script``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonspeed.checkpoint.model_folder import ModelFolder, weights_kind
from tritonspeed.checkpoint.opening import open_source
from tritonspeed.checkpoint.record import MASTER
from tritonspeed.checkpoint.source import ParameterFacts, Source
from tritonspeed.checkpoint.weights_file import index_text, parse_shard_size, shard_files, shard_names, write_tensors
from tritonspeed.offload.durable import write_durably
from tritonspeed.offload.heap import give_back_freed_blocks

_STEM = "pytorch_model"
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_log = logging.getLogger("tritonspeed")


class LazyTensor:
    """A parameter that is read when it is asked for: ``contiguous()``.

    Attributes:
        shape, dtype: of what will be read.
    """

    def __init__(self, source: Source, name: str, dtype: torch.dtype = torch.float32) -> None:
        facts = source.parameters[name]
        self.shape, self.dtype = torch.Size(facts.shape), dtype
        self._source, self._name = source, name

    def contiguous(self) -> Tensor:
        """Read it, ``shape`` in ``dtype``, on the CPU.

        Raises:
            CorruptCheckpoint: the bytes are not what was written.
        """
        kind = weights_kind(self._source, self._name, MASTER)
        return self._source.read(kind, self._name, 0, self.numel()).to(self.dtype).view(self.shape)

    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The whole model in fp32: buffers and parameters, tied ones under all their names.

    Args:
        checkpoint_dir: the folder that holds the checkpoints, or one of them.
        tag: which; None is the one that ``latest`` names.
        exclude_frozen_parameters: leave out what is not trained.
        lazy_mode: parameters are ``LazyTensor``: each is read by its ``contiguous()``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no ``latest`` and no tag, or no checkpoint.
        CorruptCheckpoint: it is damaged.
    """
    source = _open(checkpoint_dir, tag)
    found: dict[str, Any] = {name: _widened(buffer) for name, buffer in _buffers(source).items()}
    for name, facts in _wanted(source, exclude_frozen_parameters).items():
        tensor = LazyTensor(source, name, torch.float32 if facts.dtype.is_floating_point else facts.dtype)
        found[name] = tensor if lazy_mode else tensor.contiguous()
        found |= dict.fromkeys(facts.aliases, found[name])
    if not lazy_mode:
        source.close()
    return found


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Move a model to the CPU and load a checkpoint's weights into it, those whose names match; returns it."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the whole model in fp32; see ``convert_zero_checkpoint_to_state_dict``."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the whole model into files.

    Args:
        checkpoint_dir: the folder that holds the checkpoints, or one of them.
        output_dir: made where it is missing.
        dtype: of floating-point tensors, as fp32, float16, torch.bfloat16.
        max_shard_size: of one file: bytes, or a text as "5GB"; None is one file.
        safe_serialization: ``model.safetensors``, written in a stream; tied parameters under their first name. Else
            ``pytorch_model.bin`` by ``torch.save``: a file's tensors are in memory until it is written.
        tag: which checkpoint; None is the one that ``latest`` names.
        exclude_frozen_parameters: leave out what is not trained.

    Raises:
        FileNotFoundError, ValueError, CorruptCheckpoint: as ``get_fp32_state_dict_from_zero_checkpoint``.
    """
    target, most_bytes = _dtype_of(dtype), parse_shard_size(max_shard_size)
    give_back_freed_blocks()
    source, output = _open(checkpoint_dir, tag), Path(output_dir)
    parameters = {
        name: replace(facts, dtype=target if facts.dtype.is_floating_point else facts.dtype)
        for name, facts in _wanted(source, exclude_frozen_parameters).items()
    }
    buffers = {name: _widened(buffer, target) for name, buffer in _buffers(source).items()}
    output.mkdir(parents=True, exist_ok=True)
    if safe_serialization:
        ModelFolder(parameters, buffers, max_shard_bytes=most_bytes).write_from(source, output, first=MASTER)
    else:
        _write_bins(source, output, parameters, buffers, most_bytes)
    source.close()
    _log.info("%s: %d parameters written to %s", source.path, len(parameters), output)


def _open(checkpoint_dir: str | os.PathLike[str], tag: str | None) -> Source:
    for folder in (Path(checkpoint_dir), Path(checkpoint_dir) / (tag or "")):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    return open_source(checkpoint_dir, tag)


def _wanted(source: Source, exclude_frozen: bool) -> dict[str, ParameterFacts]:
    """What a state dict is to have; frozen parameters that were not saved are not there to be had."""
    return {
        name: facts
        for name, facts in source.parameters.items()
        if facts.trainable or not (exclude_frozen or not source.kinds(name))
    }


def _buffers(source: Source) -> Mapping[str, Tensor]:
    return source.rank_state(0).get("buffers", {})


def _widened(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if found is None:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(_DTYPES)}")
    return found


def _write_bins(
    source: Source,
    output: Path,
    parameters: Mapping[str, ParameterFacts],
    buffers: Mapping[str, Tensor],
    most_bytes: int | None,
) -> None:
    """``pytorch_model.bin``, or several and their index."""
    sizes = {name: buffer.nbytes for name, buffer in buffers.items()}
    sizes |= {name: prod(facts.shape) * facts.dtype.itemsize for name, facts in parameters.items()}
    shards = list(shard_names(sizes, most_bytes))
    files = shard_files(len(shards), _STEM, ".bin")
    where: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        tensors = {name: buffers[name] for name in names if name in buffers}
        for name in names:
            if name in parameters:
                facts = parameters[name]
                tensors[name] = LazyTensor(source, name, facts.dtype).contiguous()
                tensors |= dict.fromkeys(facts.aliases, tensors[name])
        write_tensors(output / file, tensors)
        where |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        write_durably(output / f"{_STEM}.bin.index.json", index_text(where, sum(sizes.values())).encode())
