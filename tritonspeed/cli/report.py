"""`tritonspeed report`: what this machine has, what works on it, and what to do where it does not.

On a GPU each Triton kernel is run once against its PyTorch reference, because a compiler that is installed is not yet
one that works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tritonspeed import comm
from tritonspeed.cli import machine
from tritonspeed.cli.kernel_check import KernelRun, run_kernels
from tritonspeed.cli.neighbours import Neighbour, meanings, neighbours
from tritonspeed.kernels.cards import read_card
from tritonspeed.kernels.store import SHIPPED, FolderStore, default_folder
from tritonspeed.version import __version__

_NEEDED = ("torch", "triton", "numpy", "safetensors", "einops", "hjson", "rich")
_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}
_FITS = {"tried": "green", "not tried": "yellow", "too old": "red", "absent": "default"}
_WORKER_SHM_BYTES = 1 << 30
"""Below this, a DataLoader with workers soon meets a bus error: containers start with 64 MiB."""


@dataclass(frozen=True)
class Row:
    """One thing that may work. `status` is ok, limited or missing; `remedy` is empty where it is ok."""

    what: str
    status: str
    found: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """Everything the command prints. Sizes are in bytes."""

    versions: dict[str, str | None]
    neighbours: list[Neighbour]
    deepspeed: dict[str, str]
    """How a script is started → what `import deepspeed` gives it."""
    devices: list[dict[str, str | int]]
    memory: dict[str, int | None]
    rows: list[Row]
    kernels: list[KernelRun]
    tuned: dict[str, dict[str, int]]
    """Folder → card → number of launch configurations that were measured on it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-kernels", action="store_true", help="do not run the Triton kernels on the GPU")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 where a Triton kernel ran and failed, else 0."""
    report = gather(with_kernels=not args.no_kernels)
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    return 0 if all(kernel.passed for kernel in report.kernels) else 1


def gather(with_kernels: bool = True) -> Report:
    """Ask the machine.

    Args:
        with_kernels: run each Triton kernel once where there is a GPU.
    """
    total, available = machine.host_memory()
    shm = machine.shared_memory()
    kernels = run_kernels() if with_kernels and torch.cuda.is_available() else []
    rows = [
        _ranks_row(),
        _nccl_row(),
        _hosts_row(),
        _kernels_row(kernels),
        _tuned_row(_tuned()),
        _compiler_row(),
        _compile_row(),
        _bf16_row(),
        _shm_row(shm),
    ]
    versions = {"tritonspeed": __version__, "python": platform.python_version(), **machine.package_versions(_NEEDED)}
    versions |= {"CUDA of torch": torch.version.cuda, "ROCm of torch": torch.version.hip}
    versions["driver"] = machine.driver_version()
    return Report(
        versions=versions,
        neighbours=neighbours(),
        deepspeed=meanings(),
        devices=_devices(),
        memory={"host": total, "host available": available, "/dev/shm": shm[0] if shm else None},
        rows=rows,
        kernels=kernels,
        tuned=_tuned(),
    )


def _tuned() -> dict[str, dict[str, int]]:
    """What the stores hold, the user's first. Reading them needs no GPU."""
    folders = [comm.tuned_folder() or default_folder(), SHIPPED]
    stores = [FolderStore(folder) for folder in folders if folder is not None]
    return {
        str(store.folder): {card: sum(counts.values()) for card, counts in store.summary().items()} for store in stores
    }


def _devices() -> list[dict[str, str | int]]:
    """The GPUs torch sees; without one, the processor. Asking for properties allocates nothing."""
    found: list[dict[str, str | int]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = (
            getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        )
        found.append({"name": properties.name, "arch": arch, "bytes": properties.total_memory})
    cores = machine.num_cores()
    return [*found, {"name": machine.cpu_name() or "CPU", "arch": platform.machine(), "cores": cores}]


def _ranks_row() -> Row:
    what = "several ranks on one machine (gloo)"
    if not torch.distributed.is_available():
        return Row(what, "missing", "torch without torch.distributed", "install torch's own wheel; one rank works")
    if not torch.distributed.is_gloo_available():
        return Row(what, "missing", "torch without gloo", "install torch's own wheel; NCCL ranks on GPUs work")
    return Row(what, "ok", f"gloo, {machine.num_cores()} cores", "")


def _nccl_row() -> Row:
    what = "several GPUs (NCCL, RCCL)"
    count = torch.cuda.device_count()
    if count == 0:
        found = "no GPU is visible"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            found += f" (CUDA_VISIBLE_DEVICES={hidden!r})"
        elif torch.version.cuda is None and torch.version.hip is None:
            found += ": this torch is built for the CPU"
        return Row(what, "missing", found, "ranks run on the CPU over gloo, with the same numbers up to rounding")
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return Row(what, "missing", "torch without NCCL", "install torch's CUDA or ROCm wheel; one GPU works")
    if count == 1:
        return Row(what, "limited", "1 GPU", "one rank, on the GPU; more ranks need a GPU each")
    return Row(what, "ok", f"{count} GPUs", "")


def _hosts_row() -> Row:
    what = "several hosts"
    found = [name for name in ("ssh", "srun") if shutil.which(name)]
    if found:
        return Row(what, "ok", ", ".join(found), "")
    remedy = "run `tritonspeed run --no_ssh --node_rank K --hostfile FILE ...` on each host"
    return Row(what, "limited", "neither ssh nor srun", remedy)


def _kernels_row(kernels: list[KernelRun]) -> Row:
    what = "Triton kernels"
    if not torch.cuda.is_available():
        remedy = "their PyTorch references take their place; TRITON_INTERPRET=1 runs the kernels themselves, slowly"
        return Row(what, "limited", "no GPU is visible", remedy)
    if not kernels:
        return Row(what, "limited", "not run", "leave out --no-kernels")
    failed = [kernel.name for kernel in kernels if not kernel.passed]
    if failed:
        return Row(what, "missing", f"failed: {', '.join(failed)}", "see the kernels' own lines below")
    return Row(what, "ok", f"{len(kernels)} of {len(kernels)} agree with their reference", "")


def _tuned_row(tuned: dict[str, dict[str, int]]) -> Row:
    what = "tuned launch configurations"
    found = [f"{count} for {card}" for cards in tuned.values() for card, count in cards.items()]
    if not torch.cuda.is_available():
        return Row(what, "limited", ", ".join(found) or "none", "without a GPU nothing is launched and nothing tuned")
    key = read_card("cuda", torch.cuda.current_device()).key
    if any(key in cards for cards in tuned.values()):
        return Row(what, "ok", ", ".join(found), "")
    remedy = f"`tritonspeed tune --shapes MODEL` for {key}; until then heuristics choose"
    return Row(what, "limited", ", ".join(found) or "none", remedy)


def _compiler_row() -> Row:
    what = "C compiler (Triton's launcher, once per kernel)"
    compiler = machine.c_compiler(os.environ)
    if torch.cuda.is_available() and compiler is None:
        return Row(what, "missing", "neither gcc nor clang", "install gcc, or set CC; no CUDA toolkit is needed")
    if compiler is None:
        return Row(what, "limited", "neither gcc nor clang", "not needed without a GPU; with one, install gcc")
    if not machine.has_python_headers():
        return Row(what, "limited", f"{compiler}, but no Python.h", "install Python's headers (python3-dev)")
    return Row(what, "ok", compiler, "")


def _compile_row() -> Row:
    what = "torch.compile on the CPU"
    compiler = machine.cxx_compiler(os.environ)
    if compiler is None:
        return Row(what, "missing", "neither g++ nor clang++", "install g++; without it PyTorch runs uncompiled")
    return Row(what, "ok", compiler, "")


def _bf16_row() -> Row:
    what = "bf16 arithmetic"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Row(what, "ok", torch.cuda.get_device_name(0), "")
        return Row(what, "limited", f"{torch.cuda.get_device_name(0)} emulates it", 'use "fp16": {"enabled": true}')
    native = machine.cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}
    if native:
        return Row(what, "ok", ", ".join(sorted(native)), "")
    return Row(what, "limited", "the processor emulates it", "right but slow; fp32 is faster on this processor")


def _shm_row(shm: tuple[int, int] | None) -> Row:
    what = "shared memory for DataLoader workers"
    if shm is None:
        return Row(what, "limited", "no /dev/shm", "use num_workers=0 in a DataLoader")
    if shm[0] < _WORKER_SHM_BYTES:
        remedy = "start the container with --shm-size=1g or more, or use num_workers=0"
        return Row(what, "limited", f"/dev/shm has {_size(shm[0])}", remedy)
    return Row(what, "ok", f"/dev/shm has {_size(shm[0])}", "")


def _print(report: Report) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and a table folded at 80 columns cannot be read
    console.print(_versions_table(report))
    table = Table(title="What works here", title_justify="left")
    for name in ("", "status", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in report.rows:
        table.add_row(row.what, f"[{_STYLES[row.status]}]{row.status}[/]", escape(row.found), row.remedy)
    console.print(table)
    console.print(_neighbours_table(report))
    if report.kernels:
        console.print(_kernels_table(report.kernels))


def _versions_table(report: Report) -> Table:
    table = Table(title="This machine", title_justify="left", show_header=False)
    for name, version in report.versions.items():
        table.add_row(name, version or "-")
    for device in report.devices:
        size = _size(int(device["bytes"])) if "bytes" in device else f"{device['cores']} cores"
        table.add_row("device", f"{device['name']}, {device['arch']}, {size}")
    for name, size_bytes in report.memory.items():
        table.add_row(f"memory, {name}", _size(size_bytes) if size_bytes is not None else "-")
    return table


def _neighbours_table(report: Report) -> Table:
    table = Table(title="Scripts that say deepspeed", title_justify="left")
    for name in ("beside it", "version", "", ""):
        table.add_column(name, overflow="fold")
    for each in report.neighbours:
        table.add_row(each.name, each.version or "-", f"[{_FITS[each.fits]}]{each.fits}[/]", escape(each.says))
    table.add_section()
    for started, means in report.deepspeed.items():
        table.add_row("import deepspeed", "", started, escape(means))
    return table


def _kernels_table(kernels: list[KernelRun]) -> Table:
    table = Table(title="Triton kernels, each run against its reference", title_justify="left")
    for name in ("kernel", "status", "first run (compiles)", "again", "largest difference", "error"):
        table.add_column(name, overflow="fold")
    for kernel in kernels:
        status = "[green]pass[/]" if kernel.passed else "[red]fail[/]"
        times = (f"{kernel.first_ms:.0f} ms", f"{kernel.again_ms:.3f} ms", f"{kernel.difference:.1e}")
        table.add_row(kernel.name, status, *(times if not kernel.error else ("", "", "")), escape(kernel.error))
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
