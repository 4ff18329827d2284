"""How a kernel is timed: by whom the tuner chooses and the benches report, so that both mean the same.

All variants are handed over at once and timed in turns: a neighbour's load or a clock change hits each of them alike.
On a GPU each call meets buffers that have left the cache, because they are taken in rotation from more of them than
the cache holds, and a spin kernel in front lets the host run ahead, so that launches are not counted.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Buffers = TypeVar("Buffers")

CACHES_TO_FLUSH = 3  # rotate through this many times the last-level cache
SPIN_CYCLES = 1_000_000  # about half a millisecond: longer than any launch sequence here
NUM_WARM_UP_ROUNDS = 2  # the first compiles or loads the code, the second meets it in the instruction cache
WARM_UP_S = 0.2  # until the clocks stand: without it the variant that is timed first looks slow


@dataclass(frozen=True)
class Peak:
    """A data sheet's figures, dense, without sparsity."""

    memory_gb_per_s: float
    bf16_tflop_per_s: float


PEAKS = {  # the name as the driver gives it → data sheet
    "NVIDIA A100-SXM4-40GB": Peak(1555, 312),
    "NVIDIA A100-SXM4-80GB": Peak(2039, 312),
    "NVIDIA H100 80GB HBM3": Peak(3350, 989),
    "NVIDIA H100 PCIe": Peak(2039, 756),
    "NVIDIA H200": Peak(4800, 989),
    "NVIDIA L40S": Peak(864, 362),
    "NVIDIA GeForce RTX 4090": Peak(1008, 165),
    "NVIDIA B200": Peak(8000, 2250),
    "AMD Instinct MI300X": Peak(5300, 1307),
    "Tesla V100-SXM3-32GB": Peak(900, 125),  # fp16: it has no bf16
}


def device_name(device: torch.device) -> str:
    """The card's or the processor's marketing name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def num_rotations(set_bytes: int, device: torch.device) -> int:
    """How many sets of buffers it takes until the first has left the cache; 1 on a CPU: choose shapes above it."""
    if device.type != "cuda":
        return 1
    return 1 + -(-CACHES_TO_FLUSH * torch.cuda.get_device_properties(device).L2_cache_size // set_bytes)


def warm_up(device: torch.device, seconds: float = WARM_UP_S) -> None:
    """Keep a GPU busy until its clocks stand; nothing on a CPU."""
    if device.type != "cuda":
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.cuda._sleep(SPIN_CYCLES)
        torch.cuda.synchronize(device)


def time_call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: events on a GPU, the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def interleaved_ms(
    variants: Mapping[str, Callable[[Buffers], object]], sets: Sequence[Buffers], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Every variant once a round, each round starting with another one, after two rounds that warm up and are dropped.

    Args:
        variants: name → what to time; it gets one of ``sets``.
        sets: buffers in rotation, ``num_rotations`` of them.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = 0
    for r in range(-NUM_WARM_UP_ROUNDS, rounds):
        for k in range(len(names)):
            name = names[(r + k) % len(names)]
            buffers = sets[calls % len(sets)]
            calls += 1
            elapsed = time_call_ms(lambda name=name, buffers=buffers: variants[name](buffers), device)
            if r >= 0:
                times[name].append(elapsed)
    return times


def stream_gb_per_s(device: torch.device, rounds: int = 7) -> float:
    """The measured roof: read and write one big buffer in place, as an optimizer does."""
    x = torch.zeros(64 * 2**20 if device.type == "cpu" else 256 * 2**20, device=device)
    best = min(time_call_ms(lambda: x.add_(1.0), device) for _ in range(rounds))
    return 2 * x.numel() * x.element_size() / best / 1e6
