"""Put the parts together: a model and an optimizer become units, buckets, hooks and a step.

model, optimizer = ts.zero.shard(model, optimizer, stage=3, precision="bf16")
model(x).sum().backward()
optimizer.step()
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.kernels.host_step import COMPILED_FROM_ELEMS, choose_host_step, use_host_step
from tritonspeed.offload import Offload
from tritonspeed.precision import LossScaler, Policy
from tritonspeed.zero.bucket import Bucket
from tritonspeed.zero.group import Group, group_of, groups_of
from tritonspeed.zero.homes import Homes
from tritonspeed.zero.hooks import Hooks
from tritonspeed.zero.ledger import Ledger
from tritonspeed.zero.meta import materialise
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.parameter_offload import ParameterOffload
from tritonspeed.zero.plan import UnitPlan, plan_buckets, plan_units
from tritonspeed.zero.reduce import Reducer, departure_order
from tritonspeed.zero.stages import Stage, stage_of
from tritonspeed.zero.step import ZeroOptimizer

M = TypeVar("M", bound=nn.Module)


class ShardedModel:
    """The run-time state of one sharded model: what the engine drives. Holds no module state of its own.

    Args:
        model: its parameters are moved into buckets; its hooks are installed.
        stage: 0 to 3.
        policy: dtypes; ``None`` keeps every parameter's own dtype, with fp32 masters for the 16-bit ones.
        options: sizes and switches.
        mesh: the ranks; None is everyone.
        trains: False where no optimizer will be attached: then nothing is kept for one.

    A model that is sharded already, as a whole, is taken over, one unit at a time: whoever managed it before (an engine
    for training, and this one evaluates) cannot step it any more.

    Raises:
        ValueError: a part of a model that is sharded already, or a sharded model whose state is on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int = 0,
        policy: Policy | None = None,
        options: ShardOptions | None = None,
        mesh: Mesh | None = None,
        trains: bool = True,
    ) -> None:
        earlier = _whom_it_follows(model)
        for each in earlier:
            each.give_up()
        self.taken_over = False
        self.model, self.options, self.trains = model, options or ShardOptions(), trains
        self.stage: Stage = stage_of(stage)
        self.mesh = mesh or comm.mesh_of()
        self.ledger = Ledger()
        self.stepper: ZeroOptimizer | None = None
        self.policy = policy
        self.plans = plan_units(
            model,
            self.options.leaves,
            self.options.param_persistence_threshold,
            self.options.model_persistence_threshold,
        )
        buckets = [plan_buckets(unit, self.mesh.world, policy, self.options.wire) for unit in self.plans]
        self.homes = Homes(
            self.options.offload, self.mesh, self.stage, self.ledger, [plan for plans in buckets for plan in plans]
        )
        self.groups = [self._build_group(i, plan) for i, plan in enumerate(self.plans)]
        for each in earlier:
            each.homes.close()
        self._move_buffers()
        trainable = departure_order(self.groups)
        self.reducer = Reducer(
            trainable, self.options.overlap, self.options.reduce_bucket_size, self.stage.shards_gradients
        )
        self.reducer.requires_all = not self.options.ignore_unused_parameters
        self.hooks = Hooks(model, self.groups, self.reducer, self.options.limits)
        self.parameter_offload = ParameterOffload(self.hooks) if self.stage.shards_parameters else None
        for group in self.groups:
            group.reshard()
        self.ledger.reset_peaks()

    @property
    def buckets(self) -> list[Bucket]:
        """Every bucket, in unit order."""
        return [b for g in self.groups for b in g.buckets]

    def _build_group(self, index: int, plan: UnitPlan) -> Group:
        parameters = [p for _, p in plan.parameters]
        materialise(self.model, parameters, reads=self.mesh.rank == 0)  # a bucket takes rank 0's values
        earlier = groups_of(parameters)  # parameters that zero.Init has sharded one module at a time
        for group in earlier:
            group.acquire("regroup")
        plans = plan_buckets(plan, self.mesh.world, self.policy, self.options.wire)
        buckets = [Bucket(p, self.mesh, self.stage, self.ledger, self.trains, self.homes) for p in plans]
        made = Group(index, plan.name, buckets, plan.modules)
        made.owner = ref(self)
        for group in earlier:
            group.disown(parameters)
            group.release("regroup")
            group.reshard()
        made.reshard()
        return made

    def _move_buffers(self) -> None:
        """Buffers to the device, with rank 0's values. They keep their dtype, as in DeepSpeed: a rotary table loses too
        much in bf16. Statistics of a batch norm take its weights': torch computes it in one dtype."""
        statistics = {b: m.weight for m in self.model.modules() if isinstance(m, _NormBase) for b in m.buffers(False)}
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                weight = statistics.get(buffer) if buffer.is_floating_point() else None
                buffer.data = buffer.data.to(self.mesh.device, buffer.dtype if weight is None else weight.dtype)
                comm.broadcast_(self.mesh, buffer.data, 0, f"buffer {name}")

    def attach(self, optimizer: torch.optim.Optimizer, **options: Any) -> ZeroOptimizer:
        """Step ``optimizer`` on this model's shards; ``options`` are those of ``ZeroOptimizer``."""
        if self.mesh.device.type == "cpu" or self.homes.offloads_optimizer:
            _choose_host_step(sum(s.numel for bucket in self.reducer.buckets for s in bucket.layout.spans), self.mesh)
        self.stepper = ZeroOptimizer(
            optimizer,
            self.reducer.buckets,
            self.mesh,
            self.reducer,
            self.ledger,
            average=self.options.average,
            sub_group_size=self.options.sub_group_size,
            check_overflow=self.options.check_overflow,
            homes=self.homes,
            **options,
        )
        if self.parameter_offload is not None:
            self.stepper.parameter_offload = self.parameter_offload
        return self.stepper

    def full_state_dict(self, rank0_only: bool = True) -> dict[str, Tensor]:
        """Every parameter and buffer whole, on the CPU, one unit in memory at a time. Collective: all ranks call it.

        Args:
            rank0_only: other ranks return an empty dictionary.
        """
        wanted = not rank0_only or self.mesh.rank == 0
        found: dict[str, Tensor] = {}
        names: dict[Parameter, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(p, []).append(name)
        for group in self.groups:
            group.acquire("state_dict")
            for bucket in group.buckets if wanted else ():
                for p in bucket.parameters:
                    found |= dict.fromkeys(names[p], p.detach().to("cpu", copy=True))
            group.release("state_dict")
            group.reshard()
        if not wanted:
            return {}
        tensors = {**found, **{n: b.detach().to("cpu", copy=True) for n, b in self.model.named_buffers()}}
        order = self.model.state_dict(keep_vars=True)
        return {name: tensors[name] for name in order if name in tensors}

    def give_up(self) -> None:
        """Let another sharded model take the parameters over; nothing can be stepped here any more."""
        self.taken_over = True
        self.hooks.remove()
        if self.stepper is not None:
            self.stepper.retire()
        self._let_go_of_model()

    def _let_go_of_model(self) -> None:
        if self.model.__dict__.get("_tritonspeed") is self:
            del self.model.__dict__["_tritonspeed"]

    def destroy(self) -> None:
        """Take the hooks off and make the model an ordinary one again, whole on every rank. Collective at stage 3."""
        self.hooks.remove()
        for group in self.groups:
            group.acquire("destroyed")
            group.forget()
        if self.stepper is not None:
            self.stepper.late.finish()
        self.homes.close()
        self._let_go_of_model()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied or pickled model is an ordinary one: see ``guard``


def _choose_host_step(num_elems: int, mesh: Mesh) -> None:
    """One form of the update on all ranks: replicas would drift apart by last bits. Collective for large models."""
    mine = choose_host_step(num_elems)
    if num_elems < COMPILED_FROM_ELEMS or mesh.is_simulated:
        return
    compiles = torch.full((1,), float(mine == "compiled"), dtype=torch.float64, device=mesh.device)
    everywhere = all(comm.read_scalars(mesh, comm.exchange(mesh, compiles).flatten()))
    if mine == "compiled" and not everywhere:
        use_host_step("chunked")


def _whom_it_follows(model: nn.Module) -> list[ShardedModel]:
    """Sharded models that this one takes over: what they manage is all in ``model``.

    Raises:
        ValueError: it is not, or their state is on disk, in files that this one would write too.
    """
    named = list(model.named_parameters())
    mine = {id(p) for _, p in named}
    found: dict[int, ShardedModel] = {}
    for name, p in named:
        group = group_of(p)
        owner = group.owner() if group is not None and group.owner is not None else None
        if owner is None or id(owner) in found:
            continue
        shared = {id(q) for bucket in owner.buckets for q in bucket.parameters} <= mine
        if not shared or owner.homes.folders:
            why = "that has its state on disk" if shared else "that manages other parameters too"
            raise ValueError(
                f"{name!r} is sharded already, by an engine or zero.shard() {why}: destroy() that one first, or give"
                " this one a copy of the model made before"
            )
        found[id(owner)] = owner
    return list(found.values())


def shard(
    model: M,
    optimizer: torch.optim.Optimizer | None = None,
    stage: int = 3,
    precision: str | Policy | None = None,
    gradient_clipping: float = 0.0,
    options: ShardOptions | None = None,
    scaler: LossScaler | None = None,
    mesh: Mesh | None = None,
    offload: Offload | None = None,
) -> tuple[M, ZeroOptimizer | None]:
    """Shard a model and step an optimizer on the shards, without an engine.

    Args:
        model: trained in place; call it, and ``loss.backward()``, as before.
        optimizer: any elementwise torch optimizer over the model's parameters, or None (inference, frozen).
        stage: ZeRO 0 to 3.
        precision: "bf16", "fp16", "fp32" or a policy; None keeps every parameter's dtype.
        gradient_clipping: bound on the global gradient norm; 0 is off.
        options: sizes and switches.
        scaler: loss scale for fp16: multiply the loss with ``optimizer.loss_scale``.
        mesh: the ranks; None is everyone.
        offload: where masters, moments and parameters live while they are not in use; None takes that of ``options``.

    Returns:
        The same model, and the optimizer to call ``step()`` on. Micro-steps accumulate until then.
    """
    policy = Policy.of(precision) if isinstance(precision, str) else precision
    if offload is not None:
        options = replace(options or ShardOptions(), offload=offload)
    sharded = ShardedModel(model, stage, policy, options, mesh, trains=optimizer is not None)
    model.__dict__["_tritonspeed"] = sharded  # keeps it alive, and finds it again
    if optimizer is None:
        return model, None
    return model, sharded.attach(optimizer, gradient_clipping=gradient_clipping, scaler=scaler)
