"""The optimizer step on the host: ours compiled and chunked, DeepSpeed's whole path, torch's, and the memory's roof.

    python -m bench.offload.bench_host_step --peer-python VENV/bin/python [--elements 67108864] [--rounds 25]

VENV is what bench/peers/setup.sh makes. A step takes a gradient, unscales and clips it, updates fp32 masters and states
and leaves bf16 weights. Ours and torch's take a bf16 gradient; DeepSpeed's takes the fp32 one its offload hands over
(clip, C++ optimizer, copy) in a process of its own, which waits while others are timed. All in turns, each round
starting with another one; buffers on large pages, DeepSpeed also on those that torch.empty gives.

Bytes charged to everyone: what one pass must move, 28 an element for AdamW, 20 for Lion and Adagrad. The roof is
reading and writing as many bytes in place (``x.add_(0)``). On a machine that others use, the best of many short rounds
is the figure, each started when nobody else is runnable if that can be had; the ratio is also given as the median over
rounds, where a neighbour's load meets both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import RESULTS, device_name, machine, time_call_ms
from bench.offload.host_step_peer import MARK
from bench.systems.launch import ROOT, environment
from tritonspeed.kernels import adagrad_, adamw_, host_step, lion_
from tritonspeed.kernels.adamw import adamw_reference
from tritonspeed.offload.memory import host_empty

CPU = torch.device("cpu")
BYTES_PER_ELEM = {"adamw": 28, "lion": 20, "adagrad": 20}
GOAL_RATIO, GOAL_PERCENT = 0.65, 90.0
DEEPSPEED, OURS = "DeepSpeed: clip, step, copy", "ours, compiled"
STREAM, COPY = "in-place stream of as many bytes", "copy, fp32"
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FUSED = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}


@dataclass(frozen=True)
class Row:
    """One variant; percent_of_stream of the best against the best, the ratios against DeepSpeed on large pages."""

    rule: str
    num_threads: int
    variant: str
    best_ns: float
    median_ns: float
    gb_per_s: float
    percent_of_stream: float
    ratio_of_best: float
    median_ratio: float


class Buffers:
    """One set for all variants of ours and torch's: what a step reads and writes, on large pages."""

    def __init__(self, num_elems: int) -> None:
        def new(dtype: torch.dtype = torch.float32) -> Tensor:
            return host_empty(num_elems, dtype).fill_(0.25)

        self.master, self.first, self.second = new(), new(), new()
        self.grad, self.copy = new(torch.bfloat16), new(torch.bfloat16)
        self.other = new()
        self.scale = torch.tensor(0.999)
        self.step = torch.tensor(7.0)


def ours(b: Buffers, rule: str, form: str) -> Callable[[], None]:
    """Our operator in one form."""
    shared = {"grad_scale": b.scale, "param_out": b.copy, "weight_decay": 0.1, "lr": 1e-3}

    def run() -> None:
        host_step.use_host_step(form)
        if rule == "adamw":
            adamw_(b.master, b.first, b.second, b.grad, step=7, betas=(0.9, 0.95), eps=1e-8, **shared)
        elif rule == "lion":
            lion_(b.master, b.first, b.grad, betas=(0.9, 0.99), **shared)
        else:
            adagrad_(b.master, b.first, b.grad, step=7, lr_decay=0.0, eps=1e-10, **shared)

    return run


def torch_fused(b: Buffers) -> None:
    """What torch's own fused step costs with bf16 at both ends."""
    g = b.grad.float().mul_(b.scale)
    torch._fused_adamw_([b.master], [g], [b.first], [b.second], [], [b.step], **FUSED)
    b.copy.copy_(b.master)


def stream(b: Buffers, bytes_per_elem: int) -> None:
    """Read and write as many bytes as the step, in place and without arithmetic worth the name."""
    for x in (b.master, b.first, b.second, b.other):
        num_elems = min(x.numel(), x.numel() * bytes_per_elem // 8)
        x[:num_elems].add_(0.0)
        bytes_per_elem -= 8
        if bytes_per_elem <= 0:
            return


def variants_of(rule: str, b: Buffers, with_slow: bool) -> dict[str, Callable[[], object]]:
    """Name → one step, in this process."""
    found: dict[str, Callable[[], object]] = {
        OURS: ours(b, rule, "compiled"),
        "ours, chunked": ours(b, rule, "chunked"),
    }
    if rule == "adamw" and with_slow:
        found["torch fused, whole tensors"] = lambda: torch_fused(b)
        compiled = torch.compile(adamw_reference, dynamic=False)
        found["torch.compile of the reference"] = lambda: compiled(
            b.master, b.first, b.second, b.grad, step=7, grad_scale=b.scale, param_out=b.copy, **ADAMW
        )
    found[STREAM] = lambda: stream(b, BYTES_PER_ELEM[rule])
    found[COPY] = lambda: b.other.copy_(b.second)
    return found


class Peer:
    """DeepSpeed in its own process and environment: one step per question."""

    def __init__(self, python: str, num_elems: int, num_threads: int) -> None:
        command = [python, "-m", "bench.offload.host_step_peer", str(num_elems), str(num_threads)]
        settings = {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment(python, settings), cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def step_ms(self, rule: str, pages: str) -> float:
        """One step, timed over there."""
        assert self.process.stdin is not None and self.process.stdout is not None, "started with pipes"
        print(rule, pages, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(MARK):
                return float(line.split()[1])
        raise RuntimeError(f"DeepSpeed's process ended with {self.process.wait()}")

    def stop(self) -> None:
        """End it: its input ends."""
        assert self.process.stdin is not None, "started with a pipe"
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(rule: str, num_threads: int, b: Buffers, options: argparse.Namespace) -> list[Row]:
    """All variants of one rule in turns."""
    torch.set_num_threads(num_threads)
    calls: dict[str, Callable[[], float]] = {
        name: (lambda run=run: time_call_ms(run, CPU)) for name, run in variants_of(rule, b, options.with_torch).items()
    }
    peers = {}
    for name, pages in ((DEEPSPEED, "large"), (f"{DEEPSPEED} (torch.empty)", "small")):
        peers[name] = Peer(options.peer_python, options.elements, num_threads)
        calls[name] = lambda peer=peers[name], pages=pages: peer.step_ms(rule, pages)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for r in range(-2, options.rounds):
        for k in range(len(names)):
            name = names[(r + k) % len(names)]
            wait_until_alone(options.wait_s)
            elapsed = calls[name]()
            if r >= 0:
                times[name].append(elapsed)
    for peer in peers.values():
        peer.stop()
    bytes_moved = options.elements * BYTES_PER_ELEM[rule]
    rows = []
    for name, taken in times.items():
        moved = 8 * options.elements if name == COPY else bytes_moved
        pairs = [mine / theirs for mine, theirs in zip(taken, times[DEEPSPEED], strict=True)]
        rows.append(
            Row(
                rule=rule,
                num_threads=num_threads,
                variant=name,
                best_ns=1e6 * min(taken) / options.elements,
                median_ns=1e6 * statistics.median(taken) / options.elements,
                gb_per_s=moved / min(taken) / 1e6,
                percent_of_stream=100 * moved / min(taken) / (bytes_moved / min(times[STREAM])),
                ratio_of_best=min(taken) / min(times[DEEPSPEED]),
                median_ratio=statistics.median(pairs),
            )
        )
    return rows


def wait_until_alone(limit_s: float) -> None:
    """Wait until nobody else wants a core just now, at most so long: the kernel counts who is runnable."""
    end = time.monotonic() + limit_s
    while int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) > 1 and time.monotonic() < end:
        time.sleep(0.002)


def misses(rows: list[Row]) -> list[str]:
    """Where a peer's best is below ours, or a goal is not reached."""
    found = []
    for mine in (row for row in rows if row.variant == OURS):
        where = f"{mine.rule}, {mine.num_threads} threads"
        here = [row for row in rows if (row.rule, row.num_threads) == (mine.rule, mine.num_threads)]
        found += [
            f"{where}: {row.variant} {row.best_ns:.3f} ns, ours {mine.best_ns:.3f}"
            for row in here
            if row.best_ns < mine.best_ns and row.variant not in (STREAM, COPY)
        ]
        if mine.ratio_of_best > GOAL_RATIO:
            found.append(f"{where}: {mine.ratio_of_best:.2f} × DeepSpeed's on large pages, goal {GOAL_RATIO}")
        if mine.percent_of_stream < GOAL_PERCENT:
            found.append(f"{where}: {mine.percent_of_stream:.0f} % of the stream, goal {GOAL_PERCENT:.0f} %")
    return found


def page_of(record: dict[str, object], rows: list[Row], lost: list[str]) -> str:
    """The result as a page."""
    lines = ["Where a peer wins, or a goal is missed: " + ("none" if not lost else "")]
    lines += [f"- {line}" for line in lost]
    lines += ["", f"{record['machine']}", ""]
    lines += [
        "| rule | threads | variant | best ns/elem | median | GB/s | % of stream | × DeepSpeed, best | median ratio |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r.rule} | {r.num_threads} | {r.variant} | {r.best_ns:.3f} | {r.median_ns:.3f} | {r.gb_per_s:.1f} |"
        f" {r.percent_of_stream:.0f} | {r.ratio_of_best:.2f} | {r.median_ratio:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer-python", required=True, help="python of the environment that has DeepSpeed")
    p.add_argument("--elements", type=int, default=64 * 2**20)
    p.add_argument("--rounds", type=int, default=25)
    p.add_argument("--wait-s", type=float, default=1.0, help="before a step, wait at most so long for idle cores")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rules", nargs="+", default=list(BYTES_PER_ELEM), choices=list(BYTES_PER_ELEM))
    p.add_argument("--without-torch", dest="with_torch", action="store_false", help="leave out torch's own steps")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = p.parse_args()
    b = Buffers(options.elements)
    rows = []
    for num_threads in options.threads:
        for rule in options.rules:
            rows += measure(rule, num_threads, b, options)
            print(f"{rule}, {num_threads} threads: done", file=sys.stderr, flush=True)
    lost = misses(rows)
    record = {"machine": machine(CPU), "num_elems": options.elements, "misses": lost, "rows": [asdict(r) for r in rows]}
    page = page_of(record, rows, lost)
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(CPU)).split()).lower()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{date.today().isoformat()}_{name}_host-step"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
