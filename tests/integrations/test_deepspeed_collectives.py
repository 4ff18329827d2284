"""deepspeed.comm's collectives are torch's, with DeepSpeed's arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tritonspeed.integrations import collectives


def on_two_ranks() -> None:
    rank = dist.get_rank()
    mine = torch.full((2,), float(rank + 1))
    total = mine.clone()
    assert collectives.all_reduce(total, prof=True, log_name="sum", debug="here") is None
    assert total.tolist() == [3, 3]
    whole = torch.empty(4)
    collectives.all_gather_into_tensor(output_tensor=whole, tensor=mine)
    assert whole.tolist() == [1, 1, 2, 2]
    handle = collectives.broadcast(mine, src=1, async_op=True, log_name="from the last")
    handle.wait()
    assert mine.tolist() == [2, 2]
    found: list[Any] = [None, None]
    collectives.all_gather_object(found, rank, debug="x")
    assert found == [0, 1]
    collectives.barrier(prof=False)
    with pytest.raises(TypeError, match="unknown"):
        collectives.all_reduce(total, unknown=1)


def test_on_two_ranks(ranks: Any) -> None:
    ranks(2, on_two_ranks)


def test_they_are_torchs() -> None:
    assert collectives.all_to_all_single.__wrapped__ is dist.all_to_all_single
    assert collectives.scatter is collectives.scatter
    with pytest.raises(AttributeError):
        collectives.no_such_thing  # noqa: B018
