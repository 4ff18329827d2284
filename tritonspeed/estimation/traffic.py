"""What one training step moves over each link; ``links`` says how long that takes.

Per rank and step, for Ψ parameters (of which a token meets Ψa), T tokens, N ranks on n nodes of R, A micro-steps, c and
w bytes of a parameter and of a gradient on the wire, m bytes of moments per element (AdamW: 8), G gathers per
micro-step at stage 3 (2, less what is kept between forward and backward), g bytes of a gradient in the host's memory
(c where one micro-step makes it, else 4):

    compute          6·Ψa·T flops; 8·Ψa·T where activations are recomputed
    network          × (N-1)/N    stage 0: w + 4    1: w + c    2: A·w + c    3: A·(w + G·c)
                     of M bytes gathered, M·(n-1)/(n·R) come from other nodes: they enter a node once; the rest inside
    optimizer on the device
      device memory  (2·(4 + m) + g + c)·Ψ/N              AdamW, 16 bits, A = 1: 28
    optimizer on the host or the disk
      host memory    the same, + c in and out: gradients as they come, parameters as they go;  on disk + 2·(4 + m)
      to host        c·Ψ/N, once for each time that gradients are reduced
      to device      c·Ψ/N, or G·A·c·Ψ/N where parameters are offloaded
      disk           (4 + m)·Ψ/N read, and as much written;  parameters: G·A·c·Ψ/N read and c·Ψ/N written

Where device and host are one memory (a CPU trains) nothing crosses between them. What is not here: attention's own
products, copies inside a collective.

Three phases: forward and backward hold the arithmetic, the gathers and the gradients; the optimizer the rest.

Source   ZeRO, arXiv:1910.02054, section 7 (volumes); ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857,
section 4
"""

from __future__ import annotations

from dataclasses import dataclass

from tritonspeed.estimation.machine import BETWEEN, INSIDE, LINKS
from tritonspeed.offload import Tier
from tritonspeed.zero.stages import Stage

PHASES = ("forward", "backward", "optimizer")
MASTER_BYTES = 4
Bytes = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """One rank's share of a training step.

    Attributes:
        num_params, num_trainable, num_active: elements that are gathered, that are updated, that one token meets.
        tokens: of this rank in the whole step.
        stage: its row.
        world, ranks_per_node: ranks in all, and on a node.
        accumulation: micro-steps of the step.
        dtype: "bf16", "fp16", "fp32": which arithmetic.
        compute_bytes, wire_bytes, accumulate_bytes, moment_bytes: of one element; ``wire_bytes`` None is what the
            gradient stands in: the compute dtype, or the accumulate dtype where micro-steps are summed first.
        optimizer, parameters: their tiers; parameters are offloaded only with the optimizer, at stage 3.
        ratio: share of the optimizer that is offloaded.
        cached: share of the parameters on disk that stay in memory.
        gathers: all-gathers of each parameter per micro-step, at stage 3.
        recomputes: activations are recomputed in backward.
        activation_bytes: that go to the host in forward and come back in backward.
        overlaps: the optimizer runs under the next forward; None does so at stage 3 where it is offloaded.
        shares_memory: device and host are one memory.
        sums_on_wire: the ranks' sum has the wire's dtype (NCCL); False where it is fp32 (gloo), which then crosses.
    """

    num_params: float
    tokens: float
    stage: Stage
    num_trainable: float = -1
    num_active: float = -1
    world: int = 1
    ranks_per_node: int = 1
    accumulation: int = 1
    dtype: str = "bf16"
    compute_bytes: int = 2
    wire_bytes: int | None = None
    accumulate_bytes: int = 4
    moment_bytes: float = 8
    optimizer: Tier = Tier.DEVICE
    parameters: Tier = Tier.DEVICE
    ratio: float = 1.0
    cached: float = 0.0
    gathers: float = 2.0
    recomputes: bool = False
    activation_bytes: float = 0
    overlaps: bool | None = None
    shares_memory: bool = False
    sums_on_wire: bool = True

    def __post_init__(self) -> None:
        for name in ("num_trainable", "num_active"):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, self.num_params)
        if self.world < 1 or self.ranks_per_node < 1 or self.world % self.ranks_per_node:
            raise ValueError(
                f"world {self.world} ≠ nodes × {self.ranks_per_node} ranks on each: make it a multiple of them"
            )

    @property
    def num_nodes(self) -> int:
        return self.world // self.ranks_per_node

    @property
    def owned(self) -> float:
        """Elements that this rank updates."""
        return self.num_trainable / (self.world if self.stage.shards_optimizer else 1)

    @property
    def offloaded(self) -> float:
        """Elements whose masters and moments are not on the device."""
        return self.owned * self.ratio if self.optimizer is not Tier.DEVICE else 0.0

    @property
    def offloads_parameters(self) -> bool:
        return self.stage.shards_parameters and self.parameters is not Tier.DEVICE and self.offloaded > 0

    @property
    def is_overlapped(self) -> bool:
        """Whether the optimizer runs under the next forward."""
        if not self.stage.shards_parameters or not self.offloaded:
            return False
        moves = self.optimizer is Tier.DISK or not self.shares_memory
        return moves if self.overlaps is None else self.overlaps

    @property
    def gradient_wire_bytes(self) -> int:
        """Of one gradient element on the wire."""
        sums_first = self.accumulation > 1 and not self.stage.shards_gradients
        return self.wire_bytes or (self.accumulate_bytes if sums_first else self.compute_bytes)

    @property
    def num_reductions(self) -> int:
        return self.accumulation if self.stage.shards_gradients else 1

    @property
    def update_bytes(self) -> float:
        """Memory traffic of one element's update: masters and moments in and out, gradient in, rounded copy out."""
        gradient = self.compute_bytes if self.accumulation == 1 and self._sum_is_narrow else self.accumulate_bytes
        rounded = self.compute_bytes if self.compute_bytes != MASTER_BYTES else 0
        return 2 * (MASTER_BYTES + self.moment_bytes) + gradient + rounded

    @property
    def _sum_is_narrow(self) -> bool:
        return self.world == 1 or self.sums_on_wire

    @property
    def state_bytes(self) -> float:
        """Master and moments of one element, as the disk reads and writes them."""
        return MASTER_BYTES + self.moment_bytes


def bytes_of(work: Workload) -> dict[str, Bytes]:
    """Phase → link → bytes of this rank (flops, for compute)."""
    phases: dict[str, Bytes] = {phase: {} for phase in PHASES}
    _add_compute(work, phases)
    _add_network(work, phases)
    _add_optimizer(work, phases["optimizer"])
    if work.offloaded and not work.shares_memory:
        _add_crossings(work, phases)
    if work.offloads_parameters:
        _add_parameters(work, phases)
    if work.activation_bytes and not work.shares_memory:
        for phase, link in (("forward", "to_host"), ("backward", "to_device")):
            _put(phases[phase], link, work.activation_bytes)
            _put(phases[phase], "host_memory", work.activation_bytes)
    return phases


def total_bytes(work: Workload) -> Bytes:
    """Link → bytes of this rank in one step (flops, for compute), in the order of ``LINKS``; links it uses."""
    phases = bytes_of(work).values()
    totals = {link: sum(phase.get(link, 0.0) for phase in phases) for link in LINKS}
    return {link: num for link, num in totals.items() if num}


def _put(phase: Bytes, link: str, num_bytes: float) -> None:
    if num_bytes:
        phase[link] = phase.get(link, 0.0) + num_bytes


def _add_compute(work: Workload, phases: dict[str, Bytes]) -> None:
    flops = 2 * work.num_active * work.tokens
    _put(phases["forward"], "compute", flops)
    _put(phases["backward"], "compute", (3 if work.recomputes else 2) * flops)


def _add_network(work: Workload, phases: dict[str, Bytes]) -> None:
    stage, c = work.stage, work.compute_bytes
    reduced = work.num_trainable * work.gradient_wire_bytes * work.num_reductions
    _collective(work, phases["backward"], reduced)
    if stage.shards_parameters:
        forward, backward = _gathers(work)
        _collective(work, phases["forward"], forward * c * work.num_params)
        _collective(work, phases["backward"], backward * c * work.num_params)
    elif stage.shards_optimizer:
        _collective(work, phases["optimizer"], c * work.num_trainable)
    else:
        _collective(work, phases["optimizer"], work.accumulate_bytes * work.num_trainable)


def _gathers(work: Workload) -> tuple[float, float]:
    """All-gathers of each parameter in the forwards of a step, and in the backwards."""
    return work.accumulation, work.accumulation * (work.gathers - 1)


def _collective(work: Workload, phase: Bytes, num_bytes: float) -> None:
    """An all-gather or a reduce-scatter of ``num_bytes``: what comes to this rank, from its node and from others."""
    n, r = work.num_nodes, work.ranks_per_node
    between = num_bytes * (n - 1) / (n * r)
    _put(phase, BETWEEN, between)
    _put(phase, INSIDE, num_bytes * (work.world - 1) / work.world - between)


def _add_optimizer(work: Workload, phase: Bytes) -> None:
    resident = work.owned - work.offloaded
    _put(phase, "host_memory" if work.shares_memory else "device_memory", resident * work.update_bytes)
    _put(phase, "host_memory", work.offloaded * work.update_bytes)
    if work.optimizer is Tier.DISK:
        for link in ("disk_read", "disk_write"):
            _put(phase, link, work.offloaded * work.state_bytes)
            _put(phase, "host_memory", work.offloaded * work.state_bytes)


def _add_crossings(work: Workload, phases: dict[str, Bytes]) -> None:
    """Gradients to the host and, where shards live on the device, parameters back."""
    each = work.gradient_wire_bytes if work._sum_is_narrow else work.accumulate_bytes
    crossing = work.offloaded * each * work.num_reductions
    _put(phases["backward"], "to_host", crossing)
    added = work.num_reductions - 1  # read and write the fp32 sum, read what is added
    adding = work.offloaded * added * (2 * work.accumulate_bytes + each)
    _put(phases["backward"], "host_memory", crossing + adding)
    if not work.offloads_parameters:
        back = work.offloaded * work.compute_bytes
        _put(phases["optimizer"], "to_device", back)
        _put(phases["optimizer"], "host_memory", back)


def _add_parameters(work: Workload, phases: dict[str, Bytes]) -> None:
    """Shards of stage 3 that live off the device: fetched for each gather."""
    shard = work.num_params / work.world * work.compute_bytes
    for phase, times in zip(("forward", "backward"), _gathers(work), strict=True):
        if not work.shares_memory:
            _put(phases[phase], "to_device", times * shard)
            _put(phases[phase], "host_memory", times * shard)
        if work.parameters is Tier.DISK:
            read = times * shard * (1 - work.cached)
            _put(phases[phase], "disk_read", read)
            _put(phases[phase], "host_memory", read)
    if work.parameters is Tier.DISK:
        written = shard * (1 - work.cached) * work.num_trainable / max(work.num_params, 1)
        _put(phases["optimizer"], "disk_write", written)
        _put(phases["optimizer"], "host_memory", written)
