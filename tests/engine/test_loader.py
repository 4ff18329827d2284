"""The data loader goes on where a checkpoint found it: same samples, same order, same random numbers."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from engines import said
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tritonspeed.checkpoint.tree import decode, encode
from tritonspeed.engine.loader import TrainingLoader

NUM = 23  # a prime: nothing divides it


class Numbers(Dataset):
    """0 .. NUM - 1; ``loaded`` is what was asked for in this process."""

    def __init__(self, noisy=False):
        self.loaded, self.noisy = [], noisy

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        self.loaded.append(index)
        if self.noisy:
            return index, torch.rand(()).item(), np.random.rand(), random.random()
        return index


class Stream(IterableDataset):
    """0 .. NUM - 1, shuffled by torch's generator as an epoch starts; each worker has its own part."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in torch.randperm(NUM)[part::parts].tolist():
            self.read += 1
            yield i


def as_lists(batch):
    return [each.tolist() for each in batch] if isinstance(batch, list) else batch.tolist()


def step():
    """What training draws between two batches."""
    return torch.rand(()).item()


def train(loader, num_epochs, start=0, stop_after=None, saved=None):
    """Batches and draws per step. ``stop_after`` (epoch, batches) takes the state there, inside the loop."""
    facts = []
    for epoch in range(start, num_epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            facts.append((as_lists(batch), step()))
            if stop_after == (epoch, i + 1):
                saved.update(random=(torch.get_rng_state(), np.random.get_state(), random.getstate()))
                saved.update(loader=through_json(loader.state_dict()), num=len(facts))
    return facts


def through_json(state):
    content, tensors = encode(state, "data")
    return decode(json.loads(json.dumps(content)), tensors)


def restore(saved, loader):
    torch.set_rng_state(saved["random"][0])
    np.random.set_state(saved["random"][1])
    random.setstate(saved["random"][2])
    loader.load_state_dict(saved["loader"])


def seed():
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Numbers, Stream])
@pytest.mark.parametrize("stop_after", [(0, 1), (1, 3), (1, 6)])  # an epoch of 23 has 6 batches of 4
def test_a_run_goes_on_as_if_it_had_not_been_stopped(dataset, workers, stop_after):
    def make():
        return TrainingLoader(dataset(), 4, num_workers=workers)

    seed()
    saved = {}
    whole = train(make(), 3, stop_after=stop_after, saved=saved)
    loader = make()
    restore(saved, loader)
    rest = train(loader, 3, start=stop_after[0])
    assert rest == whole[saved["num"] :]
    assert len(whole) == 3 * 6


def test_what_a_dataset_draws_in_this_process_goes_on_too():
    seed()
    saved = {}
    whole = train(TrainingLoader(Numbers(noisy=True), 4), 2, stop_after=(0, 2), saved=saved)
    loader = TrainingLoader(Numbers(noisy=True), 4)
    seed()
    restore(saved, loader)
    assert train(loader, 2) == whole[2:]


def test_between_epochs_the_next_one_begins_and_draws():
    loader = TrainingLoader(Numbers(), 4)
    list(loader)
    state = through_json(loader.state_dict())
    assert state["samples"] == 0 and state["random"] is None
    again = TrainingLoader(Numbers(), 4)
    again.load_state_dict(state)
    torch.manual_seed(3)
    list(again)
    after = step()
    torch.manual_seed(3)
    list(DataLoader(Numbers(), 4))
    assert step() == after


def test_before_the_first_batch_but_after_iter_nothing_is_drawn_twice():
    seed()
    loader = TrainingLoader(Numbers(), 4)
    iterator = iter(loader)
    state, wanted = through_json(loader.state_dict()), torch.get_rng_state()
    first = next(iterator).tolist()
    again = TrainingLoader(Numbers(), 4)
    torch.set_rng_state(wanted)
    again.load_state_dict(state)
    assert next(iter(again)).tolist() == first
    assert torch.get_rng_state().equal(wanted)


def test_what_is_skipped_is_not_loaded():
    loader = TrainingLoader(Numbers(), 4)
    iterator = iter(loader)
    next(iterator), next(iterator), next(iterator)
    state = loader.state_dict()
    assert state["samples"] == 12
    again = TrainingLoader(Numbers(), 4)
    again.load_state_dict(state)
    assert again.state_dict() == state  # a checkpoint may be made again before the next batch
    num_read = len(list(again))
    assert num_read == 3 and len(again) == 6 and len(again.dataset.loaded) == NUM - 12


def global_order(epoch, world=1, drop_last=False):
    loaders = [TrainingLoader(Numbers(), 1, world, rank, drop_last) for rank in range(world)]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    return [x.item() for row in zip(*loaders, strict=True) for x in row]


def continue_at(world, micro_batch, state, epoch, drop_last=False):
    """The samples that all ranks together go on with, in order."""
    ranks = []
    for rank in range(world):
        loader = TrainingLoader(Numbers(), micro_batch, world, rank, drop_last)
        loader.load_state_dict(state)
        loader.sampler.set_epoch(epoch)
        ranks.append([x for batch in loader for x in batch.tolist()])
    return [x for row in zip(*ranks, strict=True) for x in row]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (1, 3), (2, 2), (4, 3), (8, 1)])
def test_another_world_goes_on_at_the_same_sample(world, micro_batch):
    loader = TrainingLoader(Numbers(), 2, world=2, rank=1)
    loader.sampler.set_epoch(5)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    assert (state["samples"], state["epoch"]) == (8, 5)
    with said(logging.WARNING) as lines:
        rest = continue_at(world, micro_batch, state, epoch=5)
    assert rest == global_order(5, world)[8:] and not lines


def test_where_the_new_world_cannot_it_goes_on_a_little_later_and_says_so():
    loader = TrainingLoader(Numbers(), 5, world=2)
    next(iter(loader))
    with said(logging.WARNING) as lines:
        rest = continue_at(4, 2, loader.state_dict(), epoch=0)
    assert rest == global_order(0, 4)[12:]
    assert lines == ["10 samples had been handed out, which world size 4 cannot continue at: it goes on at sample 12"]


def test_an_iterable_goes_on_with_a_whole_batch():
    loader = TrainingLoader(Stream(), 4)
    next(iter(loader))
    state = loader.state_dict()
    wanted = list(TrainingLoader(Stream(), 3))
    again = TrainingLoader(Stream(), 3)
    with said(logging.WARNING) as lines:
        again.load_state_dict(state)
    assert len(list(again)) == len(wanted) - 2
    assert lines == [
        "4 samples had been handed out, which world size 1 with micro batches of 3 cannot continue at: it goes on"
        " at sample 6"
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_at_the_end_of_an_epoch_no_sample_comes_twice(world, drop_last):
    loader = TrainingLoader(Numbers(), 4, world=2, drop_last=drop_last)
    iterator = iter(loader)
    num = sum(len(next(iterator)) * 2 for _ in range(len(loader)))
    with said(logging.WARNING) as lines:
        rest = continue_at(world, 4, loader.state_dict(), epoch=0, drop_last=drop_last)
    assert drop_last or not lines
    if drop_last:  # what two ranks had to leave out, others need not
        assert not set(rest) & set(global_order(0, 2)[:num])
    else:
        assert not rest


def test_another_epoch_begins_at_its_beginning():
    loader = TrainingLoader(Numbers(), 4)
    next(iter(loader))
    assert continue_at(1, 4, loader.state_dict(), epoch=1) == global_order(1)


def test_the_epoch_comes_back_where_nobody_sets_it():
    loader = TrainingLoader(Numbers(), 4)
    loader.sampler.set_epoch(3)
    next(iter(loader))
    again = TrainingLoader(Numbers(), 4)
    again.load_state_dict(loader.state_dict())
    assert again.sampler.epoch == 3
    assert [x for batch in again for x in batch.tolist()] == global_order(3)[4:]
    assert [x for batch in again for x in batch.tolist()] == global_order(3)  # the next epoch is whole


def test_an_epoch_left_early_starts_anew_and_the_last_iterator_counts():
    loader = TrainingLoader(Numbers(), 4)
    first = iter(loader)
    next(first), next(first)
    second = iter(loader)
    assert loader.state_dict()["samples"] == 0
    next(second), next(first)
    assert loader.state_dict()["samples"] == 4 and len(second) == 6


def test_it_is_torch_s_loader_with_its_attributes():
    loader = TrainingLoader(Numbers(), 4, world=2, rank=1, collate_fn=list)
    assert isinstance(loader, DataLoader) and isinstance(loader.sampler, torch.utils.data.DistributedSampler)
    assert (loader.batch_size, len(loader), len(loader.sampler), loader.drop_last) == (4, 3, 12, False)
    assert isinstance(next(iter(loader)), list) and isinstance(loader.dataset, Numbers)


def test_a_dataset_of_another_size_is_said():
    state = {**TrainingLoader(Numbers(), 4).state_dict(), "dataset": 100}
    with said(logging.WARNING) as lines:
        TrainingLoader(Numbers(), 4).load_state_dict(state)
    assert "a dataset of 100 samples, and this one has 23" in lines[0]


@pytest.mark.parametrize(
    "state",
    [{}, {"epoch": 1}, {"epoch": 0, "samples": -1}, {"epoch": 0, "samples": 1.5}, {"epoch": True, "samples": 1},
     {"epoch": 0, "samples": 1, "random": 3}],
)  # fmt: skip
def test_what_is_no_position_is_refused(state):
    with pytest.raises(ValueError, match="not the position of a data loader"):
        TrainingLoader(Numbers(), 4).load_state_dict(state)
