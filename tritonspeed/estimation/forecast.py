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
from tritonspeed.offload import Offload, Tier
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

    def __str__(self) -> str:
        moved = ", ".join(
            f"{link.replace('_', ' ')} {num / 1e12:,.1f} TFLOP" if link == "compute" else
            f"{link.replace('_', ' ')} {_gib(num)} GiB"
            for link, num in self.link_bytes.items()
        )  # fmt: skip
        lines = [super().__str__(), f"one step of {self.work.tokens:,.0f} tokens: {moved}"]
        if self.step is not None:
            lines.append(f"it takes at least {self.step.seconds:.3g} s; {self.step.binding.replace('_', ' ')} binds")
            if self.step.tokens_to_hide is not None:
                lines.append(f"offload is hidden from {self.step.tokens_to_hide:,.0f} tokens on")
        return "\n".join(lines)

    @property
    def held_activation_bytes(self) -> int:
        """Of one micro batch: counted where inputs were given, else guessed, else 0."""
        found = self.activation_guess_bytes if self.activation_bytes is None else self.activation_bytes
        return found or 0

    @property
    def device_bytes(self) -> int:
        """What a device needs at its peak, activations included where they are known, and what the runtime takes."""
        return self.total_peak_bytes + self.held_activation_bytes + RUNTIME_BYTES

    @property
    def node_host_bytes(self) -> int:
        """What the ranks of a node need of its memory at their peak; all they have, where they compute on its CPU."""
        if not self.work.shares_memory:
            return self.work.ranks_per_node * self.total_host_peak_bytes
        guessed = self.held_activation_bytes if self.activation_bytes is None else 0
        return self.work.ranks_per_node * (self.resident_bytes + guessed)

    @property
    def node_disk_bytes(self) -> int:
        """What the ranks of a node keep on its disk, both slots."""
        return self.work.ranks_per_node * self.disk_bytes

    def _tiers(self, machine: Machine) -> tuple[tuple[str, int, int], ...]:
        """(tier, what is needed there, what there is)."""
        device = () if machine.shares_memory else (("device memory", self.device_bytes, machine.device_bytes),)
        return (
            *device,
            ("host memory", self.node_host_bytes, machine.host_bytes),
            ("disk", self.node_disk_bytes, machine.disk_bytes),
        )

    def needs(self, machine: Machine) -> list[float]:
        """What is needed of each tier of nodes like ``machine``, as a share of what there is."""
        return [need / there for _, need, there in self._tiers(machine)]

    def shortages(self, machine: Machine) -> list[str]:
        """What does not fit on nodes like ``machine``, in words; empty where all does."""
        tiers = self._tiers(machine)
        return [f"{what}: {_gib(need)} of {_gib(there)} GiB" for what, need, there in tiers if need > there]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def estimate(
    model: Any,
    config: Any,
    world_size: int,
    inputs: Any = None,
    offload: Offload | None = None,
    device: str | None = None,
    *,
    nodes: int = 1,
    tokens: int | None = None,
    machine: Machine | None = None,
    checkpointing: bool = False,
) -> Forecast:
    """What one rank of ``world_size`` will hold and move when ``model`` is trained under ``config``.

    Args:
        model: a module (shapes are enough: it may stand on the meta device), or what ``ModelShape.of`` takes: a
            Hugging Face config, a folder of safetensors, "params=7e9". Blocks are taken to run in registration order.
        config: as for ``initialize``.
        world_size: ranks.
        inputs: one micro batch, for the activations: as for ``measure_activations``. None takes a formula on the sizes.
        offload: instead of what the config says.
        device: what the ranks compute on, "cpu" or "cuda"; None is what ``machine`` has, else what this one has.
        nodes: that they are spread over evenly.
        tokens: of one rank in one step, all micro-steps together; None is 2,048 for each sample.
        machine: what the nodes are like: ``machine_of("H100")``, ``calibrate()``. None leaves times out.
        checkpointing: every block's activations are recomputed in backward.

    Raises:
        ValueError: the model cannot be read, the config contradicts itself, or ranks do not spread over the nodes.
    """
    shape = ModelShape.of(model).with_module()
    if device is None and machine is not None:
        device = "cpu" if machine.shares_memory else "cuda"
    split = Split(world_size, nodes, tokens, checkpointing, (device or memory_device()) == "cpu")
    held = memory.estimate(shape.build(), config, world_size, inputs, offload, device)
    return combine(held, shape, config, split, machine, offload)


def combine(
    held: memory.Estimate,
    shape: ModelShape,
    config: Any,
    split: Split,
    machine: Machine | None,
    offload: Offload | None = None,
) -> Forecast:
    """An estimate of memory, with what moves: the second half of ``estimate``, which see for the arguments."""
    resolved = load(config).resolve(split.world_size, ModelFacts(hidden_size=_hidden(shape.build())))
    work = workload(shape, resolved, offload or Offload.from_config(resolved), split)
    micro_tokens, itemsize = round(work.tokens / work.accumulation), Policy.from_config(resolved).compute.itemsize
    return Forecast(
        **vars(held),
        shape=shape,
        work=work,
        link_bytes=total_bytes(work),
        step=None if machine is None else time_of(work, machine),
        activation_guess_bytes=shape.activation_bytes(micro_tokens, split.checkpointing, itemsize),
    )


def _hidden(module: nn.Module) -> int | None:
    return getattr(getattr(module, "config", None), "hidden_size", None)


def memory_device() -> str:
    """What ranks of this machine compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Split:
    """How a run is spread: see ``estimate``.

    Attributes:
        on_cpu: device and host are one memory.
        gathers: of ``gathers_per_micro_step``, where it is known.
    """

    world_size: int
    nodes: int = 1
    tokens: int | None = None
    checkpointing: bool = False
    on_cpu: bool = False
    gathers: float | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.world_size % self.nodes:
            raise ValueError(
                f"{self.world_size} ranks do not spread evenly over {self.nodes} nodes: make them a multiple"
            )


def workload(shape: ModelShape, config: Config, offload: Offload, split: Split) -> Workload:
    """A rank's share of a step, in the terms of ``traffic``; ``config`` is resolved."""
    policy = Policy.from_config(config)
    stage = stage_of(int(config.zero_optimization.stage))
    accumulation = int(config.gradient_accumulation_steps or 1)
    tokens = split.tokens
    if tokens is None:
        tokens = int(config.train_micro_batch_size_per_gpu or 1) * accumulation * SEQUENCE
    options = ShardOptions.from_config(config, policy)
    sizes = shape.sizes
    to_host = split.checkpointing and config.activation_checkpointing.cpu_checkpointing and sizes is not None
    shard = shape.num_params / split.world_size
    gathers = split.gathers
    if gathers is None:
        gathers = gathers_per_micro_step(shape.build(), options) if stage.shards_parameters else 2.0
    return Workload(
        num_params=shape.num_params,
        num_trainable=shape.num_trainable,
        num_active=shape.num_active_params,
        tokens=tokens,
        stage=stage,
        world=split.world_size,
        ranks_per_node=split.world_size // split.nodes,
        accumulation=accumulation,
        dtype=_DTYPES[policy.compute],
        compute_bytes=policy.param.itemsize,
        wire_bytes=None if options.wire is None else options.wire.itemsize,
        accumulate_bytes=policy.accumulate.itemsize,
        moment_bytes=moment_bytes(config),
        optimizer=Tier.of(offload.optimizer),
        parameters=Tier.of(offload.parameters),
        ratio=offload.ratio,
        cached=min(1.0, offload.max_in_cpu / shard) if shard else 0.0,
        gathers=gathers,
        recomputes=split.checkpointing,
        activation_bytes=sizes.layers * sizes.hidden * tokens * policy.compute.itemsize if to_host else 0,
        overlaps=offload.overlap,
        shares_memory=split.on_cpu,
        sums_on_wire=not split.on_cpu,
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
