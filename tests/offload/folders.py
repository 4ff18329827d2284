"""What the tests of the disk tier share."""

import torch

from tritonspeed.offload.disk_flat import DiskFlat
from tritonspeed.offload.memory import host_empty
from tritonspeed.offload.options import Requests

SMALL = Requests(block_bytes=8192, depth=3, threads=2)


def on_pages(values: torch.Tensor) -> torch.Tensor:
    """A copy that begins on a page."""
    return host_empty(values.numel(), values.dtype).copy_(values)


def noise(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that every dtype of the files holds exactly."""
    return torch.randint(0, 200, (numel,)).to(dtype)


def store(flat: DiskFlat, lo: int, values: torch.Tensor) -> None:
    """Store and wait."""
    flat.store(lo, on_pages(values)).wait()
