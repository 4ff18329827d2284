"""A file read and written: ours by block × requests under way, fio, safetensors, maps and the page cache, in turns.

    python -m bench.offload.bench_disk --path FOLDER [--mib 1024] [--rounds 7] [--fio fio] [--sweep]

Reading starts cold: before every turn the file's pages are dropped from the cache. Writing ends when the disk has it
(fdatasync, or fsync where a library leaves no other way), and overwrites a file of that size, but for
``safetensors save_file``, which always makes a new one. Everybody reads into, and writes from, the same page-aligned
memory; fio has buffers of its own and is charged for the time it reports itself, without its start. In large pages, as
ours are, it is up to twice as fast here as in small ones, where a request is cut into many segments; so both are run,
large pages through a knob of glibc's malloc. CPU seconds are of the process and its children, fio's start included.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness import RESULTS, device_name, machine
from tritonspeed.offload.direct import DirectFile, Pool
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.offload.page_file import PageFile, Piece, create

MI = 2**20
GOAL = 0.9  # of the fastest fio
SWEEP = [(block, depth) for block in (1, 2, 4, 8, 16, 32) for depth in (1, 2, 4, 8)]
SETTINGS = [(8, 1), (8, 4), (16, 4), (32, 4)]
STANDARD = Requests()
FIO = [("libaio", 8, 4), ("libaio", 8, 8), ("libaio", 1, 32), ("psync", 8, 4), ("psync", 1, 8)]
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Turn = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Row:
    """One way to move the file."""

    way: str
    variant: str
    is_ours: bool
    median_mib_per_s: float
    p20_mib_per_s: float
    p80_mib_per_s: float
    best_mib_per_s: float
    cpu_s_per_gib: float


class Files:
    """The file that is moved, 1-D fp32 under the name "w", and the memory it goes to and comes from."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.path, self.other, self.num_bytes = folder / "flat.safetensors", folder / "saved.safetensors", num_bytes
        numel = num_bytes // 4
        self.begin = create(self.path, PageFile("b", "master", torch.float32, numel, (Piece.of("w", (numel,), 0),)))
        self.buffer = host_empty(numel, torch.float32).normal_()

    def drop_pages(self, path: Path) -> None:
        """Nothing of the file is in the cache."""
        with open(path, "rb") as stream:
            os.fdatasync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def remove(self) -> None:
        for path in (self.path, self.other):
            path.unlink(missing_ok=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(files: Files, way: str, block_mib: int, depth: int) -> Turn:
    """Through ``DirectFile``, as the disk tier does."""

    def turn() -> float:
        pool = Pool(Requests(block_mib * MI, depth, depth))
        file = DirectFile(files.path, pool, files.begin, files.num_bytes)

        def work() -> None:
            if way == "read":
                file.read(0, files.buffer).wait()
            else:
                file.write(0, files.buffer).wait()
                file.sync().wait()

        took = seconds(work)
        pool.close()
        file.close()
        return took

    return turn


def fio(program: str, files: Files, way: str, setting: tuple[str, int, int], variables: dict[str, str]) -> Turn:
    """fio on the same bytes of the same file, past the same header."""
    engine, block_mib, depth = setting
    jobs = depth if engine == "psync" else 1
    each = files.num_bytes // jobs
    command = [program, "--name=j", f"--filename={files.path}", f"--rw={way}", "--direct=1", f"--ioengine={engine}"]
    command += [f"--bs={block_mib}m", f"--iodepth={depth if jobs == 1 else 1}", f"--offset={files.begin}"]
    command += [f"--size={each}", f"--numjobs={jobs}", f"--offset_increment={each}", "--thread", "--group_reporting"]
    command += ["--output-format=json", "--fallocate=none", "--iomem_align=4096", "--randrepeat=1", "--invalidate=0"]
    if way == "write":
        command += ["--end_fsync=1", "--overwrite=1"]

    def turn() -> float:
        environment = os.environ | variables
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][way]
        return job["runtime"] / 1e3  # of the slowest job, with the fsync

    return turn


def copied(files: Files, tensor: Tensor, way: str) -> None:
    if way == "read":
        files.buffer.copy_(tensor)
    else:
        tensor.copy_(files.buffer)


def buffered(files: Files, way: str) -> Turn:
    """preadv or pwritev through the page cache, in one thread."""
    view = files.buffer.view(torch.uint8).numpy().data
    call = os.preadv if way == "read" else os.pwritev

    def work() -> None:
        descriptor = os.open(files.path, os.O_RDWR)
        for lo in range(0, files.num_bytes, 8 * MI):
            call(descriptor, [view[lo : lo + 8 * MI]], files.begin + lo)
        if way == "write":
            os.fdatasync(descriptor)
        os.close(descriptor)

    return lambda: seconds(work)


def mapped(files: Files, way: str) -> Turn:
    """A shared map, copied from or to."""

    def work() -> None:
        with open(files.path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as pages:
            tensor = torch.frombuffer(pages, dtype=torch.float32, offset=files.begin, count=files.num_bytes // 4)
            copied(files, tensor, way)
            del tensor
            if way == "write":
                pages.flush()

    return lambda: seconds(work)


def from_file(files: Files, way: str) -> Turn:
    """``torch.from_file``, which maps from the file's beginning."""

    def work() -> None:
        size = (files.begin + files.num_bytes) // 4
        tensor = torch.from_file(str(files.path), shared=way == "write", size=size, dtype=torch.float32)
        copied(files, tensor[files.begin // 4 :], way)
        del tensor
        if way == "write":
            with open(files.path, "r+b") as stream:
                os.fsync(stream.fileno())

    return lambda: seconds(work)


def opened(files: Files) -> None:
    """safetensors, tensor by tensor."""
    with safe_open(files.path, "pt") as tensors:
        files.buffer.copy_(tensors.get_tensor("w"))


def saved(files: Files) -> None:
    """safetensors writes a new file."""
    save_file({"w": files.buffer}, files.other)
    with open(files.other, "r+b") as stream:
        os.fsync(stream.fileno())


def variants(files: Files, way: str, settings: list[tuple[int, int]], program: str | None) -> dict[str, Turn]:
    """Name → what takes a turn."""
    found = {f"ours {block} MiB × {depth}": ours(files, way, block, depth) for block, depth in settings}
    if program is not None:
        for pages, variables in (("", {}), (", large pages", LARGE_PAGES)):
            for setting in FIO:
                engine, block, depth = setting
                name = f"fio {engine} {block} MiB × {depth}{pages}"
                found[name] = fio(program, files, way, setting, variables)
    if way == "read":
        found["safetensors safe_open"] = lambda: seconds(lambda: opened(files))
        found["safetensors load_file"] = lambda: seconds(lambda: files.buffer.copy_(load_file(files.path)["w"]))
    else:
        found["safetensors save_file"] = lambda: seconds(lambda: saved(files))
    found["preadv" if way == "read" else "pwritev"] = buffered(files, way)
    found["mmap"] = mapped(files, way)
    found["torch.from_file"] = from_file(files, way)
    return found


def measured(files: Files, way: str, turns: dict[str, Turn], rounds: int) -> list[Row]:
    """Rounds over all variants, each round beginning with another; the first round is not counted."""
    took: dict[str, list[float]] = {name: [] for name in turns}
    cpu: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            files.drop_pages(files.path)
            before = sum(os.times()[:4])
            elapsed = turns[name]()
            if number >= 0:
                took[name].append(elapsed)
                cpu[name].append(sum(os.times()[:4]) - before)
            if files.other.exists():
                files.other.unlink()
    rows = []
    for name in names:
        rates = sorted(files.num_bytes / MI / s for s in took[name])
        p20, *_, p80 = statistics.quantiles(rates, n=5, method="inclusive")
        per_gib = statistics.median(cpu[name]) * 2**30 / files.num_bytes
        rows.append(
            Row(way, name, name.startswith("ours"), statistics.median(rates), p20, p80, rates[-1], per_gib)
        )  # fmt: skip
    return rows


def report(rows: list[Row], folder: Path, num_bytes: int, rounds: int, version: str) -> Path:
    """JSON and a page, the goal first."""
    lines = [f"# One file of {num_bytes // MI} MiB, read cold and written durably ({rounds} rounds in turns)", ""]
    standard = f"ours {STANDARD.block_bytes // MI} MiB × {STANDARD.depth}"
    for way in ("read", "write"):
        here = sorted((row for row in rows if row.way == way), key=lambda row: -row.median_mib_per_s)
        standard_row = next(row for row in here if row.variant == standard)
        peers = [row for row in here if row.variant.startswith("fio")]
        if peers:  # the fastest of fio's settings, not the one that is ours
            share = standard_row.median_mib_per_s / peers[0].median_mib_per_s
            lines.append(f"- {way}: {standard}, the default, is {share:.2f} × {peers[0].variant} (goal {GOAL})")
        ahead = [
            row.variant for row in here if not row.is_ours and row.median_mib_per_s > standard_row.median_mib_per_s
        ]
        lines.append(f"- {way}: faster than the default: {', '.join(ahead) or 'nobody'}")
        lines += ["", f"| {way} | median MiB/s | p20 | p80 | best | CPU s/GiB |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.variant} | {row.median_mib_per_s:.0f} | {row.p20_mib_per_s:.0f} | {row.p80_mib_per_s:.0f} "
            f"| {row.best_mib_per_s:.0f} | {row.cpu_s_per_gib:.2f} |"
            for row in here
        ]
        lines.append("")
    cpu = torch.device("cpu")
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(cpu)).split()).lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}_{name}_disk.json"
    record = {"machine": machine(cpu) | {"fio": version}, "bytes": num_bytes, "rounds": rounds}
    path.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    text = "\n".join(lines) + f"\nLoad average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"
    path.with_suffix(".md").write_text(text)
    print(text + f"written: {path}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True, help="a folder on the disk")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fio", default=shutil.which("fio"), help="the program")
    parser.add_argument("--sweep", action="store_true", help="all settings of ours, instead of a few")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    settings = SWEEP if arguments.sweep else SETTINGS
    version = "none"
    if arguments.fio:
        version = subprocess.run([arguments.fio, "--version"], capture_output=True, text=True).stdout.strip()
    files, rows = Files(arguments.path, arguments.mib * MI), []
    try:
        for way in ("write", "read"):
            turns = variants(files, way, settings, arguments.fio)
            rows += measured(files, way, turns, arguments.rounds)
    finally:
        with suppress(OSError):
            files.remove()
    report(rows, arguments.out, files.num_bytes, arguments.rounds, version)


if __name__ == "__main__":
    main()
