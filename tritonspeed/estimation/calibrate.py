"""Measure this machine's links in about ten seconds, and keep how each figure was got.

    machine = calibrate("/local_nvme")

Every figure is the best of several tries: a bound is wanted, and neighbours only slow a link down. Under several ranks
rank 0 measures what a node shares while the others wait, all of them time the network, and all get the same answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tritonspeed import comm
from tritonspeed.comm import Mesh
from tritonspeed.estimation.machine import Machine, machine_of
from tritonspeed.offload.direct import DirectFile, Pool, Requested
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.tuning.timing import device_name, stream_gb_per_s, time_call_ms, warm_up

PRODUCTS_SHARE = 0.7  # of what its largest matrix products reach: an H100 reaches some 700 TFLOP/s, training 495
TRIED_BYTES = 256 * 2**20  # of a copy, and of the file: far above caches, short of a second on a slow disk
GATHERED_BYTES = 64 * 2**20  # what a unit of a model of some billions has
WIDTHS = (512, 1024, 2048, 4096, 8192)
LONG_MS = 250  # the next width takes eight times as long
UNKNOWN_NETWORK_BYTES_PER_S = 1.25e9  # ten gigabit Ethernet
_SHARES = {"products": 0.35, "copies": 0.1, "write": 0.25, "read": 0.2, "network": 0.1}  # of the seconds


def calibrate(path: str | os.PathLike[str] | None = None, seconds: float = 10.0, mesh: Mesh | None = None) -> Machine:
    """This machine, measured.

    Args:
        path: a folder on the disk that would be offloaded to; None is the current one. A file of 256 MiB is written
            there, read, and removed.
        seconds: how long to measure, about.
        mesh: the ranks whose network is timed; None takes all there are.

    Returns:
        a ``Machine`` whose ``how`` names the source of every figure: those that cannot be measured here (a network
        without other ranks) are a usual node's.

    Raises:
        ValueError: ``seconds`` is not positive, or the folder does not exist or cannot be written to.
    """
    if seconds <= 0:
        raise ValueError(f"calibrate: {seconds:g} seconds, must be more than 0")
    folder = Path(path) if path is not None else Path.cwd()
    if not folder.is_dir():
        raise ValueError(f"calibrate: there is no folder {str(folder)!r}: name one on the disk to offload to")
    mesh = mesh or comm.mesh_of()
    text = ""
    if mesh.rank == 0:
        text = json.dumps(dataclasses.asdict(_measure(folder, seconds, mesh.device)))
    machine = Machine(**json.loads(comm.broadcast_text(mesh, text, 0, "calibrate") if mesh.world > 1 else text))
    return _with_network(machine, mesh, seconds) if mesh.world > 1 else machine


def _measure(folder: Path, seconds: float, device: torch.device) -> Machine:
    """What one rank can measure by itself."""
    how: dict[str, str] = {}
    found: dict[str, Any] = {}

    def put(name: str, value: float, text: str) -> None:
        found[name], how[name] = value, text

    on_gpu = device.type == "cuda"
    flops = _products(device, seconds * _SHARES["products"])
    put("flops_per_s", 0, f"square matrix products up to {WIDTHS[-1]} wide, best")
    put("efficiency", PRODUCTS_SHARE, "assumed: of the largest products' speed, what a training step reaches")
    host_speed = 1e9 * stream_gb_per_s(torch.device("cpu"))
    put("host_memory_bytes_per_s", host_speed, "256 MiB read and written in place, best of 7")
    put("host_bytes", _host_bytes(), "the system's, or the control group's limit")
    _copies(put, device, host_speed, seconds * _SHARES["copies"])
    if on_gpu:
        put("device_memory_bytes_per_s", 1e9 * stream_gb_per_s(device), "1 GiB read and written in place, best of 7")
        put("device_bytes", torch.cuda.get_device_properties(device).total_memory, "the driver's")
    else:
        put("device_memory_bytes_per_s", host_speed, "the host's: they are one memory")
        put("device_bytes", _host_bytes(), "the host's: they are one memory")
    _disk(put, folder, seconds)
    name = device_name(device)
    _usual_network(put, name, host_speed, on_gpu)
    found["flops_per_s"] = flops
    found["num_devices"] = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    return Machine(name=name, shares_memory=not on_gpu, how=how, **found)


Put = Callable[[str, float, str], None]


def _best(call: Callable[[], float], seconds: float) -> float:
    """The highest of what ``call`` returns, in at least two tries and until the time is up."""
    end = time.monotonic() + seconds
    best = max(call(), call())
    while time.monotonic() < end:
        best = max(best, call())
    return best


def _products(device: torch.device, seconds: float) -> dict[str, float]:
    """Flops per second of square products by dtype: wider ones as long as they take less than their time."""
    warm_up(device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if device.type != "cuda":
        del dtypes["fp16"]  # no processor here trains in it
    found = {}
    for name, dtype in dtypes.items():
        end, best = time.monotonic() + seconds / len(dtypes), 0.0
        for width in WIDTHS:
            a = torch.ones(width, width, device=device, dtype=dtype)
            out = torch.empty_like(a)
            tries = [time_call_ms(lambda a=a, out=out: torch.mm(a, a, out=out), device) for _ in range(3)]
            best = max(best, 2e3 * width**3 / min(tries))
            if min(tries) > LONG_MS or time.monotonic() + 8 * 3e-3 * min(tries) > end:
                break
        found[name] = best
    return found


def _copies(put: Put, device: torch.device, host_speed: float, seconds: float) -> None:
    ways = {"to_device": "to_device_bytes_per_s", "to_host": "to_host_bytes_per_s"}
    if device.type != "cuda":
        for name in ways.values():
            put(name, host_speed, "nothing crosses: device and host are one memory")
        return
    there = torch.empty(TRIED_BYTES, dtype=torch.uint8, device=device)
    here = host_empty(TRIED_BYTES, torch.uint8, pin=True)
    for way, (target, source) in {"to_device": (there, here), "to_host": (here, there)}.items():

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> float:
            return 1e3 * TRIED_BYTES / time_call_ms(lambda: target.copy_(source, non_blocking=True), device)

        put(ways[way], _best(copy, seconds / 2), "256 MiB of page-locked memory copied, best")


def _disk(put: Put, folder: Path, seconds: float) -> None:
    """Direct requests to a file that is removed, as offloading makes them."""
    try:
        descriptor, name = tempfile.mkstemp(suffix=".calibrate", dir=folder)
    except OSError as error:
        raise ValueError(f"calibrate: {str(folder)!r} cannot be written to ({error}): name another folder") from error
    put("disk_bytes", shutil.disk_usage(folder).free, "free now")
    pool, file = Pool(Requests()), None
    try:
        num_bytes = min(TRIED_BYTES, shutil.disk_usage(folder).free // 4 // 2**20 * 2**20)
        os.truncate(descriptor, num_bytes)
        file = DirectFile(name, pool, 0, num_bytes)
        buffer = host_empty(num_bytes, torch.uint8).random_(0, 256)  # some disks compress

        def write() -> float:
            start = time.perf_counter()
            file.write(0, buffer).wait()
            file.sync().wait()
            return num_bytes / (time.perf_counter() - start)

        def read() -> float:
            start = time.perf_counter()
            file.read(0, buffer).wait()
            return num_bytes / (time.perf_counter() - start)

        how = "direct" if file.is_direct else "through the page cache, which this file system wants:"
        put("disk_write_bytes_per_s", _best(write, seconds * _SHARES["write"]), f"{how} writes of 8 MiB and fdatasync")
        put("disk_read_bytes_per_s", _best(read, seconds * _SHARES["read"]), f"{how} reads of 8 MiB")
        put("disk_is_duplex", _is_duplex(file, buffer), "one half read while the other is written, three times")
    finally:
        if file is not None:
            file.close()
        pool.close()
        os.close(descriptor)
        os.unlink(name)


def _is_duplex(file: DirectFile, buffer: torch.Tensor) -> bool:
    """Whether reading and writing at once takes nearer to the longer of the two than to their sum."""
    half = buffer.numel() // 2 // PAGE_BYTES * PAGE_BYTES
    low, high = buffer[:half], buffer[half : 2 * half]

    def took(*starts: Callable[[], Requested]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for handle in [each() for each in starts]:
                handle.wait()
            best = min(best, time.perf_counter() - start)
        return best

    def write() -> Requested:
        return file.write(0, low)

    def read() -> Requested:
        return file.read(half, high)

    alone = took(write), took(read)
    return took(write, read) < (max(alone) + sum(alone)) / 2


def _usual_network(put: Put, name: str, host_speed: float, on_gpu: bool) -> None:
    """The figures that one rank cannot measure: a usual node's of this GPU, or what a copy through memory takes."""
    inside, between = "network_inside_bytes_per_s", "network_between_bytes_per_s"
    try:
        usual = machine_of(name)
    except ValueError:
        text = "not measured: ranks of one host exchange through its memory, half of its bandwidth"
        put(inside, host_speed / 2, text if not on_gpu else "not measured, and this GPU is not in the table: assumed")
        put(between, UNKNOWN_NETWORK_BYTES_PER_S, "not measured: ten gigabit Ethernet is assumed")
        return
    put(inside, usual.network_inside_bytes_per_s, f"not measured: a usual node of {usual.name}")
    put(between, usual.network_between_bytes_per_s, f"not measured: a usual node of {usual.name}")


def _with_network(machine: Machine, mesh: Mesh, seconds: float) -> Machine:
    """The same with the speed at which these ranks gather, taken for the inside where they are on one host."""
    whole = torch.zeros(GATHERED_BYTES // mesh.world * mesh.world, dtype=torch.uint8, device=mesh.device)
    received = whole.numel() * (mesh.world - 1) / mesh.world
    speeds = []
    for _ in range(max(3, int(seconds))):  # a fixed number: every rank issues as many
        mesh.barrier()
        start = time.perf_counter()
        comm.all_gather_(mesh, whole, "calibrate").wait()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        speeds.append(received / (time.perf_counter() - start))
    slowest = torch.tensor([max(speeds)], dtype=torch.float64, device=mesh.device)
    speed = float(comm.exchange(mesh, slowest).min())
    hosts = len(set(comm.gather_texts(mesh, os.uname().nodename, "calibrate")))
    link = "network_inside_bytes_per_s" if hosts == 1 else "network_between_bytes_per_s"
    changes: dict[str, Any] = {link: speed}
    how = {**machine.how, link: f"{mesh.world} ranks on {hosts} hosts gathering 64 MiB over {mesh.backend}, best"}
    return dataclasses.replace(machine, how=how, **changes)


def _host_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return physical
    return min(physical, limit)
