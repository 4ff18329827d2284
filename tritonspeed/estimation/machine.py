"""A machine as an estimate sees it: how much fits where, how fast each link is. From a table, or from ``calibrate``.

Bytes per second in one direction. Host memory, its bandwidth, the disk and the network between nodes belong to a node
and are shared by its devices; the rest belongs to one device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tritonspeed.tuning.timing import PEAKS

GB, GIB = 1e9, 2**30
MODEL_FLOPS_SHARE = 0.5  # of a data sheet's peak that training steps reach (of H100's 989 TFLOP/s: 495)
FP32_SHARE = 1 / 16  # of the bf16 peak, for fp32 products without TF32: A100 19.5 / 312, H100 67 / 989
INSIDE, BETWEEN = "network_inside", "network_between"
LINKS: dict[str, str] = {
    "compute": "arithmetic of the model, in floating-point operations",
    INSIDE: "from the other devices of the node",
    BETWEEN: "from other nodes",
    "to_device": "host to device",
    "to_host": "device to host",
    "device_memory": "the device's memory, by the optimizer",
    "host_memory": "the host's memory, by the optimizer and by copies",
    "disk_read": "from the disk",
    "disk_write": "to the disk",
}
"""Every link, with what crosses it; the names in ``StepReport.links`` too."""


@dataclass(frozen=True)
class Machine:
    """One node, and its link to the others.

    Attributes:
        name: for tables.
        num_devices: devices of the node.
        flops_per_s: what one device's matrix products reach, by dtype ("bf16", "fp16", "fp32").
        efficiency: share of it that a training step reaches.
        device_bytes, device_memory_bytes_per_s: one device's memory and its bandwidth, read and write together.
        host_bytes, host_memory_bytes_per_s: the node's, and its bandwidth, read and write together, in place.
        to_device_bytes_per_s, to_host_bytes_per_s: between the host and one device.
        disk_bytes, disk_read_bytes_per_s, disk_write_bytes_per_s: the node's disks.
        disk_is_duplex: whether the disk reads and writes at full speed at once.
        network_inside_bytes_per_s: into one device, from the others of its node.
        network_between_bytes_per_s: into one node.
        shares_memory: the devices are the host's processors: device and host are one memory.
        how: attribute → how the figure was got; what is not named is from the table of typical nodes.
    """

    name: str
    num_devices: int
    flops_per_s: Mapping[str, float]
    device_bytes: int
    device_memory_bytes_per_s: float
    host_bytes: int
    host_memory_bytes_per_s: float
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    disk_bytes: int
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    network_inside_bytes_per_s: float
    network_between_bytes_per_s: float
    efficiency: float = MODEL_FLOPS_SHARE
    disk_is_duplex: bool = True
    shares_memory: bool = False
    how: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"Machine {self.name!r}: {name} is {value:g}, must be more than 0")
        if self.efficiency > 1:
            raise ValueError(f"Machine {self.name!r}: efficiency is {self.efficiency:g}, must be at most 1")

    def speed_of(self, link: str, dtype: str = "bf16") -> float:
        """Of a link of ``LINKS``: bytes per second (of one device, or of the node); flops per second of compute."""
        if link == "compute":
            return self.flops_per_s.get(dtype, self.flops_per_s["fp32"]) * self.efficiency
        return getattr(self, f"{link}_bytes_per_s")

    def is_per_node(self, link: str) -> bool:
        """Whether the node's devices share this link."""
        shared = ("host_memory", "disk_read", "disk_write", BETWEEN)
        return link in shared or (self.shares_memory and link in ("compute", "device_memory", INSIDE))


@dataclass(frozen=True)
class _Node:
    """A usual node of one kind of GPU; speeds in GB/s. Its peak is looked up by the driver's name in ``PEAKS``."""

    driver_name: str
    memory_gib: int
    num_devices: int
    inside: float  # NVLink or Infinity Fabric, one direction of one device
    between: float  # all network cards of the node, one direction
    pcie: float  # measured by others for generation 3: 12, 4: 25, 5: 55
    host_gib: int
    host_memory: float  # about 80 % of the data sheet's
    disk: tuple[float, float]  # read, write; DeepNVMe: 4 of generation 4: 10, 5; of 5: 27, 11; 8 of 5: 48, 26
    disk_gib: int


_NODES = {
    "H100": _Node("NVIDIA H100 80GB HBM3", 80, 8, 450, 400, 55, 2048, 490, (48, 26), 28_000),  # DGX H100
    "H200": _Node("NVIDIA H200", 141, 8, 450, 400, 55, 2048, 490, (48, 26), 28_000),
    "B200": _Node("NVIDIA B200", 180, 8, 900, 400, 55, 2048, 490, (48, 26), 28_000),
    "A100": _Node("NVIDIA A100-SXM4-80GB", 80, 8, 300, 200, 25, 2048, 330, (20, 10), 28_000),  # DGX A100
    "A100-40GB": _Node("NVIDIA A100-SXM4-40GB", 40, 8, 300, 200, 25, 1024, 330, (20, 10), 14_000),
    "H100-PCIe": _Node("NVIDIA H100 PCIe", 80, 8, 50, 50, 55, 1024, 330, (27, 11), 14_000),
    "L40S": _Node("NVIDIA L40S", 48, 8, 22, 25, 25, 1024, 330, (10, 5), 14_000),
    "4090": _Node("NVIDIA GeForce RTX 4090", 24, 1, 20, 1.2, 25, 128, 70, (6.5, 5), 2_000),  # a desktop, one disk
    # DGX-2; ZeRO-Infinity (arXiv:2104.07857, figure 2b) gives 1.6 GB/s of disk for each of the 16
    "V100": _Node("Tesla V100-SXM3-32GB", 32, 16, 150, 100, 12, 1536, 200, (25.6, 25.6), 28_000),
    "MI300X": _Node("AMD Instinct MI300X", 192, 8, 448, 400, 55, 2048, 490, (48, 26), 28_000),
}
GPUS = tuple(_NODES)


def machine_of(gpu: str = "H100", **changes: Any) -> Machine:
    """A usual node of this GPU.

    Args:
        gpu: of ``GPUS``, in any case; the driver's name of one is understood too.
        changes: attributes of ``Machine`` to set otherwise, as ``host_bytes=128 * 2**30``.

    Raises:
        ValueError: the GPU is not in the table.
    """
    names = {name.lower(): name for name in _NODES} | {node.driver_name.lower(): name for name, node in _NODES.items()}
    if gpu.lower() not in names:
        raise ValueError(f"gpu {gpu!r} is not in the table: one of {', '.join(GPUS)}, or calibrate this machine")
    name = names[gpu.lower()]
    node = _NODES[name]
    peak = PEAKS[node.driver_name]
    flops = peak.bf16_tflop_per_s * 1e12
    machine = Machine(
        name=name,
        num_devices=node.num_devices,
        flops_per_s={"bf16": flops, "fp16": flops, "fp32": flops * FP32_SHARE},
        device_bytes=node.memory_gib * GIB,
        device_memory_bytes_per_s=peak.memory_gb_per_s * GB,
        host_bytes=node.host_gib * GIB,
        host_memory_bytes_per_s=node.host_memory * GB,
        to_device_bytes_per_s=node.pcie * GB,
        to_host_bytes_per_s=node.pcie * GB,
        disk_bytes=node.disk_gib * GIB,
        disk_read_bytes_per_s=node.disk[0] * GB,
        disk_write_bytes_per_s=node.disk[1] * GB,
        network_inside_bytes_per_s=node.inside * GB,
        network_between_bytes_per_s=node.between * GB,
    )
    return replace(machine, **changes) if changes else machine
