"""DeepSpeed's universal checkpoints: a folder per parameter, whole tensors; read as a ``Source``, and written.

    zero/{parameter}/fp32.pt, exp_avg.pt, ...         {"param": tensor}, or the tensor itself
    zero/{parameter}/step.pt                          the optimizer's numbers
    zero/optimizer_state.pt                           its settings; the loss scaler
    mp_rank_00_model_states.pt                        counters, schedule, buffers, names
    zero_pp_rank_0_mp_rank_00_model_states.pt         the same, for DeepSpeed's stage 3

A parameter's name is a folder's name here: only names that lead nowhere else are read or written.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.data_file import Verify
from tritonspeed.checkpoint.deepspeed.facts import (
    KNOWN,
    OWN_KEYS,
    ModelState,
    read_model_state,
    read_scaler,
    scalars_in,
    settings_of,
)
from tritonspeed.checkpoint.deepspeed.layout import Place, items, shared_place
from tritonspeed.checkpoint.deepspeed.torch_file import TorchFile
from tritonspeed.checkpoint.deepspeed.values import Held, HeldSource, whole
from tritonspeed.checkpoint.errors import CorruptCheckpoint, MismatchedCheckpoint
from tritonspeed.checkpoint.manifest import plain_name
from tritonspeed.checkpoint.record import GRADIENT, MASTER, OUTBOX, PARAMETERS
from tritonspeed.checkpoint.source import Source
from tritonspeed.offload.durable import sync_folder
from tritonspeed.zero.tensor_files import some_names

ZERO, STATE, FP32 = "zero", "optimizer_state.pt", "fp32"
MODEL, MODEL_SHARDED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
LATEST = "latest_universal"
WRITTEN_AS = "0.19.8"  # the DeepSpeed whose layout this is, which it asks for
STEP, _SUFFIX = "step", ".pt"
KEPT_OPEN = 8


class UniversalCheckpoint(HeldSource):
    """A ``Source`` over a universal folder.

    Args:
        path: the folder that has ``zero``.
        verify: which tensors' bytes are compared with the archives' CRC-32s before they are given.

    Raises:
        CorruptCheckpoint: a file is missing, damaged, or names what no checkpoint needs.
        MismatchedCheckpoint: experts, or tensor-parallel parts.
    """

    def __init__(self, path: Path, verify: Verify = "full") -> None:
        super().__init__(path)
        self._verify: Verify = verify
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        with self.naming("universal checkpoint of DeepSpeed"):
            self._folders = _folders(self.path / ZERO)
            files = _model_files(self.path)
            self._models = {0: self._open_model(files[0])}
            file, model = self._models[0]
            self.buffers = {name: file.check(value) for name, value in model.buffers.items()}
            state = dict(items(TorchFile(self.path / ZERO / STATE, KNOWN, verify).content))
            self._read_trained(model, state)
            self._read_frozen(model, files)
            shapes = model.shapes or []
            self.facts = replace(
                model.facts,
                scaler=read_scaler(state, model.facts.global_steps),
                param_groups=settings_of(state["param_groups"], members_of(state["param_groups"], shapes)),
            )

    def close(self) -> None:
        """Let go of files; one stays mapped as long as a tensor that was read from it is held."""
        self._opened.clear()

    def _open_model(self, path: Path) -> tuple[TorchFile, ModelState]:
        file = TorchFile(path, KNOWN, self._verify)
        return file, read_model_state(file.content)

    def _read_trained(self, model: ModelState, state: dict[str, Any]) -> None:
        common = _common_numbers(state)
        for shapes in model.shapes or []:
            for name, shape in shapes.items():
                kinds = self._folders.get(name)
                if kinds is None or FP32 not in kinds:
                    raise CorruptCheckpoint(f"{ZERO}/{name!r:.120} has no {FP32}{_SUFFIX}")
                self.parameters[name] = model.parameter(name, shape, True)
                self.held[name] = {
                    MASTER if kind == FP32 else kind: self._file(name, kind, prod(shape)) for kind in kinds - {STEP}
                }
                step = self._load(name, STEP) if STEP in kinds else None
                self.numbers[name] = common if step is None else scalars_in({STEP: step})

    def _read_frozen(self, model: ModelState, files: dict[int, Path]) -> None:
        """Whole among the model's weights, in shares in each rank's file, or in a folder like the trained ones."""
        for name, shape in model.frozen_shapes.items():
            weight = model.weights.get(name)
            if weight is not None and weight.numel() == prod(shape) and prod(shape):
                continue
            place = shared_place(prod(shape), len(files))
            self.parameters[name] = model.parameter(name, shape, False)
            self.held[name] = {PARAMETERS: (place, self._share_of(name, place.share, files))}
        known = {*self.parameters, *model.buffers, *(a for each in model.aliases.values() for a in each)}
        for name, weight in model.weights.items():
            if name not in known and weight.numel():
                self.parameters[name] = model.parameter(name, tuple(weight.shape), False)
                self.held[name] = {PARAMETERS: whole(weight, self._models[0][0].check)}
        for name in sorted(set(self._folders) - known - set(self.parameters)):
            value = self._value(name, FP32)
            self.parameters[name] = replace(model.parameter(name, tuple(value.shape), False), dtype=value.dtype)
            self.held[name] = {PARAMETERS: self._file(name, FP32, value.numel())}

    def _share_of(self, name: str, share: int, files: dict[int, Path]) -> Callable[[int], Tensor]:
        def of_rank(rank: int) -> Tensor:
            with self._lock, self.naming("universal checkpoint of DeepSpeed"):
                if rank not in self._models:
                    self._models[rank] = self._open_model(files[rank])
                file, model = self._models[rank]
            value = model.fragments.get(name)
            if value is None or value.numel() != share:
                raise CorruptCheckpoint(f"{files[rank]} has no share of {share} elements of {name!r}")
            return file.check(value).reshape(-1)

        return of_rank

    def _file(self, name: str, kind: str, numel: int) -> Held:
        def of_rank(rank: int) -> Tensor:
            value = self._value(name, kind)
            if value.numel() != numel:
                raise CorruptCheckpoint(
                    f"{self.path}: {kind}{_SUFFIX} of {name!r} has {value.numel()} elements, not {numel}"
                )
            return value.reshape(-1)

        return Place(0, numel, max(1, numel)), of_rank

    def _value(self, name: str, kind: str) -> Tensor:
        """A parameter's tensor, kept open for a while: a reader comes for its parts one after the other."""
        with self._lock, self.naming("universal checkpoint of DeepSpeed"):
            if (name, kind) not in self._opened:
                value = self._load(name, kind)
                if isinstance(value, dict):
                    if value.get("is_expert_param"):
                        raise MismatchedCheckpoint(f"{name!r} is of experts spread over ranks: not read here")
                    value = value.get("param")
                if not isinstance(value, Tensor):
                    raise CorruptCheckpoint(f"{kind}{_SUFFIX} of {name!r:.120} has no tensor")
                self._opened[name, kind] = value
                while len(self._opened) > KEPT_OPEN:
                    self._opened.popitem(last=False)
            return self._opened[name, kind]

    def _load(self, name: str, kind: str) -> Any:
        file = TorchFile(self.path / ZERO / name / f"{kind}{_SUFFIX}", KNOWN, self._verify)
        content = file.content
        for value in content.values() if isinstance(content, dict) else (content,):
            if isinstance(value, Tensor):
                file.check(value)
        return content


def _folders(path: Path) -> dict[str, frozenset[str]]:
    """Parameters' folders, as the system lists them → kinds of files in each. Nothing else is ever opened in there."""
    if not path.is_dir():
        raise CorruptCheckpoint(f"it has no folder {ZERO}")
    found = {}
    for each in sorted(path.iterdir()):
        if each.is_dir() and not each.is_symlink():
            found[each.name] = frozenset(p.name.removesuffix(_SUFFIX) for p in each.iterdir() if p.suffix == _SUFFIX)
    return found


def _model_files(path: Path) -> dict[int, Path]:
    """Rank → *_model_states.pt; of stages 0 to 2 there is one."""
    files = {name: path / name for name in (MODEL, MODEL_SHARDED) if (path / name).is_file()}
    parts = [p.name for p in path.glob("*mp_rank_*_model_states.pt") if "mp_rank_00_" not in p.name]
    if parts:
        raise MismatchedCheckpoint(f"{some_names(sorted(parts))} are of tensor-parallel training: not read here")
    if MODEL in files:
        return {0: files[MODEL]}
    if not files:
        raise CorruptCheckpoint(f"it has neither {MODEL} nor {MODEL_SHARDED}")
    ranks = {}
    while (file := path / f"zero_pp_rank_{len(ranks)}_mp_rank_00_model_states.pt").is_file():
        ranks[len(ranks)] = file
    return ranks


def _common_numbers(state: dict[str, Any]) -> dict[str, float]:
    """What stage 3 has once for all parameters."""
    base = state.get("optimizer_state_dict")
    states = dict(items(base["state"])) if base is not None else {}
    return scalars_in(next(iter(states.values()), {}))


def members_of(groups: Any, shapes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of each group of settings, whose "params" are numbers of flats."""
    found = []
    for group in groups:
        flats = [flat for flat in group.get("params", []) if 0 <= flat < len(shapes)]
        found.append([name for flat in flats for name in shapes[flat]])
    return found


def write_universal(source: Source, path: str | os.PathLike[str]) -> None:
    """Write a universal checkpoint that DeepSpeed loads ("checkpoint": {"load_universal": true}).

    Whole parameters are read one at a time, on one process. A file ``latest_universal`` beside the folder names it.
    Not written: random states, gradients in accumulation, the fp16 loss scale (it is a pickled class there).

    Args:
        source: of any kind.
        path: of the folder to make; nothing may be there yet.

    Raises:
        ValueError: something is there; or a parameter's name is no folder's name.
        OSError: the system's reason; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: name one that is not, or remove it")
    for name in source.parameters:
        try:
            for part in (name, *source.kinds(name)):
                plain_name(part)
        except ValueError as error:
            raise ValueError(f"parameter {name!r:.120} would be a folder of that name: {error}") from error
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        (hidden / ZERO).mkdir(parents=True)
        for name in source.parameters:
            _write_parameter(source, name, hidden / ZERO / name)
        _write_common(source, hidden)
        if path.exists():
            path.rmdir()
        os.rename(hidden, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    temporary = path.with_name(f".{LATEST}.{os.getpid()}")
    temporary.write_text(path.name)
    os.rename(temporary, path.with_name(LATEST))
    sync_folder(path.parent)


def _write_parameter(source: Source, name: str, folder: Path) -> None:
    folder.mkdir()
    facts, kinds = source.parameters[name], source.kinds(name)
    if not kinds:
        return
    values_of = MASTER if MASTER in kinds else PARAMETERS
    for kind in (values_of, *sorted(kinds - {MASTER, PARAMETERS, GRADIENT, OUTBOX})):
        values = source.read(kind, name, 0, prod(facts.shape))
        if not values.is_floating_point():
            raise ValueError(f"{kind} of {name!r} is kept as {values.dtype}, which DeepSpeed does not read")
        # a trained parameter's values are fp32; a frozen one keeps its dtype, DeepSpeed does not read it
        kept = values.float() if facts.trainable else values
        _save(
            {"param": kept.clone().view(facts.shape), "cat_dim": 0},
            folder / f"{FP32 if kind == values_of else kind}.pt",
        )
    if facts.trainable and "step" in (numbers := source.scalars(name)):
        _save(int(numbers["step"]), folder / f"{STEP}{_SUFFIX}")
    sync_folder(folder)


def _write_common(source: Source, folder: Path) -> None:
    facts = source.facts
    trained = [name for name, each in source.parameters.items() if each.trainable]
    groups = facts.param_groups
    members = [group.get("params") for group in groups]
    said = [name for names in members for name in names or ()]
    if None in members or sorted(said) != sorted(trained):
        groups, members = groups[:1] or [{}], [trained]
    settings = [{**{k: v for k, v in group.items() if k != "params"}, "params": [i]} for i, group in enumerate(groups)]
    steps = [source.scalars(name).get("step") for name in trained]
    step = int(max((s for s in steps if s is not None), default=facts.global_steps - facts.skipped_steps))
    inner = {"state": {i: {"step": step} for i in range(len(groups))}, "param_groups": settings}
    state = {"param_groups": settings, "optimizer_state_dict": inner, "ds_version": WRITTEN_AS}
    if facts.scaler is not None:  # for ourselves: DeepSpeed asks for an object of its own class
        names = {"cur_scale": "scale", "cur_iter": "num_updates", "last_overflow_iter": "last_overflow"}
        names |= {"cur_hysteresis": "hysteresis_left", "dynamic_loss_scale": "dynamic"}
        state |= {theirs: facts.scaler[ours] for theirs, ours in names.items()}
    _save(state, folder / ZERO / STATE)
    _save(_model_state(source, members), folder / MODEL)
    shutil.copyfile(folder / MODEL, folder / MODEL_SHARDED)
    _sync(folder / MODEL_SHARDED)
    sync_folder(folder / ZERO)
    sync_folder(folder)


def _model_state(source: Source, members: list[Any]) -> dict[str, Any]:
    facts, parameters = source.facts, source.parameters
    buffers = {name: value.detach().cpu().clone() for name, value in source.rank_state(0).get("buffers", {}).items()}
    return {
        "module": {**{n: torch.empty(0, dtype=p.dtype) for n, p in parameters.items()}, **buffers},
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [{name: torch.Size(parameters[name].shape) for name in names} for names in members],
        "shared_params": {alias: name for name, p in parameters.items() for alias in p.aliases},
        "lr_scheduler": facts.scheduler,
        "skipped_steps": facts.skipped_steps,
        "global_steps": facts.global_steps,
        "global_samples": facts.global_samples,
        "dp_world_size": facts.world,
        "mp_world_size": 1,
        "ds_config": {
            "gradient_accumulation_steps": facts.accumulation,
            "train_micro_batch_size_per_gpu": facts.micro_batch,
            **({"optimizer": {"type": facts.optimizer}} if facts.optimizer else {}),
        },
        "ds_version": WRITTEN_AS,
        **{key: value for key, value in facts.client_state.items() if key not in OWN_KEYS},
    }


def _save(value: Any, path: Path) -> None:
    torch.save(value, path)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
