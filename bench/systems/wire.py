"""What two ranks on one host pay to move a bucket: gloo's collectives, gloo point to point, shared memory.

    torchrun --nproc-per-node 2 -m bench.systems.wire --mib 58 --dtype bfloat16

B is the whole bucket's bytes and W the world size. All-gather: every rank receives B·(W−1)/W and ends with the whole
bucket in a private buffer. Reduce-scatter: the same bytes the other way, ending with the fp32 sum of its slice. The
shared-memory lanes map one file per rank in /dev/shm; a rank copies (or adds) straight out of the others' mappings,
between two signals: "mine is ready" before, "I have read yours" after. Rounds are interleaved; the time of a round is
the slowest rank's.
"""

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SUM_TILE_ELEMS = 1 << 16  # 256 KiB of fp32: the accumulator stays in the second-level cache between copy_ and add_


class SharedBucket:
    """One rank's bucket in /dev/shm, mapped by every rank of the host.

    Args:
        name: file name, equal on every rank up to the rank.
        num_elems, dtype: size and type of the bucket.
    """

    def __init__(self, name: str, num_elems: int, dtype: torch.dtype) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        paths = [Path("/dev/shm") / f"{name}_{rank}" for rank in range(self.world_size)]
        num_bytes = num_elems * dtype.itemsize
        with paths[self.rank].open("wb") as file:
            file.truncate(num_bytes)
        dist.barrier()
        self.maps = []
        self.of_rank = []
        for path in paths:
            with path.open("r+b") as file:
                self.maps.append(mmap.mmap(file.fileno(), num_bytes))
            self.of_rank.append(torch.frombuffer(self.maps[-1], dtype=dtype))
        dist.barrier()
        paths[self.rank].unlink()

    @property
    def own(self) -> torch.Tensor:
        """This rank's bucket, [num_elems]."""
        return self.of_rank[self.rank]


class SpinSignal:
    """A barrier on counters in shared memory: each rank raises its own and polls the others', yielding its core."""

    def __init__(self, name: str) -> None:
        self.counters = SharedBucket(name, 64, torch.int64)
        self.views = [memoryview(m).cast("q") for m in self.counters.maps]
        self.round = 0

    def __call__(self) -> None:
        self.round += 1
        self.views[self.counters.rank][0] = self.round
        for view in self.views:
            while view[0] < self.round:
                os.sched_yield()


def token() -> None:
    """A barrier by one 8-byte gloo message to, and from, every other rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent = torch.zeros(1, dtype=torch.int64)
    received = torch.zeros(world_size, dtype=torch.int64)
    others = [peer for peer in range(world_size) if peer != rank]
    works = [dist.irecv(received[peer : peer + 1], peer) for peer in others]
    works += [dist.isend(sent, peer) for peer in others]
    for work in works:
        assert work is not None, "every rank is in the default group"
        work.wait()


def sum_into_(out: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """out [n] fp32 = Σ parts [n] of any float dtype, in the order given, tile by tile."""
    for start in range(0, out.numel(), SUM_TILE_ELEMS):
        tile = out[start : start + SUM_TILE_ELEMS]
        tile.copy_(parts[0][start : start + SUM_TILE_ELEMS])
        for part in parts[1:]:
            tile.add_(part[start : start + SUM_TILE_ELEMS])


def lanes(num_elems: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> one round of the exchange, on buffers allocated once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard_elems = num_elems // world_size
    others = [peer for peer in range(world_size) if peer != rank]
    bucket = torch.randn(num_elems).to(dtype)
    gathered = torch.zeros(num_elems, dtype=dtype)
    received = torch.zeros(num_elems, dtype=dtype)
    total = torch.zeros(shard_elems)
    low_total = torch.zeros(shard_elems, dtype=dtype)
    prefix = f"tritonspeed_wire_{os.environ['MASTER_PORT']}"
    shared = SharedBucket(prefix, num_elems, dtype)
    shared.own.copy_(bucket)
    spin = SpinSignal(f"{prefix}_signal")

    def part(tensor: torch.Tensor, index: int) -> torch.Tensor:
        return tensor[index * shard_elems : (index + 1) * shard_elems]

    def exchange(sent: Callable[[int], torch.Tensor], into: torch.Tensor) -> None:
        ops = [dist.P2POp(dist.irecv, part(into, peer), peer) for peer in others]
        ops += [dist.P2POp(dist.isend, sent(peer), peer) for peer in others]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def gather_p2p() -> None:
        exchange(lambda _: part(bucket, rank), gathered)
        part(gathered, rank).copy_(part(bucket, rank))

    def gather_shared(signal: Callable[[], None]) -> None:
        signal()
        for peer in range(world_size):
            part(gathered, peer).copy_(part(shared.of_rank[peer], peer))
        signal()

    def scatter_p2p() -> None:
        exchange(lambda peer: part(bucket, peer), received)
        sum_into_(total, [part(bucket if peer == rank else received, peer) for peer in range(world_size)])

    def scatter_all_to_all() -> None:
        dist.all_to_all_single(received, bucket)
        sum_into_(total, [part(received, peer) for peer in range(world_size)])

    def scatter_shared(signal: Callable[[], None]) -> None:
        signal()
        sum_into_(total, [part(bucket_of, rank) for bucket_of in shared.of_rank])
        signal()

    return {
        "all_gather gloo collective": lambda: dist.all_gather_single(gathered, part(bucket, rank)),
        "all_gather gloo p2p": gather_p2p,
        "all_gather shared memory, gloo token": lambda: gather_shared(token),
        "all_gather shared memory, spin": lambda: gather_shared(spin),
        "reduce_scatter gloo collective": lambda: dist.reduce_scatter_single(low_total, bucket),
        "reduce_scatter gloo all_to_all + fp32 sum": scatter_all_to_all,
        "reduce_scatter gloo p2p + fp32 sum": scatter_p2p,
        "reduce_scatter shared memory, gloo token": lambda: scatter_shared(token),
        "reduce_scatter shared memory, spin": lambda: scatter_shared(spin),
        "signal: gloo barrier": dist.barrier,
        "signal: gloo token": token,
        "signal: spin": spin,
        "fp32 sum alone": lambda: sum_into_(total, [part(bucket, peer) for peer in range(world_size)]),
        "private copy of the received bytes": lambda: gathered[shard_elems:].copy_(bucket[shard_elems:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=58.0, help="the whole bucket's size")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    page_elems = 4096 * dist.get_world_size()
    num_elems = int(args.mib * 2**20) // dtype.itemsize // page_elems * page_elems
    times_ms: dict[str, list[float]] = {}
    exchanges = lanes(num_elems, dtype)
    for round_index in range(args.rounds + 2):
        for name, exchange in exchanges.items():
            dist.barrier()
            start = time.perf_counter()
            exchange()
            slowest = torch.tensor((time.perf_counter() - start) * 1e3, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if round_index >= 2:  # the first touches pages and opens connections
                times_ms.setdefault(name, []).append(slowest.item())
    if dist.get_rank() == 0:
        rows = {n: {"best_ms": min(t), "median_ms": statistics.median(t)} for n, t in times_ms.items()}
        print(
            json.dumps(
                {"mib": args.mib, "dtype": args.dtype, "world_size": dist.get_world_size(), "lanes": rows}, indent=1
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
