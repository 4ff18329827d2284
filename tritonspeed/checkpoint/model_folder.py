"""A folder that ``from_pretrained`` opens: safetensors in the compute dtype, an index, and the model's configs.

All ranks write it at once and none asks another for anything: the plan follows from the parameters' shapes, and every
rank puts the elements that its records hold where the plan has them. What is in memory beyond the records is one part
of ``PART_ELEMS``. A tied parameter is written once, under its first name: who loads it ties it again.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.record import MASTER, PARAMETERS, Record
from tritonspeed.checkpoint.source import ParameterFacts, Source
from tritonspeed.checkpoint.weights_file import MAX_SHARD_BYTES, WeightsWriter, plan_weights
from tritonspeed.offload.page_file import Piece
from tritonspeed.zero.tensor_files import PART_ELEMS

NAME = "model"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_PART = re.compile(r"(.+)\[([0-9]+):([0-9]+)\]", re.DOTALL)
_log = logging.getLogger("tritonspeed")


class ModelFolder:
    """What the folder will hold; made on every rank from the same facts.

    Args:
        parameters: every parameter; ``dtype`` is what it is written in.
        buffers: persistent ones, as they are; rank 0 writes them. They are read when ``write`` is called, in its
            thread: pass copies where training goes on meanwhile.
        configs: file name → text, from ``configs_of``; rank 0 writes them.
        max_shard_bytes: of the tensors in one file; None is one file.
        exclude_frozen: leave out what is not trained.

    Raises:
        ValueError: a dtype that the format does not have, or two tensors of one name.
    """

    def __init__(
        self,
        parameters: Mapping[str, ParameterFacts],
        buffers: Mapping[str, Tensor] | None = None,
        configs: Mapping[str, str] | None = None,
        max_shard_bytes: int | None = MAX_SHARD_BYTES,
        exclude_frozen: bool = False,
    ) -> None:
        self.parameters = {n: facts for n, facts in parameters.items() if facts.trainable or not exclude_frozen}
        self.buffers, self.configs = dict(buffers or {}), dict(configs or {})
        if both := self.buffers.keys() & self.parameters.keys():
            raise ValueError(f"{sorted(both)} are parameters and buffers both: a file has one tensor of a name")
        shapes = {name: (facts.shape, facts.dtype) for name, facts in self.parameters.items()}
        shapes |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in self.buffers.items()}
        self.plan = plan_weights(shapes, max_shard_bytes)

    def write(self, folder: Path, records: Iterable[Record], rank: int) -> None:
        """This rank's part, on disk when it returns. Together the ranks' records hold every parameter.

        Args:
            folder: made where it is not there; no files of an older save in it.
            records: this rank's; kinds other than parameters and masters are passed over.

        Raises:
            OSError: the system's reason.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with WeightsWriter(folder, self.plan) as writer:
            for record in _preferred(records):
                for piece in record.file.pieces:
                    name, lo = self._interval(piece)
                    if name in self.parameters:
                        _copy(lambda i, j, r=record: r.read(i, j), piece.start, piece.numel, writer, name, lo)
            if rank == 0:
                self._write_rest(writer)
            writer.sync()

    def write_from(
        self,
        source: Source,
        folder: Path,
        on_bytes: Callable[[int], None] | None = None,
        first: str = PARAMETERS,
    ) -> None:
        """All of it, from a checkpoint, by one process.

        Args:
            folder: made where it is not there.
            on_bytes: told how many have been written.
            first: the kind to take, where a parameter has two: what modules compute with, or MASTER.

        Raises:
            ValueError: a parameter of which the checkpoint has no values.
            CorruptCheckpoint: the checkpoint's bytes are not what was written.
            OSError: the system's reason.
        """
        kinds = {name: weights_kind(source, name, first) for name in self.parameters}
        folder.mkdir(parents=True, exist_ok=True)
        with WeightsWriter(folder, self.plan) as writer:
            for name, facts in self.parameters.items():
                _copy(
                    lambda i, j, n=name: source.read(kinds[n], n, i, j), 0, prod(facts.shape), writer, name, 0, on_bytes
                )
            self._write_rest(writer)
            writer.sync()

    def _write_rest(self, writer: WeightsWriter) -> None:
        for name, buffer in self.buffers.items():
            writer.write(name, 0, buffer.detach().reshape(-1))
        for file, text in self.configs.items():
            writer.write_text(file, text)
        writer.write_frame()

    def _interval(self, piece: Piece) -> tuple[str, int]:
        """(parameter, its first element) of what a record's file names."""
        facts = self.parameters.get(piece.name)
        if facts is not None and prod(facts.shape) == piece.numel:
            return piece.name, 0
        found = _PART.fullmatch(piece.name)
        return (found[1], int(found[2])) if found else (piece.name, 0)


def _preferred(records: Iterable[Record]) -> Iterator[Record]:
    """Parameters where there are any, else the masters that they are rounded from."""
    found = [record for record in records if record.file.kind in (PARAMETERS, MASTER)]
    as_computed = {record.file.bucket for record in found if record.file.kind == PARAMETERS}
    return (r for r in found if r.file.kind == PARAMETERS or r.file.bucket not in as_computed)


def weights_kind(source: Source, name: str, first: str = PARAMETERS) -> str:
    """The kind to read a parameter's values from, ``first`` where there is such.

    Raises:
        ValueError: there are no values.
    """
    kinds = source.kinds(name)
    for kind in (first, PARAMETERS, MASTER):
        if kind in kinds:
            return kind
    raise ValueError(
        f"{source.path} has no values of {name!r} ({', '.join(sorted(kinds)) or 'nothing'}): it was saved without "
        "frozen parameters; leave them out here too (exclude frozen parameters)"
    )


def _copy(
    read: Callable[[int, int], Tensor],
    start: int,
    numel: int,
    writer: WeightsWriter,
    name: str,
    lo: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Elements [start, start + numel) of what ``read`` reads, part by part, to element ``lo`` on of a tensor."""
    for done in range(0, numel, PART_ELEMS):
        values = read(start + done, start + min(done + PART_ELEMS, numel))
        writer.write(name, lo + done, values)
        if on_bytes is not None:
            on_bytes(values.numel() * writer.plan.places[name].dtype.itemsize)


def model_folder_of(
    source: Source,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    exclude_frozen: bool = False,
    configs: Mapping[str, str] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> ModelFolder:
    """The folder for a checkpoint's parameters.

    Args:
        dtype: of floating-point parameters; default is what modules compute with.
    """
    parameters = {
        name: replace(facts, dtype=dtype) if dtype is not None and facts.dtype.is_floating_point else facts
        for name, facts in source.parameters.items()
    }
    return ModelFolder(parameters, buffers, configs, max_shard_bytes, exclude_frozen)


def configs_of(module: Any, dtype: torch.dtype | None = None) -> dict[str, str]:
    """File name → text of a model's ``config`` and ``generation_config``, those that it has.

    Args:
        module: a model; its class is named as the architecture where the config names none.
        dtype: what its weights will be in, said in the config so that they are loaded in it.
    """
    found = {}
    for file, attribute in ((CONFIG, "config"), (GENERATION_CONFIG, "generation_config")):
        content = _as_dict(getattr(module, attribute, None))
        if content is None:
            continue
        if file == CONFIG and "model_type" in content:
            content["architectures"] = content.get("architectures") or [type(module).__name__]
            if dtype is not None:
                key = "torch_dtype" if "torch_dtype" in content else "dtype"
                content[key] = str(dtype).removeprefix("torch.")
        try:
            found[file] = json.dumps(content, indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as error:
            _log.warning("%s is not written: %s.%s is no JSON (%s)", file, type(module).__name__, attribute, error)
    return found


def _as_dict(config: Any) -> dict[str, Any] | None:
    """A config's content, by its own idea of it; None where it has none, as another library's may."""
    if isinstance(config, dict):
        return dict(config)
    for method in ("to_json_string", "to_dict"):  # the first leaves out what is only for the process
        if callable(getattr(config, method, None)):
            content = getattr(config, method)()
            try:
                content = json.loads(content) if isinstance(content, str) else content
            except ValueError:
                continue
            if isinstance(content, dict):
                return dict(content)
    return None
