"""Through a checkpoint the data goes on at its sample: the same bits on as many ranks, the same order on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import settings
from torch import Tensor, nn

import tritonspeed as ts

NUM = 26


class Samples(torch.utils.data.Dataset):
    """Sample i is i, with noise that is drawn as it is read."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(4) + index / NUM, index


def build(stage: int) -> ts.Engine:
    torch.manual_seed(0)
    return ts.initialize(model=nn.Linear(4, 4), config=settings(stage, accumulation=2), training_data=Samples())[0]


def train(engine: ts.Engine, epochs: range, save_at: int = -1, folder: str = "") -> list[tuple[list[int], float]]:
    """(samples, loss) of every micro-step; saves after micro-step ``save_at``."""
    found = []
    for epoch in epochs:
        engine.training_dataloader.sampler.set_epoch(epoch)
        for x, index in engine.training_dataloader:
            loss = (engine(x) * torch.rand(())).square().mean()
            engine.backward(loss)
            engine.step()
            found.append((index.tolist(), loss.item()))
            if engine.micro_steps == save_at:
                engine.save_checkpoint(folder, client_state={"epoch": epoch})
    return found


def first_run(folder: str, stage: int, save_at: int) -> list[tuple[list[int], float]]:
    torch.manual_seed(1)
    engine = build(stage)
    torch.manual_seed(10 + dist.get_rank())
    found = train(engine, range(2), save_at, folder)
    engine.destroy()
    return found


def second_run(folder: str, stage: int) -> list[tuple[list[int], float]]:
    engine = build(stage)
    _, client = engine.load_checkpoint(folder, load_module_strict=False)
    epoch = client["epoch"] if client else 0
    found = train(engine, range(epoch, 2))
    engine.destroy()
    return found


@pytest.mark.parametrize("save_at", [3, 7, 10])  # in the first epoch, at its end, in the second
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_with_the_same_bits(ranks, tmp_path, stage, save_at):
    whole = ranks(2, first_run, str(tmp_path), stage, save_at)
    rest = ranks(2, second_run, str(tmp_path), stage)
    assert [len(each) for each in whole] == [14, 14]
    assert rest == [each[save_at:] for each in whole]


def in_order(runs: list[list[tuple[list[int], float]]]) -> list[Any]:
    """The samples of all ranks as the epoch orders them."""
    rows = [[i for samples, _ in run for i in samples] for run in runs]
    return [i for row in zip(*rows, strict=True) for i in row]


@pytest.mark.parametrize("world", [1, 3])
def test_on_other_ranks_it_goes_on_at_the_same_sample(ranks, tmp_path, world):
    whole = in_order(ranks(2, first_run, str(tmp_path), 2, 3))
    rest = in_order(ranks(world, second_run, str(tmp_path), 2))
    first = NUM - 12  # of the first epoch; three ranks fill their last row with samples from its beginning
    assert rest[:first] == whole[12:NUM]
    assert len(rest) == {1: first + NUM, 3: first + 1 + NUM + 1}[world]
