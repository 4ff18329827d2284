"""DeepSpeed's whole host step, one at a time on request: `bench_host_step` starts this under the peers' interpreter.

Reads lines "RULE PAGES" (adamw, lion or adagrad; small or large), carries out one step of ``num_elems`` elements and
answers "STEP milliseconds seconds_of_cpu". A step is what ZeRO-Offload does on the host: the fp32 gradients times the
clip coefficient, DeepSpeed's C++ optimizer, the copy to bf16.
"""

import mmap
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

MARK = "STEP "


def empty(num_elems: int, dtype: torch.dtype, pages: str) -> Tensor:
    """Ordinary memory, or on large pages."""
    if pages == "small":
        return torch.empty(num_elems, dtype=dtype)
    memory = mmap.mmap(-1, num_elems * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def step_of(rule: str, pages: str, num_elems: int) -> Callable[[], object]:
    """DeepSpeed's step on buffers of its own."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.lion import DeepSpeedCPULion

    master = torch.nn.Parameter(empty(num_elems, torch.float32, pages).uniform_())
    grad = empty(num_elems, torch.float32, pages).uniform_()
    master.grad = grad
    copy = empty(num_elems, torch.bfloat16, pages).zero_()
    if rule == "adamw":
        settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        optimizer = DeepSpeedCPUAdam([master], adamw_mode=True, **settings)
        states = {name: empty(num_elems, torch.float32, pages).zero_() for name in ("exp_avg", "exp_avg_sq")}
    elif rule == "lion":
        optimizer = DeepSpeedCPULion([master], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        states = {"exp_avg": empty(num_elems, torch.float32, pages).zero_()}
    else:
        optimizer = DeepSpeedCPUAdagrad([master], lr=1e-3, eps=1e-10, weight_decay=0.1)
        states = {"exp_avg_sq": empty(num_elems, torch.float32, pages).zero_()}
    optimizer.state[master].update({"step": 0, **states})

    def step() -> None:
        grad.mul_(0.999)
        optimizer.step()
        copy.copy_(master.data)

    return step


def main() -> None:
    num_elems, threads = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for line in sys.stdin:
        rule, pages = line.split()
        if (rule, pages) not in steps:
            steps.clear()  # memory: one set of buffers at a time is enough for a rule
            steps[rule, pages] = step_of(rule, pages, num_elems)
        busy, start = time.process_time(), time.perf_counter()
        steps[rule, pages]()
        print(f"{MARK}{1e3 * (time.perf_counter() - start)} {time.process_time() - busy}", flush=True)


if __name__ == "__main__":
    main()
