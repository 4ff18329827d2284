"""Build a model that no rank ever holds whole: each module's parameters are sharded as soon as it is attached.

    with ts.zero.Init():
        model = HugeModel()          # every rank keeps 1/N of each parameter, rank 0's values

PyTorch's own registration hook tells when a module joins its parent: by then it is constructed. Initialisation that
comes later in a constructor (``nn.init.normal_(self.fc.weight)``, ``self.apply(init)``) finds the values whole, and
what it writes is kept. Parameters on the meta device have no values yet: ``meta`` makes them, one unit at a time, when
the model is sharded.

A rank's parts may wait on the host or on disk (``remote_device``, or the config's ``offload_param``): then memory holds
what constructors have open, at most ``OPEN_AT_MOST_ELEMS`` or the config's ``max_live_parameters``, and when the model
is sharded, one unit at a time. Files stand in a folder of their own under ``nvme_path``, and go when what built them is
gone.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.config import Config, load
from tritonspeed.offload import Offload, Tier
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.group import Group, group_of, groups_of
from tritonspeed.zero.guard import GATHER_FIRST, GuardedParameters, ModuleHook
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.layout import lay_out
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.plan import BucketPlan, BucketTypes
from tritonspeed.zero.stages import stage_of

OPEN_AT_MOST_ELEMS = 100_000_000  # what constructors may have whole at once: 400 MB of fp32

_IGNORED = {
    "mem_efficient_linear": "autograd saves no copy of a weight here",
    "sequence_data_parallel_group": "data_parallel_group names the ranks",
    "param_swapper": "remote_device says where parameters wait",
    "zero_param_parallel_group": "there is one group of ranks",
    "zero_quantized_weights": "nothing is quantised",
    "zero_quantized_nontrainable_weights": "nothing is quantised",
}  # DeepSpeed's other arguments, and why they change nothing

_folder_numbers = itertools.count()
_active: Init | None = None


def is_building() -> bool:
    """Whether a ``zero.Init`` is open in this process."""
    return _active is not None


class BuildingParameters(GuardedParameters):
    """A module's ``_parameters`` while the model is built: iterating reads them all."""

    __slots__ = ()

    def _read_all(self) -> None:
        for name in self:
            self[name]

    def items(self) -> Any:
        self._read_all()
        return super().items()

    def values(self) -> Any:
        self._read_all()
        return super().values()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Parameter | None]:
        return {name: copy.deepcopy(self[name], memo) for name in self}


class CutParameters(dict):
    """A module's ``_parameters`` once the model is built. A deep copy has the values, whole; it is collective.

    PEFT copies a layer that is trained beside its adapters, before anything is trained.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Parameter | None]:
        missing = [p for p in self.values() if p is not None and id(p) not in memo]  # the copier may bring its own
        groups = groups_of(missing)
        for group in groups:
            group.acquire("copied")
        try:
            return {name: copy.deepcopy(p, memo) for name, p in self.items()}
        finally:
            for group in groups:
                group.release("copied")
                group.reshard()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Unready:
    """Pre-hook of a module whose parameters ``zero.Init`` has cut: keeps their parts alive, and refuses its forward.

    It goes when a sharded model takes the parameters over.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: Any) -> None:
        mine = any(p is not None and group_of(p) is self.group for p in dict.values(module._parameters))
        if mine and not self.group.is_whole:
            raise ValueError(
                f"{type(module).__name__} was built under zero.Init and nobody gathers its parameters yet: pass the"
                " model to initialize() or zero.shard() first, or enter ts.zero.GatheredParameters(model.parameters())"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook()  # the copy is whole: there is nothing to keep, or to refuse

    def __reduce__(self) -> Any:
        raise ValueError(
            "a model built under zero.Init is sharded over the ranks and cannot be pickled: pickle it before, or a"
            f" copy.deepcopy() of it, which has the values whole, or read its values {GATHER_FIRST}"
        )


class BuildingHomes(Homes):
    """Where the parts of a model wait until it is trained: all in one tier, on disk in a folder of their own.

    Args:
        offload: the tier is that of ``parameters``; ``max_in_cpu`` elements stay on the host where that is the disk.
        mesh: the ranks.
        ledger: what is entered of them.
    """

    def __init__(self, offload: Offload, mesh: Mesh, ledger: Ledger) -> None:
        self.place: Path | None = None
        if Tier.of(offload.parameters) is Tier.DISK:
            path = Path(str(offload.parameters_path or offload.path))
            with suppress(OSError):  # what is wrong with it the disk's own errors say
                path.mkdir(exist_ok=True)
            self.place = path / f"zero_init-{next(_folder_numbers)}-rank-{mesh.rank}"
            offload = replace(offload, parameters_path=self.place)
        super().__init__(offload, mesh, stage_of(3), ledger)
        self._in_host = offload.max_in_cpu
        if self.place is not None:
            finalize(self, _leave, self._folders, self.place)

    def assign(self, plan: BucketPlan) -> None:
        """Choose the tier of a bucket that is about to be made."""
        tier = Tier.of(self.offload.parameters)
        if tier is Tier.DISK and plan.layout.slice_numel <= self._in_host:
            self._in_host -= plan.layout.slice_numel
            tier = Tier.HOST
        self._tiers[plan.name] = (Tier.DEVICE, tier)


def _leave(folders: dict[str, Any], place: Path) -> None:
    for folder in folders.values():
        folder.close()
    shutil.rmtree(place, ignore_errors=True)


class Init:
    """Context manager with DeepSpeed's name and arguments; see the module's docstring.

    Args:
        module: a finished model to shard now, instead of building one inside the context.
        data_parallel_group: the ranks; None is everyone.
        config_dict_or_path: the config of the training to come: its ``offload_param`` says where parts wait. Precision
            is chosen when the model is sharded for training.
        config: its older name.
        enabled: False makes the context a no-op.
        dtype: cast parameters to this as they are sharded; None keeps their own.
        remote_device: "none", "cpu" or "nvme": where parts wait; None takes the config's, or the training device.
        pin_memory: page-lock what waits on the host; None takes the config's.
        mpu: an object with ``get_data_parallel_group()``, where ``data_parallel_group`` is not given.
        ignored: DeepSpeed's remaining arguments, which change nothing here.

    Contexts nest (the outermost acts), and an exception inside leaves nothing behind.

    Raises:
        ValueError: "nvme" without a config that names the folder; two configs; an argument that DeepSpeed has not.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        *,
        remote_device: str | None = None,
        pin_memory: bool | None = None,
        mpu: Any = None,
        **ignored: Any,
    ) -> None:
        unknown = sorted(set(ignored) - set(_IGNORED))
        if unknown:
            raise TypeError(f"zero.Init() got an unexpected keyword argument {unknown[0]!r}")
        self.enabled, self.dtype = enabled, dtype
        self.ledger = Ledger()
        self.mesh, self.homes, self.open_at_most_elems = None, None, OPEN_AT_MOST_ELEMS
        if enabled:
            self.mesh = comm.mesh_of(data_parallel_group or mpu)
            known = _one_config(config_dict_or_path, config)
            self.homes = BuildingHomes(_offload(known, remote_device, pin_memory), self.mesh, self.ledger)
            self.open_at_most_elems = min(OPEN_AT_MOST_ELEMS, _max_live(known))
        self._open: list[Group] = []
        self._guarded: list[nn.Module] = []
        self._made: list[ref[Group]] = []
        self._handle: Any = None
        self._count = 0
        if module is not None and enabled:
            self._attach(None, "", module)
            self._flush()
            self._unguard()

    def __enter__(self) -> Init:
        global _active
        if self.enabled and _active is None:
            _active = self
            self._handle = nn.modules.module.register_module_module_registration_hook(self._attach)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        global _active
        if self._handle is None:
            return
        self._handle.remove()
        self._handle, _active = None, None
        if kind is None:
            self._flush()
        self._unguard()

    def _attach(self, parent: nn.Module | None, name: str, module: nn.Module | None) -> None:
        if module is None:
            return
        self._flush_beyond(self.open_at_most_elems)
        for owner in module.modules():
            parameters = [p for p in dict.values(owner._parameters) if p is not None]
            fresh = [p for p in parameters if group_of(p) is None and p.device.type != "meta" and p.is_floating_point()]
            for kind in dict.fromkeys((p.dtype, p.requires_grad) for p in fresh):  # in one order on every rank
                self._shard(owner, [p for p in fresh if (p.dtype, p.requires_grad) == kind])
            if fresh:
                owner.__dict__["_parameters"] = BuildingParameters(dict(dict.items(owner._parameters)), self._read)
                self._guarded.append(owner)

    def _shard(self, owner: nn.Module, parameters: list[Parameter]) -> None:
        assert self.mesh is not None and self.homes is not None, "an enabled Init has a mesh and homes"
        compute = self.dtype or parameters[0].dtype
        self._count += 1
        name = f"zero.Init {self._count} ({type(owner).__name__})"
        plan = BucketPlan(
            name,
            lay_out([(str(i), tuple(p.shape)) for i, p in enumerate(parameters)], compute.itemsize, self.mesh.world),
            parameters,
            BucketTypes(compute=compute, master=compute, accumulate=torch.float32, reduce=None),
            persistent=False,
        )
        self.homes.assign(plan)
        bucket = Bucket(plan, self.mesh, stage_of(3), self.ledger, trains=False, homes=self.homes)
        group = Group(self._count, name, [bucket], [owner])
        group.keeper = owner.register_forward_pre_hook(Unready(group), prepend=True)
        group.reshard()
        self._made.append(ref(group))

    def _read(self, group: Group) -> None:
        if _active is self and not group.is_whole:
            self._flush_beyond(self.open_at_most_elems - group.num_elems)
            group.acquire("init")
            self._open.append(group)

    def _flush_beyond(self, num_elems: int) -> None:
        while self._open and sum(g.num_elems for g in self._open) > num_elems:
            self._close(self._open.pop(0))

    def _flush(self) -> None:
        self._flush_beyond(-1)

    def _close(self, group: Group) -> None:
        """Rank 0's values of a module that was read, and perhaps written, become everyone's."""
        assert self.mesh is not None, "an enabled Init has a mesh"
        for bucket in group.buckets:
            comm.broadcast_(self.mesh, bucket.whole, 0, bucket.name)
            bucket.take_back(range(len(bucket.parameters)))
        group.release("init")
        group.reshard()

    def _unguard(self) -> None:
        for module in self._guarded:
            module.__dict__["_parameters"] = CutParameters(dict.items(module._parameters))
        kept = {id(p) for module in self._guarded for p in module._parameters.values()}
        for group in filter(None, (made() for made in self._made)):  # what constructors replaced: tied weights
            group.disown([p for bucket in group.buckets for p in bucket.parameters if id(p) not in kept])
        self._guarded, self._made = [], []


def _one_config(config_dict_or_path: Any, config: Any) -> Config | None:
    if config_dict_or_path is not None and config is not None and config_dict_or_path != config:
        raise ValueError("zero.Init() was given two configs: pass config_dict_or_path alone, config is its older name")
    given = config if config_dict_or_path is None else config_dict_or_path
    return None if given is None else load(given)


def _max_live(config: Config | None) -> int:
    """Elements that the config lets stand whole at once; "auto" is no bound yet."""
    most = OPEN_AT_MOST_ELEMS if config is None else config.zero_optimization.max_live_parameters
    return most if isinstance(most, int) else OPEN_AT_MOST_ELEMS


def _offload(known: Config | None, remote_device: str | None, pin_memory: bool | None) -> Offload:
    """Where the parts of a model that is built are to wait."""
    asked, tier = Offload(), Tier.DEVICE
    if known is not None:
        asked = Offload.from_config(known)
        number = known.zero_optimization.stage
        tier = Tier.of(asked.parameters) if stage_of(number).shards_parameters else Tier.DEVICE
    if remote_device is not None:
        tier = Tier.of(remote_device)
    if tier is Tier.DISK and not (asked.parameters_path or asked.path):
        raise ValueError(
            'zero.Init(remote_device="nvme") needs a folder on the disk: pass config_dict_or_path, a config whose'
            " zero_optimization.offload_param has an nvme_path"
        )
    pin = asked.pin_memory if pin_memory is None else pin_memory
    return replace(asked, optimizer=Tier.DEVICE, parameters=tier, pin_memory=pin)
