"""AdamW with a bf16 gradient in and a bf16 copy out: ours against what torch offers for the same work.

``python -m bench.kernels.bench_adamw [--device cpu|cuda] [--threads N] [--elements N ...]``
Bytes: n · (24 + 2 + 2), as in the kernel's docstring; each variant is charged these, whatever it moves.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import device_from, interleaved_ms, num_rotations, parser, report, rows_of, stream_gb_per_s
from tritonspeed.kernels import adamw_
from tritonspeed.kernels.adamw import ADAMW, adamw_reference
from tritonspeed.kernels.flat_update import FlatLaunch

BYTES_PER_ELEM = 28
HYPER = {"step": 7, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
TORCH = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}


@dataclass
class State:
    """One set of buffers: what a step reads and writes."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    param_out: Tensor
    grad_scale: Tensor
    step: Tensor

    @classmethod
    def random(cls, n: int, device: torch.device) -> "State":
        def new(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.rand(n, device=device).to(dtype)

        scale, step = torch.tensor(0.5, device=device), torch.tensor(7.0, device=device)
        return cls(new(), new(), new(), new(torch.bfloat16), new(torch.bfloat16), scale, step)


def ours(s: State, seed: int | None = None) -> None:
    adamw_(
        s.master, s.exp_avg, s.exp_avg_sq, s.grad, grad_scale=s.grad_scale, param_out=s.param_out,
        stochastic_rounding_seed=seed, **HYPER,
    )  # fmt: skip


def pinned(launch: FlatLaunch) -> Callable[[State], None]:
    def run(s: State) -> None:
        with ADAMW.pinned(launch):
            ours(s)

    return run


def reference(s: State) -> None:
    adamw_reference(s.master, s.exp_avg, s.exp_avg_sq, s.grad, grad_scale=s.grad_scale, param_out=s.param_out, **HYPER)


def torch_fused(s: State) -> None:
    g = s.grad.float().mul_(s.grad_scale)
    torch._fused_adamw_([s.master], [g], [s.exp_avg], [s.exp_avg_sq], [], [s.step], **TORCH)
    s.param_out.copy_(s.master)


def torch_fused_fp32_gradient(s: State) -> None:
    """Not the same work: the gradient comes in fp32 and unscaled, no copy goes out. The floor of torch's own loop."""
    torch._fused_adamw_([s.master], [s.exp_avg], [s.exp_avg], [s.exp_avg_sq], [], [s.step], **TORCH)


def torch_foreach(s: State) -> None:
    g = s.grad.float().mul_(s.grad_scale)
    torch._foreach_lerp_([s.exp_avg], [g], 0.1)
    torch._foreach_mul_([s.exp_avg_sq], 0.95)
    torch._foreach_addcmul_([s.exp_avg_sq], [g], [g], 0.05)
    denominator = torch._foreach_sqrt([s.exp_avg_sq])
    torch._foreach_div_(denominator, 0.5)
    torch._foreach_add_(denominator, 1e-8)
    torch._foreach_mul_([s.master], 1 - 1e-4)
    torch._foreach_addcdiv_([s.master], [s.exp_avg], denominator, -2e-3)
    s.param_out.copy_(s.master)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--elements", type=int, nargs="+", help="sizes; default 1 Mi, 32 Mi (CPU), and 1 Mi to 512 Mi (GPU)")
    p.add_argument("--sweep", action="store_true", help="also time other launch configurations (GPU)")
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    device = device_from(arguments)
    stream = stream_gb_per_s(device)
    is_gpu = device.type == "cuda"
    sizes = arguments.elements or [n * 2**20 for n in ((1, 16, 128, 512) if is_gpu else (1, 32))] + [1_000_003]
    variants: dict[str, Callable[[State], object]] = {
        "ours": ours,
        "ours, stochastic": lambda s: ours(s, seed=7),
        "torch fused, whole": torch_fused,
        "torch fused, fp32 gradient, no copy": torch_fused_fp32_gradient,
        "torch foreach": torch_foreach,
        "reference": reference,
    }
    if is_gpu or shutil.which("g++"):  # Inductor's CPU code wants a C++ compiler
        variants["torch.compile, one pass"] = torch.compile(reference, dynamic=False)
    if is_gpu and arguments.sweep:
        for block, num_warps in ((512, 4), (1024, 4), (2048, 8), (2048, 16), (4096, 8)):
            variants[f"ours, block {block}, {num_warps} warps"] = pinned(FlatLaunch(block, num_warps))
    rows = []
    for n in sizes:
        sets = [State.random(n, device) for _ in range(num_rotations(n * BYTES_PER_ELEM, device))]
        times = interleaved_ms(variants, sets, device, arguments.rounds)
        mine = {name for name in variants if name.startswith("ours")}
        rows += rows_of(f"n={n}", times, mine, n, n * BYTES_PER_ELEM, device, stream)
    report(f"adamw_{arguments.threads}-threads" if not is_gpu else "adamw", rows, device, stream, arguments.out)


if __name__ == "__main__":
    main()
