"""Where training state lives while it is not in use: the offload blocks of `zero_optimization`, and `aio`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.config.keys import key, stage3_only

WHOLE_TENSORS = ("Lamb", "Muon")
"""Optimizers whose update of one element needs whole tensors: no offloaded form of them is built."""

CAST = "trained ones with masters on the device have none, they are cast from them"
NO_PATH = "is nvme and nvme_path is not given: set nvme_path to a folder on the disk"


def _device(config: Any, name: str) -> Any:
    return getattr(config.zero_optimization, name).device


def _other(name: str) -> str:
    return "offload_param" if name == "offload_optimizer" else "offload_optimizer"


def _with(name: str, *devices: str) -> Callable[[Any], str | None]:
    """A key of the block `name` acts with one of these devices."""
    rule = f"acts only with {name}.device {' or '.join(devices)}"

    def reason(config: Any) -> str | None:
        if name == "offload_param" and stage3_only(config) is not None:
            return stage3_only(config)
        return None if _device(config, name) in devices else rule

    reason.__doc__ = rule
    return reason


def _path_of(name: str) -> Callable[[Any], str | None]:
    """The folder of one block serves the other too, where that one names none."""
    other = _other(name)

    def reason(config: Any) -> str | None:
        lent = _device(config, other) == "nvme" and getattr(config.zero_optimization, other).nvme_path is None
        return None if _device(config, name) == "nvme" or lent else f"acts only with {name}.device nvme"

    reason.__doc__ = f"acts with {name}.device nvme, and with {other}.device nvme where {other} names no folder"
    return reason


def _needs_path(config: Any, name: str) -> str | None:
    zero = config.zero_optimization
    found = zero.offload_optimizer.nvme_path or zero.offload_param.nvme_path
    return f"device {NO_PATH}" if _device(config, name) == "nvme" and not found else None


def _optimizer_conflict(config: Any) -> str | None:
    """refused with Lamb and Muon, which need whole tensors, and with nvme where no nvme_path is given"""
    kind = None if config.optimizer is None else config.optimizer.type
    if _device(config, "offload_optimizer") in ("cpu", "nvme") and kind in WHOLE_TENSORS:
        return f"{kind} needs whole tensors, and its states are not offloaded: use AdamW, or set device to none"
    return _needs_path(config, "offload_optimizer")


def _param_conflict(config: Any) -> str | None:
    """refused with nvme where no nvme_path is given"""
    return None if config.zero_optimization.stage in (0, 1, 2) else _needs_path(config, "offload_param")


def _optimizer_note(device: Any) -> str:
    """none: masters and moments stay where the modules compute; cpu: in host memory; nvme: in files. At any stage"""
    return {
        "cpu": "masters and moments live in host memory, and the update runs there",
        "nvme": "masters and moments live in files; the update reads, changes and writes them tile by tile on the host",
    }.get(device, "masters and moments stay on the training device")


def _param_note(device: Any) -> str:
    """none: parameter shards stay where the modules compute; cpu: in host memory; nvme: in files"""
    return {
        "cpu": f"parameter shards live in host memory between uses; {CAST}",
        "nvme": f"parameter shards live in files between uses; {CAST}",
    }.get(device, "parameter shards stay on the training device")


@dataclass(frozen=True)
class OffloadParam:
    """Where stage 3 keeps parameter shards between uses."""

    device: Literal["none", "cpu", "nvme"] = key("none", _param_note, inert=stage3_only, conflict=_param_conflict)
    nvme_path: str | None = key(None, "folder of the parameter files", inert=_path_of("offload_param"))
    buffer_count: int = key(
        5,
        "reading ahead holds at most so many buffers of buffer_size; one unit always may",
        inert=_with("offload_param", "nvme"),
        low=0,
    )
    buffer_size: int = key(
        100_000_000,
        "reading ahead holds at most buffer_count × so many",
        unit="elements",
        inert=_with("offload_param", "nvme"),
        low=0,
    )
    max_in_cpu: int = key(
        1_000_000_000,
        "so many stay in host memory, the rest is in files",
        unit="elements",
        inert=_with("offload_param", "nvme"),
        low=0,
    )
    pin_memory: bool = key(
        True, "page-locked host memory, where a GPU reads it", inert=_with("offload_param", "cpu", "nvme")
    )


@dataclass(frozen=True)
class OffloadOptimizer:
    """Where masters and moments live, and so where the optimizer runs: at any stage, 0 too."""

    device: Literal["none", "cpu", "nvme"] = key("none", _optimizer_note, conflict=_optimizer_conflict)
    nvme_path: str | None = key(None, "folder of the state files", inert=_path_of("offload_optimizer"))
    buffer_count: int = key(
        4,
        "tiles under way at once, from and to the disk or a GPU; 0 is 1",
        inert=_with("offload_optimizer", "cpu", "nvme"),
        low=0,
    )
    pin_memory: bool = key(
        True, "page-locked host memory, where a GPU reads it", inert=_with("offload_optimizer", "cpu", "nvme")
    )
    pipeline_read: bool = key(
        False, "read ahead of the update", inert="tiles are always read ahead of the update, buffer_count bounds it"
    )
    pipeline_write: bool = key(
        False, "write behind the update", inert="tiles are always written behind the update, buffer_count bounds it"
    )
    fast_init: bool = key(
        False, "faster creation of the state files", inert="a file is laid out and filled once, in order"
    )
    ratio: float = key(
        1.0,
        "fraction of masters and moments that is offloaded, in whole buckets, at any stage",
        inert=_with("offload_optimizer", "cpu", "nvme"),
        low=0,
        high=1,
    )
    super_offload: bool = key(
        False,
        "speculative steps on superchips",
        inert="nothing is speculated: at stage 3 the exact step runs under the next forward",
    )
    cpuadam_cores_perc: float = key(
        0.8, "fraction of the cores for that", inert="the update takes torch's threads", low=0, high=1
    )
    convert_grad_on_cpu: bool = key(
        True,
        "where gradients are converted to fp32",
        inert="gradients cross in the type they have, and are widened inside the update's one pass",
    )


def _with_nvme(config: Any) -> str | None:
    """acts only with offload to nvme"""
    on_disk = "nvme" in (_device(config, "offload_optimizer"), _device(config, "offload_param"))
    return None if on_disk else "acts only with offload to nvme"


@dataclass(frozen=True)
class Aio:
    """Requests to the disk, with offload to nvme. The defaults are what one disk was fastest with."""

    block_size: int = key(
        8_388_608,
        "of one request, in whole pages of 4,096; DeepSpeed's is 1,048,576",
        unit="bytes",
        inert=_with_nvme,
        low=1,
    )
    queue_depth: int = key(
        4,
        "requests under way at once, one to a thread; DeepSpeed's is 8. The larger of this and intra_op_parallelism"
        " counts",
        inert=_with_nvme,
        low=1,
    )
    intra_op_parallelism: int = key(
        2,
        "threads that carry requests out; DeepSpeed's is 1. The larger of this and queue_depth counts",
        old=("thread_count",),
        inert=_with_nvme,
        low=1,
    )
    single_submit: bool = key(False, "submit one by one", inert="each thread carries out one request at a time")
    overlap_events: bool = key(True, "submit while waiting", inert="a thread that has ended one request takes the next")
    use_gds: bool = key(
        False,
        "GPUDirect storage",
        inert="files are read into page-aligned host memory, where the update runs; no number depends on it",
    )
