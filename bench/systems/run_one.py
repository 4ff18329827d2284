"""Train one system for a few steps and print, as one JSON line, what each step took.

    torchrun --nproc-per-node 2 -m bench.systems.run_one --system fsdp2 --stage 3 --shape communication-heavy --steps 20

Times are of whole steps (forward, backward, clip, update, gradients cleared), the slowest rank's. With --memory the
same steps run under the storage counter, which slows them: the times are then null and the bytes filled in. Losses
are the mean over ranks.
"""

import argparse
import gc
import json
import time
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from bench.systems.launch import MARK
from bench.systems.memory import StoragePeak, reset_resident_peak, resident_bytes
from bench.systems.model import SHAPES, SIZES, build_model, make_batch
from bench.systems.trainers import STAGES, TRAINERS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses a stage that the system does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", required=True, choices=sorted(TRAINERS))
    parser.add_argument("--stage", type=int, required=True, choices=range(4))
    parser.add_argument("--shape", default="communication-heavy", choices=sorted(SHAPES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--size", default="base", choices=sorted(SIZES))
    parser.add_argument("--variant", default="", help="settings other than the fastest; see trainers.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="steps trained and reported, but not timed")
    parser.add_argument(
        "--profile", action="store_true", help="print where rank 0's time goes, by operator, before the result"
    )
    parser.add_argument("--memory", action="store_true", help="count bytes instead of seconds")
    args = parser.parse_args(argv)
    if args.stage not in STAGES[args.system]:
        parser.error(f"{args.system} has no stage {args.stage}: it has {STAGES[args.system]}")
    return args


def across_ranks(values: list[float], op: Any) -> list[float]:
    """`values` [n] reduced over the ranks by `op`."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def train(args: argparse.Namespace, peak: StoragePeak | None) -> dict[str, Any]:
    """All steps; a dict of per-step lists and of bytes, equal on every rank."""
    rows, tokens = SHAPES[args.shape]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = SIZES[args.size]
    resident_before, _ = resident_bytes()
    model = build_model(size)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    extra = {"rows": rows} if args.system in ("deepspeed", "tritonspeed") else {}
    trainer = TRAINERS[args.system](model, args.stage, args.precision, args.variant, **extra)
    del model
    seconds, losses, norms = [], [], []
    first_step_at = 0.0  # seconds since 1970: the launcher knows when it began
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            gc.collect()
            reset_resident_peak()
            if peak is not None:
                peak.restart_peak()
        batch = make_batch(step, rank, rows, tokens, size.vocabulary)
        dist.barrier()
        start = time.perf_counter()
        loss, norm = trainer(batch)
        seconds.append(time.perf_counter() - start)
        first_step_at = first_step_at or time.time()
        losses.append(loss)
        norms.append(norm)
    _, resident_peak = resident_bytes()
    storage = [float(peak.peak_bytes), float(peak.live_bytes)] if peak is not None else [0.0, 0.0]
    storage_peak, storage_live = across_ranks(storage, dist.ReduceOp.MAX)
    return {
        "first_step_at": first_step_at,
        "num_parameters": num_parameters,
        "world_size": world_size,
        "step_s": None if peak is not None else across_ranks(seconds, dist.ReduceOp.MAX)[args.warmup :],
        "losses": [total / world_size for total in across_ranks(losses, dist.ReduceOp.SUM)],
        "grad_norms": across_ranks(norms, dist.ReduceOp.MAX),
        "resident_peak_bytes": int(across_ranks([resident_peak - resident_before], dist.ReduceOp.MAX)[0]),
        "storage_peak_bytes": int(storage_peak) if peak is not None else None,
        "storage_between_steps_bytes": int(storage_live) if peak is not None else None,
    }


def main() -> None:
    args = parse()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if args.memory:
        with StoragePeak() as peak:
            result = train(args, peak)
    elif args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = train(args, None)
        if dist.get_rank() == 0:
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    else:
        result = train(args, None)
    if dist.get_rank() == 0:
        package = args.system if args.system in ("deepspeed", "tritonspeed") else "torch"
        print(MARK + json.dumps({**vars(args), "version": version(package), **result}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
