"""Sum of squares: ours against torch's norms.

``python -m bench.kernels.bench_global_norm [--device cpu|cuda] [--threads N] [--elements N ...]``
Bytes: n · itemsize, as in the kernel's docstring.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import device_from, interleaved_ms, num_rotations, parser, report, rows_of, stream_gb_per_s
from tritonspeed.kernels import sum_of_squares
from tritonspeed.kernels.global_norm import sum_of_squares_reference

VARIANTS: dict[str, Callable[[Tensor], object]] = {
    "ours": sum_of_squares,
    "torch vector_norm": lambda x: torch.linalg.vector_norm(x, dtype=torch.float32),
    "torch foreach_norm": lambda x: torch._foreach_norm([x]),
    "reference (fp64)": lambda x: sum_of_squares_reference([x]),
}


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--elements", type=int, nargs="+", help="sizes; default 1 Mi, 32 Mi (CPU), and 1 Mi to 1 Gi (GPU)")
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    device = device_from(arguments)
    stream = stream_gb_per_s(device)
    is_gpu = device.type == "cuda"
    sizes = arguments.elements or [n * 2**20 for n in ((1, 16, 128, 1024) if is_gpu else (1, 32))] + [1_000_003]
    rows = []
    for n in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            set_bytes = n * dtype.itemsize
            sets = [torch.randn(n, device=device).to(dtype) for _ in range(num_rotations(set_bytes, device))]
            times = interleaved_ms(VARIANTS, sets, device, arguments.rounds)
            shape = f"n={n} {str(dtype).removeprefix('torch.')}"
            rows += rows_of(shape, times, {"ours"}, n, set_bytes, device, stream)
    what = "global_norm" if is_gpu else f"global_norm_{arguments.threads}-threads"
    report(what, rows, device, stream, arguments.out)


if __name__ == "__main__":
    main()
