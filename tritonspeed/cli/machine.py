"""What this machine is: memory within the limits it may use, cores, compiler, versions. Facts only, no judgement.

Every function reads what the system says about itself; none allocates on a device or imports torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a number near 2^63 where there is no limit


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes of host memory that this process may use.

    A container sees the whole host in /proc/meminfo and is killed at its cgroup's limit: the smaller one counts.

    Args:
        root: where /proc and /sys are.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():  # macOS
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    kib = {name: int(value) for name, value in re.findall(r"(\w+):\s+(\d+) kB", meminfo.read_text())}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for limit, used in cgroup_memory(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def cgroup_memory(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) bytes of each memory cgroup around this process that has a limit."""
    listing = root / "proc/self/cgroup"
    if not listing.is_file():
        return []
    found = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: one tree
            tree, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            tree, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = tree / path.lstrip("/")
        # A container may see its own group as the root of the tree while its path is the host's.
        for folder in dict.fromkeys((group, *group.parents, tree)):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if folder.is_relative_to(tree) and limit is not None and limit < _UNLIMITED_BYTES:
                found.append((limit, used or 0))
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as Linux states it; empty where it states none."""
    path = root / "proc/cpuinfo"
    match = re.search(r"^model name\s*:(.*)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return match[1].strip() if match else ""


def cpu_flags(root: Path = Path("/")) -> set[str]:
    """The processor's features as Linux names them; empty where it is not Linux."""
    path = root / "proc/cpuinfo"
    if not path.is_file():
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE)
    return set(match[1].split()) if match else set()


def shared_memory(path: str = "/dev/shm") -> tuple[int, int] | None:
    """(size, free) bytes of the memory file system that workers share tensors through; None where there is none."""
    try:
        stats = os.statvfs(path)
    except OSError:
        return None
    return stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize


def c_compiler(env: Mapping[str, str]) -> str | None:
    """The C compiler Triton takes: $CC, gcc or clang. None where there is none."""
    given = env.get("CC")
    return shutil.which(given.split()[0]) if given else shutil.which("gcc") or shutil.which("clang")


def cxx_compiler(env: Mapping[str, str]) -> str | None:
    """The C++ compiler torch.compile takes on a CPU: $CXX, g++ or clang++. None where there is none."""
    given = env.get("CXX")
    return shutil.which(given.split()[0]) if given else shutil.which("g++") or shutil.which("clang++")


def has_python_headers() -> bool:
    """Whether Python.h is there: Triton compiles a small launcher against it."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def driver_version(root: Path = Path("/")) -> str | None:
    """The GPU driver's version as the kernel module states it: NVIDIA's or AMD's. None without one."""
    nvidia, amd = root / "proc/driver/nvidia/version", root / "sys/module/amdgpu/version"
    if nvidia.is_file():
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", nvidia.read_text())
        return f"NVIDIA {match[1]}" if match else "NVIDIA"
    return f"amdgpu {amd.read_text().strip()}" if amd.is_file() else None


def package_versions(names: Sequence[str]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
