"""Everything that is known before a run, from one call: bytes per rank in every tier, bytes and seconds of every link.

ts.estimate(model, "ds_config.json", world_size=32, nodes=4, machine=ts.estimation.machine_of("H100"))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tritonspeed.config import Config, ModelFacts, load
from tritonspeed.estimation import memory
from tritonspeed.estimation.links import StepTime, time_of
from tritonspeed.estimation.machine import Machine
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.estimation.traffic import Workload, total_bytes
from tritonspeed.offload import Offload
from tritonspeed.precision import Policy
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.order import Order
from tritonspeed.zero.plan import PERSISTENT, ROOT, plan_units
from tritonspeed.zero.stages import stage_of

SEQUENCE = 2048  # tokens of a sample, where nobody says: ZeRO's and GPT-3's
RUNTIME_BYTES = 3 * 2**29  # of a device, for the driver's context, NCCL and the libraries' workspaces: 1 to 2 GiB
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Forecast(memory.Estimate):
    """An ``Estimate`` of memory, and what each link moves.

    Attributes:
        shape: the model.
        work: this rank's share of a step.
        link_bytes: link → bytes of this rank in a step (flops, for compute).
        step: the least time of a step; None where no machine was named.
        activation_guess_bytes: of one micro batch, by a formula on the sizes; None where they are not known.
    """

    shape: ModelShape = field(compare=False, repr=False)
    work: Workload
    link_bytes: dict[str, float]
    step: StepTime | None = None
    activation_guess_bytes: int | None = None

    @property
    def device_bytes(self) -> int:
        """What a device needs at its peak, activations included where they are known, and what the runtime takes."""
        measured = getattr(self, "activation_bytes", None)
        activations = self.activation_guess_bytes if measured is None else measured
        return self.total_peak_bytes + (activations or 0) + RUNTIME_BYTES

    @property
    def node_host_bytes(self) -> int:
        """What the ranks of a node need of its memory at their peak."""
        return self.work.ranks_per_node * sum(getattr(self, "host_peak_bytes", {}).values())

    @property
    def node_disk_bytes(self) -> int:
        """What the ranks of a node keep on its disk, both slots."""
        return self.work.ranks_per_node * getattr(self, "disk_bytes", 0)

    def shortages(self, machine: Machine) -> list[str]:
        """What does not fit on nodes like ``machine``, in words; empty where all does."""
        device, host = self.device_bytes, self.node_host_bytes
        if machine.shares_memory:
            device, host = 0, host + self.work.ranks_per_node * device
        needs = (
            ("device memory", device, machine.device_bytes),
            ("host memory", host, machine.host_bytes),
            ("disk", self.node_disk_bytes, machine.disk_bytes),
        )
        return [f"{what}: {_gib(need)} of {_gib(there)} GiB" for what, need, there in needs if need > there]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def estimate(
    model: Any,
    config: Any,
    world_size: int,
    *,
    nodes: int = 1,
    tokens: int | None = None,
    machine: Machine | None = None,
    checkpointing: bool = False,
    **memory_options: Any,
) -> Forecast:
    """What one rank of ``world_size`` will hold and move when ``model`` is trained under ``config``.

    Args:
        model: a module (shapes are enough: it may stand on the meta device), or what ``ModelShape.of`` takes: a
            Hugging Face config, a folder of safetensors, "params=7e9". Blocks are taken to run in registration order.
        config: as for ``initialize``.
        world_size: ranks.
        nodes: that they are spread over evenly.
        tokens: of one rank in one step, all micro-steps together; None is 2,048 for each sample.
        machine: what the nodes are like: ``machine_of("H100")``, ``calibrate()``. None leaves times out.
        checkpointing: every block's activations are recomputed in backward.
        memory_options: of ``tritonspeed.estimation.memory.estimate``.

    Raises:
        ValueError: the model cannot be read, the config contradicts itself, or ranks do not spread over the nodes.
    """
    shape = ModelShape.of(model)
    module = shape.build()
    base = memory.estimate(module, config, world_size, **memory_options)
    resolved = load(config).resolve(world_size, ModelFacts(hidden_size=_hidden(module)))
    work = workload(shape, resolved, world_size, nodes, tokens, machine, checkpointing)
    itemsize = Policy.from_config(resolved).compute.itemsize
    return Forecast(
        **vars(base),
        shape=shape,
        work=work,
        link_bytes=total_bytes(work),
        step=None if machine is None else time_of(work, machine),
        activation_guess_bytes=shape.activation_bytes(round(work.tokens / work.accumulation), checkpointing, itemsize),
    )


def _hidden(module: nn.Module) -> int | None:
    return getattr(getattr(module, "config", None), "hidden_size", None)


def workload(
    shape: ModelShape,
    config: Config,
    world_size: int,
    nodes: int = 1,
    tokens: int | None = None,
    machine: Machine | None = None,
    checkpointing: bool = False,
) -> Workload:
    """A rank's share of a step, in the terms of ``traffic``.

    Args:
        config: resolved.

    The others are those of ``estimate``.
    """
    if nodes < 1 or world_size % nodes:
        raise ValueError(
            f"{world_size} ranks do not spread evenly over {nodes} nodes: make one a multiple of the other"
        )
    policy = Policy.from_config(config)
    stage = stage_of(int(config.zero_optimization.stage))
    offload = Offload.from_config(config)
    accumulation = int(config.gradient_accumulation_steps or 1)
    if tokens is None:
        tokens = int(config.train_micro_batch_size_per_gpu or 1) * accumulation * SEQUENCE
    options = ShardOptions.from_config(config, policy)
    sizes = shape.sizes
    to_host = checkpointing and config.activation_checkpointing.cpu_checkpointing and sizes is not None
    shard = shape.num_params / world_size
    return Workload(
        num_params=shape.num_params,
        num_trainable=shape.num_trainable,
        num_active=shape.num_active_params,
        tokens=tokens,
        stage=stage,
        world=world_size,
        ranks_per_node=world_size // nodes,
        accumulation=accumulation,
        dtype=_DTYPES[policy.compute],
        compute_bytes=policy.param.itemsize,
        wire_bytes=None if options.wire is None else options.wire.itemsize,
        accumulate_bytes=policy.accumulate.itemsize,
        moment_bytes=moment_bytes(config),
        optimizer=offload.optimizer,
        parameters=offload.parameters,
        ratio=offload.ratio,
        cached=min(1.0, offload.max_in_cpu / shard) if shard else 0.0,
        gathers=gathers_per_micro_step(shape.build(), options) if stage.shards_parameters else 2.0,
        recomputes=checkpointing,
        activation_bytes=sizes.layers * sizes.hidden * tokens * policy.compute.itemsize if to_host else 0,
        overlaps=offload.overlap,
        shares_memory=machine is not None and machine.shares_memory,
        sums_on_wire=machine is None or not machine.shares_memory,
    )


def moment_bytes(config: Config) -> float:
    """Bytes of the optimizer's moments per element, without the scales of 8-bit blocks."""
    each = {"bf16": 2, "8bit": 1}.get(memory._state_kind(config), 4)
    return memory._num_moments(config) * each


def gathers_per_micro_step(model: nn.Module, options: ShardOptions) -> float:
    """How often stage 3 gathers each parameter in a forward and backward, by the run's own order: at most 2.

    Units that ``max_reuse_distance`` keeps between the two are gathered once, small parameters that stay whole never.
    """
    units = plan_units(model, options.leaves, options.param_persistence_threshold, options.model_persistence_threshold)
    sizes = [0 if u.name == PERSISTENT else sum(p.numel() for _, p in u.parameters) for u in units]
    total = sum(p.numel() for p in model.parameters())
    order, whole, gathered = Order(sizes, options.limits), set[int](), 0
    root, others = (
        [i for i, u in enumerate(units) if u.name == ROOT],
        [i for i, u in enumerate(units) if u.name != ROOT],
    )

    def live() -> int:
        return sum(sizes[i] for i in whole)

    def need(unit: int) -> None:
        nonlocal gathered
        order.need(unit)
        for i in [unit, *order.ahead(live() + (0 if unit in whole else sizes[unit]))]:
            gathered += 0 if i in whole else sizes[i]
            whole.add(i)

    for _ in range(3):  # it learns the order, then fetches ahead, then starts from what that leaves
        gathered = 0
        order.begin("train")
        for unit in [*root, *others]:
            if sizes[unit]:
                need(unit)
                if unit not in root and not order.keep(unit, live()):
                    whole.discard(unit)
        whole.difference_update(i for i in root if not order.keep(i, live()))
        for unit in [*root, *reversed(others)]:
            if sizes[unit]:
                need(unit)
                if unit not in root:
                    whole.discard(unit)
        whole.clear()
    return gathered / total if total else 0.0
