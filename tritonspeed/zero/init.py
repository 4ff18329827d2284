"""Build a model that no rank ever holds whole: each module's parameters are sharded as soon as it is attached.

    with ts.zero.Init():
        model = HugeModel()          # every rank keeps 1/N of each parameter, rank 0's values

PyTorch's own registration hook tells when a module joins its parent: by then it is constructed. Initialisation that
comes later in a constructor (``nn.init.normal_(self.fc.weight)``, ``self.apply(init)``) finds the values whole, and
what it writes is kept. Parameters on the meta device have no values yet: ``reset_parameters`` makes them, one unit at a
time, when the model is sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.zero.bucket import Bucket, Ledger
from tritonspeed.zero.group import Group, group_of
from tritonspeed.zero.guard import GATHER_FIRST, GuardedParameters
from tritonspeed.zero.layout import lay_out
from tritonspeed.zero.plan import BucketPlan, BucketTypes
from tritonspeed.zero.stages import stage_of

OPEN_AT_MOST_ELEMS = 100_000_000  # what constructors may have whole at once: 400 MB of fp32

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

    def __reduce__(self) -> Any:
        raise ValueError(
            "a model built under zero.Init is sharded over the ranks and cannot be copied or pickled: copy it before,"
            f" or read its values {GATHER_FIRST}"
        )


class Init:
    """Context manager with DeepSpeed's name and arguments; see the module's docstring.

    Args:
        module: a finished model to shard now, instead of building one inside the context.
        data_parallel_group: the ranks; None is everyone.
        config_dict_or_path, config: accepted as DeepSpeed does; precision is chosen when the model is sharded for
        training.
        enabled: False makes the context a no-op.
        dtype: cast parameters to this as they are sharded; None keeps their own.
        ignored: DeepSpeed's remaining arguments (mem_efficient_linear, remote_device "cpu", pin_memory, mpu, ...).

    Contexts nest (the outermost acts), and an exception inside leaves nothing behind.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        if ignored.get("remote_device") == "nvme":
            raise ValueError('zero.Init(remote_device="nvme") comes with the offload work: leave it out until then')
        self.enabled, self.dtype = enabled, dtype
        self.mesh = comm.mesh_of(data_parallel_group or ignored.get("mpu")) if enabled else None
        self.ledger = Ledger()
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
        self._flush_beyond(OPEN_AT_MOST_ELEMS)
        for owner in module.modules():
            parameters = [p for p in dict.values(owner._parameters) if p is not None]
            fresh = [p for p in parameters if group_of(p) is None and p.device.type != "meta" and p.is_floating_point()]
            for kind in dict.fromkeys((p.dtype, p.requires_grad) for p in fresh):  # in one order on every rank
                self._shard(owner, [p for p in fresh if (p.dtype, p.requires_grad) == kind])
            if fresh:
                owner.__dict__["_parameters"] = BuildingParameters(dict(dict.items(owner._parameters)), self._read)
                self._guarded.append(owner)

    def _shard(self, owner: nn.Module, parameters: list[Parameter]) -> None:
        assert self.mesh is not None, "an enabled Init has a mesh"
        compute = self.dtype or parameters[0].dtype
        self._count += 1
        name = f"zero.Init {self._count} ({type(owner).__name__})"
        plan = BucketPlan(
            name,
            lay_out([(str(i), tuple(p.shape)) for i, p in enumerate(parameters)], compute.itemsize, self.mesh.world),
            parameters,
            BucketTypes(compute=compute, master=parameters[0].dtype, accumulate=torch.float32, reduce=None),
            persistent=False,
        )
        bucket = Bucket(plan, self.mesh, stage_of(3), self.ledger)
        group = Group(self._count, name, [bucket], [owner])
        group.keeper = owner.register_forward_pre_hook(Unready(group), prepend=True)
        group.reshard()
        self._made.append(ref(group))

    def _read(self, group: Group) -> None:
        if _active is self and not group.is_whole:
            self._flush_beyond(OPEN_AT_MOST_ELEMS - group.num_elems)
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
            module.__dict__["_parameters"] = dict(dict.items(module._parameters))
        kept = {id(p) for module in self._guarded for p in module._parameters.values()}
        for group in filter(None, (made() for made in self._made)):  # what constructors replaced: tied weights
            group.disown([p for bucket in group.buckets for p in bucket.parameters if id(p) not in kept])
        self._guarded, self._made = [], []


def _owners(model: nn.Module, parameters: Iterable[Parameter]) -> Iterator[nn.Module]:
    wanted = {id(p) for p in parameters}
    for module in model.modules():
        if any(id(p) in wanted for p in dict.values(module._parameters) if p is not None):
            yield module


def materialise(model: nn.Module, parameters: list[Parameter]) -> None:
    """Give parameters on the meta device memory and initial values, module by module, identity kept.

    Args:
        model: where the modules that own them are found.
        parameters: one unit's; the rest of an owning module's own parameters come along.

    Raises:
        ValueError: an owner has no ``reset_parameters`` to take values from.
    """
    missing = [p for p in parameters if p.device.type == "meta"]
    if not missing:
        return
    for owner in _owners(model, missing):
        reset = getattr(owner, "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"{type(owner).__name__} has parameters on the meta device and no reset_parameters() to give them"
                " values: define it, build the model under ts.zero.Init() instead, or load a checkpoint first"
            )
        own = [p for p in dict.values(owner._parameters) if p is not None]
        fresh = [p for p in own if p.device.type == "meta"]
        if not fresh:
            continue  # a head tied to an embedding that has come before
        values = [(p, p.detach().clone()) for p in own if p.device.type != "meta"]
        for p in fresh:
            torch.utils.swap_tensors(p, Parameter(torch.empty_like(p, device="cpu"), requires_grad=p.requires_grad))
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                setattr(owner, name, torch.empty_like(buffer, device="cpu"))
        reset()
        with torch.no_grad():
            for p, value in values:
                p.copy_(value)
