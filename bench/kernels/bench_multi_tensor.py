"""What a step of AdamW over many small tensors costs the host, part by part.

``python -m bench.kernels.bench_multi_tensor [--device cpu|cuda] [--tensors N] [--rounds R]``

On a CPU the launch is recorded instead of carried out: everything up to it is timed, the launch itself is not. On a GPU
it is the real thing, timed by the host's clock with an empty queue in front, beside torch's fused and foreach steps.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from operator import attrgetter
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness import device_from, device_name, machine, parser
from tritonspeed.kernels._triton import recording
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.multi_tensor import addresses_of
from tritonspeed.optim import AdamW


@dataclass(frozen=True)
class Part:
    """Host microseconds of one call."""

    what: str
    median_us: float
    best_us: float


def time_us(what: str, call: Callable[[], object], before: Callable[[], object] | None, rounds: int) -> Part:
    """``before`` runs each time, untimed; a GPU's queue is empty then."""
    times = []
    for r in range(-3, rounds):
        if before is not None:
            before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if r >= 0:
            times.append(1e6 * (time.perf_counter() - start))
    return Part(what, statistics.median(times), min(times))


def parameters(num: int, device: torch.device) -> list[nn.Parameter]:
    """Mixed sizes, small on a CPU, where only their number matters."""
    largest = 2**20 if device.type == "cuda" else 2**8
    return [nn.Parameter(torch.ones(1 + (i * 7919) % largest, device=device)) for i in range(num)]


def backward(params: list[nn.Parameter]) -> None:
    """Gradients that autograd makes anew."""
    for p in params:
        p.grad = None
    torch.autograd.backward([p.sum() for p in params])


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tensors", type=int, default=1000)
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds, num = device_from(arguments), 10 * arguments.rounds, arguments.tensors
    is_gpu = device.type == "cuda"
    params = parameters(num, device)
    backward(params)
    plain = AdamW(params)
    own_params = parameters(num, device)
    backward(own_params)
    own = AdamW(own_params, owns_gradients=True)
    stubs = (nullcontext(), nullcontext()) if is_gpu else (
        recording(CARDS["sm_90"]), patch("tritonspeed.optim.adamw.takes_reference", lambda tensor: False)
    )  # fmt: skip
    with stubs[0], stubs[1]:
        plain.step()
        own.step()
        parts = [
            time_us("step, own gradients", own.step, None, rounds),
            time_us("step, gradients that stay", plain.step, None, rounds),
            time_us("step, gradients made anew by backward", plain.step, lambda: backward(params), rounds // 10),
        ]
        plan = plain._plan
        assert plan is not None, "a step makes its plan"
        kernel = plan.tables[0].kernel
        grads = [p.grad for p in params if p.grad is not None]
        parts += [
            time_us("part: read .grad", lambda: list(map(attrgetter("grad"), params)), None, rounds),
            time_us("part: are they contiguous", lambda: all(map(Tensor.is_contiguous, grads)), None, rounds),
            time_us("part: the gradients' addresses", lambda: addresses_of(grads), None, rounds),
            time_us("part: the parameters' addresses", lambda: addresses_of(params), None, rounds),
            time_us(
                "part: tell autograd of the writes",
                lambda: torch.autograd.graph.increment_version(params),
                None,
                rounds,
            ),
            time_us("part: upload of scalars", kernel.upload_, None, rounds),
            time_us("part: launch" if is_gpu else "part: launch, recorded", kernel.update_, None, rounds),
        ]
    for name in ("fused", "foreach") if is_gpu else ():
        torchs = torch.optim.AdamW(params, fused=name == "fused", foreach=name == "foreach")
        parts.append(time_us(f"peer: torch {name}", torchs.step, None, rounds))
    table = Table("what", "median µs", "best µs")
    for part in parts:
        table.add_row(part.what, f"{part.median_us:.1f}", f"{part.best_us:.1f}")
    Console(width=120).print(table)
    name = "-".join("".join(c if c.isalnum() else " " for c in device_name(device)).split()).lower()
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(device), "num_tensors": num, "parts": [asdict(part) for part in parts]}
    path = arguments.out / f"{date.today().isoformat()}_{name}_multi-tensor-host.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
