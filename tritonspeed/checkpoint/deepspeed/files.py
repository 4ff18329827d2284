"""DeepSpeed's own checkpoints as a ``Source``: stages 0 to 3, fp32, fp16 and bf16, any number of ranks.

    mp_rank_00_model_states.pt                               stages 0 to 2: the model; at stage 0 the optimizer too
    zero_pp_rank_{r}_mp_rank_00_model_states.pt              stage 3: names, buffers, shares of frozen parameters
    [bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states.pt       masters and states of rank r, flat

Files are opened as they are needed and mapped into memory: what is held is what is being read. Nothing is unpickled
but through ``TorchFile``.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from tritonspeed.checkpoint.data_file import Verify
from tritonspeed.checkpoint.deepspeed.facts import (
    KNOWN,
    MOST_RANKS,
    ModelState,
    numel_of,
    read_model_state,
    read_scaler,
    scalars_in,
    settings_of,
    tensors_in,
)
from tritonspeed.checkpoint.deepspeed.layout import (
    Layout,
    Place,
    checked_count,
    flat_layout,
    items,
    sharded_layout,
    shared_place,
)
from tritonspeed.checkpoint.deepspeed.torch_file import TorchFile
from tritonspeed.checkpoint.deepspeed.unsharded import read_unsharded
from tritonspeed.checkpoint.deepspeed.values import HeldSource, whole
from tritonspeed.checkpoint.errors import CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.record import MASTER, PARAMETERS
from tritonspeed.zero.tensor_files import some_names

_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,7})_)?mp_rank_(\d{2,4})_model_states\.pt")
_OPTIMIZER = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d{1,7})_mp_rank_(\d{2,4})_?optim_states\.pt")
_SHARDED, _FLAT, _STATE = "fp32_flat_groups", "single_partition_of_fp32_groups", "optimizer_state_dict"
_UNUSED = {"lion": "exp_avg_sq"}  # zeros that DeepSpeed's Lion for CPUs keeps and never touches


@dataclass
class Files:
    """Of one tag: rank → path."""

    model: dict[int, Path] = field(default_factory=dict)
    optimizer: dict[int, Path] = field(default_factory=dict)


@dataclass
class RankState:
    """What one rank's file has: flats of masters, and of each the optimizer's tensors."""

    file: TorchFile
    masters: list[Tensor]
    states: list[dict[str, Tensor]]


class DeepSpeedCheckpoint(HeldSource):
    """A ``Source`` over all files of one tag.

    Args:
        path: the folder of the tag.
        verify: which tensors' bytes are compared with the archives' CRC-32s before any of a file are given.

    Raises:
        CorruptCheckpoint: a rank's file is missing, damaged, or names what no checkpoint needs.
        MismatchedCheckpoint: tensor, pipeline or expert parallel; states on NVMe; an optimizer that is not read.
    """

    def __init__(self, path: Path, verify: Verify = "full") -> None:
        super().__init__(path)
        self._verify: Verify = verify
        self._lock = threading.RLock()
        self._is_sharded = False
        self._ranks: dict[int, RankState] = {}
        self._models: dict[int, tuple[TorchFile, ModelState]] = {}
        with self.naming("checkpoint of DeepSpeed"):
            self._files = list_files(self.path)
            file, self._model = self._open_model(0)
            self.buffers = {name: file.check(value) for name, value in self._model.buffers.items()}
            self.facts = self._model.facts
            if self._files.optimizer:
                self._read_sharded()
            elif self._model.shapes is None and self._model.optimizer is not None:
                self._read_unsharded(file)
            elif self._model.shapes is None:
                self._read_frozen(())
            else:
                raise CorruptCheckpoint(f"not one of the {self.facts.world} ranks' *_optim_states.pt is there")

    def close(self) -> None:
        """Let go of files; one stays mapped as long as a tensor that was read from it is held."""
        self._ranks.clear()
        self._models.clear()

    def _read_sharded(self) -> None:
        """Stages 1 to 3: layout, kinds and settings, all from rank 0's file."""
        world = len(self._files.optimizer)
        first = TorchFile(self._files.optimizer[0], KNOWN, self._verify)
        said = dict(items(first.content[_STATE]))
        self._is_sharded = _SHARDED in said
        _check_world(said, self.facts.world, world, self._files, self._is_sharded)
        shapes = self._model.shapes
        if shapes is None:
            raise CorruptCheckpoint("the model's file has no param_shapes, and ranks have files of flats")
        # zero_stage would not do: BF16_Optimizer does not say it
        if self._is_sharded:
            self._layout = sharded_layout(shapes, world)
        else:
            self._layout = flat_layout(shapes, said.get("param_alignment_paddings"), world)
        self._ranks[0] = RankState(first, *_flats(said, self._layout, 0, first.path))
        numbers, kinds = self._kinds_and_numbers(said)
        for flat, names in enumerate(self._layout.groups):
            for name in names:
                place, shape = self._layout.places[name], shapes[flat][name]
                self.parameters[name] = self._model.parameter(name, shape, True)
                self.held[name] = {kind: (place, self._flat_of(kind, flat)) for kind in kinds[flat]}
                self.numbers[name] = numbers[flat]
        self._read_frozen(self._layout.places)
        base = said[_STATE] if self._is_sharded else said["base_optimizer_state"]
        self.facts = replace(
            self.facts,
            scaler=read_scaler(said, self.facts.global_steps),
            param_groups=self._settings(base),
        )

    def _kinds_and_numbers(self, said: dict[str, Any]) -> tuple[list[dict[str, float]], list[tuple[str, ...]]]:
        """Of each flat: the optimizer's numbers, and the kinds of its tensors."""
        first = self._ranks[0]
        numbers = [scalars_in(state) for state in _states(said, len(self._layout.groups))]
        unused = _UNUSED.get((self.facts.optimizer or "").lower())
        return numbers, [(MASTER, *(kind for kind in states if kind != unused)) for states in first.states]

    def _settings(self, base: Any) -> list[dict[str, Any]]:
        if isinstance(base, list):  # an elastic checkpoint keeps none
            return []
        groups = base["param_groups"]
        members: list[list[str]] = []
        for group in groups:
            flats = group.get("params", [])
            names = [n for flat in flats if flat < len(self._layout.groups) for n in self._layout.groups[flat]]
            members.append(names)
        return settings_of(groups, members)

    def _flat_of(self, kind: str, flat: int) -> Any:
        def of_rank(rank: int) -> Tensor:
            state = self._rank(rank)
            if kind != MASTER and kind not in state.states[flat]:
                raise CorruptCheckpoint(f"{state.file.path} has no {kind}, and other ranks' files have")
            return state.file.check(state.masters[flat] if kind == MASTER else state.states[flat][kind])

        return of_rank

    def _rank(self, rank: int) -> RankState:
        """A rank's file, opened once, its flats of the size that they must have."""
        with self._lock, self.naming("checkpoint of DeepSpeed"):
            if rank not in self._ranks:
                file = TorchFile(self._files.optimizer[rank], KNOWN, self._verify)
                said = file.content[_STATE]
                self._ranks[rank] = RankState(file, *_flats(said, self._layout, rank, file.path))
            return self._ranks[rank]

    def _open_model(self, rank: int) -> tuple[TorchFile, ModelState]:
        with self._lock, self.naming("checkpoint of DeepSpeed"):
            if rank not in self._models:
                file = TorchFile(self._files.model[rank], KNOWN, self._verify)
                self._models[rank] = (file, read_model_state(file.content))
            return self._models[rank]

    def _read_frozen(self, trained: Any) -> None:
        """What is not trained: whole in the model's file, or (stage 3) a share of it in each rank's."""
        model = self._model
        if self._is_sharded:
            for name, shape in model.frozen_shapes.items():
                self.parameters[name] = model.parameter(name, shape, False)
                place = shared_place(numel_of(shape), len(self._files.optimizer))
                self.held[name] = {PARAMETERS: (place, self._share_of(name, place))}
            return
        for name, value in model.weights.items():
            if name not in trained:
                self.parameters[name] = model.parameter(name, tuple(value.shape), False)
                self.held[name] = {PARAMETERS: whole(value, self._models[0][0].check)}

    def _share_of(self, name: str, place: Place) -> Any:
        def of_rank(rank: int) -> Tensor:
            if rank not in self._files.model:
                raise CorruptCheckpoint(f"{self.path} has no *_model_states.pt of rank {rank}")
            file, model = self._open_model(rank)
            share = model.fragments.get(name)
            if share is None or share.numel() != place.share:
                raise CorruptCheckpoint(f"{self._files.model[rank]} has no share of {place.share} elements of {name!r}")
            return file.check(share).reshape(-1)

        return of_rank

    def _read_unsharded(self, file: TorchFile) -> None:
        """Stage 0: everything is in one file."""
        found = read_unsharded(self._model, self._model.optimizer, file.check)
        for name, kinds in found.held.items():
            shape = tuple(self._model.weights[name].shape)
            self.parameters[name] = self._model.parameter(name, shape, True)
            self.held[name], self.numbers[name] = kinds, found.numbers[name]
        self._read_frozen(found.held)
        scaler = read_scaler(self._model.optimizer, self.facts.global_steps)
        self.facts = replace(self.facts, param_groups=found.groups, scaler=scaler)


def list_files(path: Path) -> Files:
    """A tag's files by rank.

    Raises:
        CorruptCheckpoint: some are missing: says which.
        MismatchedCheckpoint: they are of a kind of parallelism that is not read.
    """
    found, prefixes, whole_models, num_models = Files(), set(), 0, 0
    for each in sorted(path.iterdir()):
        name = each.name
        if "expert" in name or name.startswith("expp_rank"):
            raise MismatchedCheckpoint(f"{name} is of experts spread over ranks (MoE): not read here")
        if name.startswith("layer_"):
            raise MismatchedCheckpoint(f"{name} is of pipeline-parallel training: not read here")
        if name == "offloaded_tensors":
            raise MismatchedCheckpoint(
                "the optimizer's states were on NVMe, and are swap files that only the run that wrote them can place: "
                "load it there with offload_optimizer on cpu, and save again"
            )
        model, optimizer = _MODEL.fullmatch(name), _OPTIMIZER.fullmatch(name)
        part = int((model or optimizer or [0, 0, 0])[2 if model else 3]) if model or optimizer else 0
        if part:
            raise MismatchedCheckpoint(f"{name} is of tensor-parallel training, part {part}: not read here")
        if model:
            num_models += 1
            whole_models += model[1] is None
            found.model[int(model[1] or 0)] = each
        elif optimizer:
            prefixes.add(optimizer[1])
            found.optimizer[int(optimizer[2])] = each
    if not found.model or 0 not in found.model:
        raise CorruptCheckpoint("it has no model_states.pt of rank 0")
    if len(prefixes) > 1 or 0 < whole_models < num_models:
        raise CorruptCheckpoint("it has files of two runs, of stage 3 and not, or of bf16 and not: save to another tag")
    _check_ranks(found.optimizer, 0)
    return found


def _check_ranks(files: dict[int, Path], world: int) -> None:
    last = max([*files, world - 1])
    if len(files) <= last:
        missing = (rank for rank in range(last + 1) if rank not in files)
        names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in islice(missing, 3)]
        raise CorruptCheckpoint(f"files of {last + 1 - len(files):,} ranks are missing, such as {', '.join(names)}")


def _check_world(said: dict[str, Any], world: int, num_files: int, files: Files, is_sharded: bool) -> None:
    """Every rank's file must be there, and be of a rank that shares all parameters with all others."""
    counts = said.get("partition_count", world)
    counts = counts if isinstance(counts, list) else [counts]
    for count in counts:
        checked_count(count, "partition_count", 1, MOST_RANKS)
    if len(set(counts)) > 1 or said.get("ds_zero_partition_groups"):
        raise MismatchedCheckpoint(
            "its parameters are shared by groups of ranks of their own (MoE, MiCS): not read here"
        )
    _check_ranks(files.optimizer, world)
    if num_files != world:
        raise CorruptCheckpoint(f"it has *_optim_states.pt of {num_files} ranks, and was saved by {world}")
    missing = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world) if rank not in files.model]
    if is_sharded and missing:
        raise CorruptCheckpoint(f"files of {len(missing)} ranks are missing: {some_names(missing)}")
    if counts and counts[0] != world:
        raise MismatchedCheckpoint(f"{world} ranks, of which {counts[0]} share a model (MiCS): not read here")


def _states(said: dict[str, Any], num_flats: int) -> list[Any]:
    """The optimizer's state of each flat; empty where it has not stepped yet."""
    base = said[_STATE] if _SHARDED in said else said["base_optimizer_state"]
    if isinstance(base, list):
        if len(base) != num_flats:
            raise ValueError(f"states of {len(base)} groups for {num_flats} of parameters")
        return base
    state = dict(items(base["state"]))
    if set(state) - set(range(num_flats)):
        raise ValueError(f"states of {some_names([str(k) for k in state])} for {num_flats} groups of parameters")
    return [state.get(flat, {}) for flat in range(num_flats)]


def _flats(said: Any, layout: Layout, rank: int, path: Path) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """One rank's masters and states, each of the size that the layout asks for."""
    masters = said[_SHARDED if _SHARDED in said else _FLAT]
    if not isinstance(masters, list) or len(masters) != len(layout.groups):
        raise ValueError(f"{path.name} has not one flat for each of the {len(layout.groups)} groups of parameters")
    states = []
    for flat, (master, state) in enumerate(zip(masters, _states(said, len(masters)), strict=True)):
        sizes = layout.sizes(rank, flat)
        if not isinstance(master, Tensor) or master.dim() != 1 or master.numel() not in sizes:
            raise ValueError(f"{path.name}: flat {flat} has not the {sizes[1]} elements that its parameters need")
        states.append({key: value.reshape(-1) for key, value in tensors_in(state, sizes).items()})
    return masters, states
