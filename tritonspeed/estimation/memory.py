"""Bytes per rank before anything runs, from shapes and a config; no GPU, no process group, no memory for the model.

Between two steps, for P elements of a bucket (padding included), N ranks, c = bytes of the compute dtype, 4 for fp32:

    parameters   c·P             stages 0-2; at stage 3 only what is frozen, c·P/N, and what persists, c·P
    optimizer    4·P/N + 8·P/N   stage 0: 12·P; the master, unless the compute dtype is the master's; AdamW's moments
                                    (`state`: bf16 4·P/N, 8bit 2·P/N and 4 bytes for each 256)
                                 (Muon: 4 where a matrix is, so ranks differ: the one with most is told of)

From backward to the step it adds the gradients, 4·P/N (stage 0: 4·P; in the accumulate dtype; c·P where one rank and
one micro-step are all). The peak adds what is on its way: at stage 3 the units that are whole, and at every stage one
gradient that fills (c·P), one that travels, and what the peers send of it (c·P·(N-1)/N). It is found by walking one
training iteration with the very order and limits that the run uses, on integers.

Offloaded, the optimizer's bytes are the host's, or twice on disk (two slots), and at stage 3 c·P/N of parameters come
with them, once; gradients wait on the host. The host then holds the buffers of the step besides: as many as the config
says, of one tile of each fp32 tensor; and what parameters are read into. Where the update runs late, gradients last
until the next forward has come to their unit.

    estimate(model, "ds_config.json", world_size=8).total_peak_bytes

What one process has resident where it trains on its CPU (``resident_bytes``) is bounded by the sum of: all this;
activations (``inputs``); the framework; and a margin for what neither sees, by the figures beside ``MARGIN_BYTES``.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonspeed.comm.shared import WINDOW_BYTES
from tritonspeed.config import Config, ModelFacts, load
from tritonspeed.estimation.activations import Activations, measure_activations
from tritonspeed.estimation.paper import PaperBucket, PaperGroup
from tritonspeed.estimation.paper_ledger import PaperLedger
from tritonspeed.estimation.paper_tiers import PaperHomes, States
from tritonspeed.estimation.saved import saved_bytes
from tritonspeed.estimation.walk import Walk, build
from tritonspeed.kernels.host_step import will_compile
from tritonspeed.offload import Offload
from tritonspeed.optim.muon import NS_DTYPES, hidden_matrices
from tritonspeed.precision import Policy
from tritonspeed.zero.layout import runs
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.plan import plan_buckets, plan_units
from tritonspeed.zero.reduce import departure_order
from tritonspeed.zero.stages import stage_of
from tritonspeed.zero.whole import plan_rounds

_MOMENTS = {"sgd": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "adadelta": 2, "asgd": 2, "rprop": 2}
# state tensors per element; those not named have Adam's two

# What is resident besides what is counted: code that is read in, and packing buffers, at each kernel's first use (10 to
# 60 MiB), what the C library's heap has not given back, threads. tests/offload/test_under_limit.py had 972 MiB resident
# where 964 were counted and 1,070 are the bound.
MARGIN_BYTES = 96 * 2**20
MARGIN_SHARE = 0.05
COMPILER_BYTES = 160 * 2**20  # Inductor, once it has compiled the host's step: 143 MiB (fp32, one pass)
FRAMEWORK_BYTES = 320 * 2**20  # an interpreter with torch and this package imported, where the system does not tell


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank by category: parameters, gradients, optimizer, communication.

    Attributes:
        stage, world_size: what it is for.
        num_parameters: elements of the model, without padding.
        rest_bytes: between two steps, where modules compute.
        peak_bytes: by category, at the moment in a step when their sum is highest.
        host_rest_bytes, host_peak_bytes: the same of what is offloaded to the host, and of buffers there. Where the
            ranks compute on the CPU it is the same memory, and comes on top.
        disk_bytes: of the files, headers and both slots.
        phase_peak_bytes: device and host together, at most, in "forward", "backward", "step" and "rest".
        activation_bytes: of one micro batch's forward and backward, and of the model's buffers; None without inputs.
        framework_bytes: what this process has resident now, without the model.
        resident_bytes: bound on what a process whose rank computes on the CPU has resident, ever; without activations
            where they are None. 0 on other devices.
        checkpoint_bytes: of a checkpoint, all ranks', without headers.
        snapshot_bytes: of them, at most one rank's: what a save in the background copies to host memory.
    """

    stage: int
    world_size: int
    num_parameters: int
    rest_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    host_rest_bytes: dict[str, int] = field(default_factory=dict)
    host_peak_bytes: dict[str, int] = field(default_factory=dict)
    disk_bytes: int = 0
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    activation_bytes: int | None = None
    framework_bytes: int = field(default=0, compare=False)
    resident_bytes: int = field(default=0, compare=False)
    checkpoint_bytes: int = 0
    snapshot_bytes: int = 0

    @property
    def total_rest_bytes(self) -> int:
        return sum(self.rest_bytes.values())

    @property
    def total_peak_bytes(self) -> int:
        return sum(self.peak_bytes.values())

    @property
    def total_host_peak_bytes(self) -> int:
        return sum(self.host_peak_bytes.values())

    def __str__(self) -> str:
        lines = [
            f"{self.num_parameters:,} parameters, ZeRO stage {self.stage}, {self.world_size} rank(s): at rest"
            f" {_mib(self.total_rest_bytes)}, at its peak {_mib(self.total_peak_bytes)} ({_parts(self.peak_bytes)})"
        ]
        if self.total_host_peak_bytes:
            lines.append(f"host: {_mib(self.total_host_peak_bytes)} at its peak ({_parts(self.host_peak_bytes)})")
        if self.disk_bytes:
            lines.append(f"disk: {_mib(self.disk_bytes)}")
        if self.activation_bytes is not None:
            lines.append(f"activations: {_mib(self.activation_bytes)}")
        if self.checkpoint_bytes:
            lines.append(
                f"a checkpoint: {_mib(self.checkpoint_bytes)}; saved in the background, {_mib(self.snapshot_bytes)} of"
                " host memory on each rank meanwhile"
            )
        if self.resident_bytes:
            without = "" if self.activation_bytes is not None else ", activations not counted"
            lines.append(
                f"resident in this process: at most {_mib(self.resident_bytes)}{without}, of which"
                f" {_mib(self.framework_bytes)} are there before the model"
            )
        return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _parts(bytes_of: dict[str, int]) -> str:
    return ", ".join(f"{name} {_mib(n)}" for name, n in bytes_of.items())


def estimate(
    model: nn.Module,
    config: Any,
    world_size: int,
    inputs: Any = None,
    offload: Offload | None = None,
    device: str | None = None,
) -> Estimate:
    """What one rank of ``world_size`` will hold when ``model`` is trained under ``config``.

    Args:
        model: shapes are enough: it may stand on the meta device. Its blocks are taken to run in registration order.
        config: as for ``initialize``.
        world_size: ranks.
        inputs: one micro batch, for the activations: as for ``measure_activations``. None leaves them out.
        offload: instead of what the config says.
        device: what the ranks compute on, "cpu" or "cuda"; None is what this machine has.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    resolved = _resolve(model, config, world_size)
    policy = Policy.from_config(resolved)
    options = ShardOptions.from_config(resolved, policy)
    if offload is not None:
        options = replace(options, offload=offload)
    stage, ledger = stage_of(int(resolved.zero_optimization.stage)), PaperLedger()
    units = plan_units(model, options.leaves, options.param_persistence_threshold, options.model_persistence_threshold)
    plans = [plan_buckets(unit, world_size, policy, options.wire) for unit in units]
    homes = PaperHomes(options, device, world_size, stage, ledger, [plan for unit in plans for plan in unit])
    rounds_at_random = bool(_optimizer_params(resolved).get("stochastic_rounding"))
    groups = [
        PaperGroup(i, unit, [PaperBucket(p, stage, ledger, homes, rounds_at_random) for p in plans[i]])
        for i, unit in enumerate(units)
    ]
    building = build(groups, ledger)
    rounds = _enter_states(model, groups, resolved, world_size)
    accumulation = int(resolved.gradient_accumulation_steps or 1)
    Walk(groups, homes, ledger, stage, options, accumulation, rounds, _steps_flat(resolved)).run()
    found = None if inputs is None else _activations(model, inputs, policy)
    framework, trained = framework_bytes(model), sum(b.layout.numel for b in departure_order(groups))
    compiler = COMPILER_BYTES if _steps_flat(resolved) and will_compile(trained) else 0
    return Estimate(
        stage.number,
        world_size,
        sum(p.numel() for p in model.parameters()),
        dict(ledger.bytes_of),
        ledger.peak_of,
        dict(ledger.host.bytes_of),
        ledger.host.peak_of,
        homes.folder.num_bytes,
        dict(ledger.together),
        None if found is None else found.peak_bytes,
        framework,
        _bound(framework + compiler, building, ledger.together, found, world_size) if device == "cpu" else 0,
        *saved_bytes(
            [plan for unit in plans for plan in unit],
            _num_moments(resolved),
            torch.bfloat16.itemsize if _state_kind(resolved) == "bf16" else torch.float32.itemsize,
            rounds_at_random,
        ),
    )


def _activations(model: nn.Module, inputs: Any, policy: Policy) -> Activations:
    return measure_activations(model, inputs, policy.param, policy.autocast)


def _bound(
    framework: int, building: int, together: dict[str, int], activations: Activations | None, world_size: int
) -> int:
    """What is never exceeded: phases follow each other, so their peaks do not add up."""
    forward = together["forward"] + (activations.forward_bytes if activations else 0)
    backward = together["backward"] + (activations.backward_bytes if activations else 0)
    most = max(building, forward, backward, together["step"] + (activations.kept_bytes if activations else 0))
    windows = world_size * WINDOW_BYTES if world_size > 1 else 0
    return framework + windows + MARGIN_BYTES + round((1 + MARGIN_SHARE) * most)


def framework_bytes(model: nn.Module | None = None) -> int:
    """What this process has resident, without the model's parameters and buffers that have memory here."""
    tensors = [] if model is None else [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return FRAMEWORK_BYTES
    return max(0, pages * resource.getpagesize() - sum(storages.values()))


def _resolve(model: nn.Module, config: Any, world_size: int) -> Config:
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return load(config).resolve(world_size, ModelFacts(hidden_size=hidden))


def _enter_states(model: nn.Module, groups: list[PaperGroup], config: Config, world_size: int) -> list[int]:
    """Enter the optimizer's; the most that each round of its step holds, where it needs whole matrices."""
    if config.optimizer is not None and (config.optimizer.type or "").lower() == "muon":
        return _enter_muon(model, groups, world_size, _optimizer_params(config).get("ns_dtype", "bf16"))
    states = States(_num_moments(config), _state_kind(config))
    for bucket in departure_order(groups):
        bucket.enter_states(states)
    return []


def _optimizer_params(config: Config) -> dict[str, Any]:
    return {} if config.optimizer is None else dict(config.optimizer.params or {})


def _steps_flat(config: Config) -> bool:
    """Whether the optimizer is one of ours, which take a tile at a time; nobody's config names another's."""
    name = "adamw" if config.optimizer is None else (config.optimizer.type or "adamw").lower()
    return name in ("adam", "adamw", "lion", "adagrad") and not _optimizer_params(config).get("torch_adam")


def _num_moments(config: Config) -> int:
    if config.optimizer is None or config.optimizer.type is None:
        return 2
    name = config.optimizer.type.lower()
    if name == "sgd" and (config.optimizer.params or {}).get("momentum"):
        return 1
    return _MOMENTS.get(name, 2)


def _enter_muon(model: nn.Module, groups: list[PaperGroup], world: int, ns_dtype: str) -> list[int]:
    """Enter what the buckets hold between two steps, on the rank with most state; the most that each round holds."""
    hidden, buckets = hidden_matrices(model), departure_order(groups)
    shards = any(bucket.owned != bucket.layout.numel for bucket in buckets)

    def moments(bucket: PaperBucket, rank: int) -> int:
        lo, hi = bucket.layout.interval(rank) if shards else (0, bucket.layout.numel)
        number = {s.name: 2 - hidden[id(p)] for s, p in zip(bucket.layout.spans, bucket.parameters, strict=True)}
        return sum(num * (end - start) for num, start, end in runs(bucket.layout.spans, number, lo, hi))

    fullest = max(range(world if shards else 1), key=lambda rank: sum(moments(bucket, rank) for bucket in buckets))
    for bucket in buckets:
        bucket.enter_states(moments(bucket, fullest) * bucket.types.master.itemsize)
    spans = [
        [(s, 0) for s, p in zip(b.layout.spans, b.parameters, strict=True) if s.numel and hidden[id(p)]]
        for b in buckets
    ]
    rounds = plan_rounds(spans, [bucket.layout for bucket in buckets], world)
    itemsize = NS_DTYPES[ns_dtype].itemsize
    return [max(each.held_elems(rank, shards) for rank in range(world)) * itemsize for each in rounds]


def _state_kind(config: Config) -> str:
    params = None if config.optimizer is None else config.optimizer.params
    return (params or {}).get("state") or "fp32"
