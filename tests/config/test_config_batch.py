"""The batch triad: any two give the third, and what does not multiply out says all its numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritonspeed.config import load
from tritonspeed.config.batch import NAMES, Triad, implied_world_size, solve

small = st.integers(1, 64)


@given(micro=small, accumulation=small, world_size=small, hidden=st.sampled_from([None, 0, 1, 2]))
def test_any_two_give_the_third(micro, accumulation, world_size, hidden):
    full = [micro * accumulation * world_size, micro, accumulation]
    known = [None if index == hidden else value for index, value in enumerate(full)]
    assert solve(*known, world_size=world_size, default=False) == Triad(*full)


@given(train=st.integers(1, 4096), micro=small, accumulation=small, world_size=small)
def test_three_numbers_pass_only_if_they_multiply_out(train, micro, accumulation, world_size):
    product = micro * accumulation * world_size
    if train == product:
        assert solve(train, micro, accumulation, world_size, default=False).train == train
        assert implied_world_size(train, micro, accumulation) == world_size
        return
    with pytest.raises(ValueError) as caught:
        solve(train, micro, accumulation, world_size, default=False)
    relation = f"train_batch_size {train} ≠ micro batch {micro} × accumulation {accumulation} × world {world_size}"
    assert f"{relation} = {product}" in str(caught.value)
    assert f"set train_batch_size to {product}" in str(caught.value)


@given(train=st.integers(1, 4096), factor=small, world_size=small, by_micro=st.booleans())
def test_an_indivisible_batch_names_sizes_that_would_do(train, factor, world_size, by_micro):
    known = (train, factor, None) if by_micro else (train, None, factor)
    step = factor * world_size
    if train % step == 0:
        triad = solve(*known, world_size=world_size, default=False)
        assert triad.train == train == triad.micro * triad.accumulation * world_size
        return
    with pytest.raises(
        ValueError, match=f"{train} is not a multiple of .* {factor} × world {world_size} = {step}"
    ) as caught:
        solve(*known, world_size=world_size, default=False)
    offered = [int(word) for word in str(caught.value).partition("set it to ")[2].split(" or ")]
    for size in offered:
        assert solve(size, *known[1:], world_size, default=False).train == size


@pytest.mark.parametrize(
    ("given_sizes", "world_size", "expected"),
    [
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 4, None), 4, (16, 4, 1)),
        ((None, 4, 2), 3, (24, 4, 2)),
        (("auto", "auto", "auto"), 2, (2, 1, 1)),
        (("auto", "auto", 4), 2, (8, 1, 4)),
        (("auto", "auto", None), 2, (2, 1, 1)),
        ((None, "auto", None), 2, (2, 1, 1)),
        ((32, "auto", "auto"), 4, (32, 8, 1)),
        (("auto", 4, "auto"), 4, (16, 4, 1)),
        ((32, "auto", 2), 4, (32, 4, 2)),
    ],
)
def test_what_is_missing_or_auto(given_sizes, world_size, expected):
    tree = {name: value for name, value in zip(NAMES, given_sizes, strict=True) if value is not None}
    config = load(tree).resolve(world_size)
    assert tuple(getattr(config, name) for name in NAMES) == expected
    assert load({**tree, **dict(zip(NAMES, expected, strict=True))}).implied_world_size == world_size


@pytest.mark.parametrize("tree", [{}, {"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": "auto"}])
def test_accumulation_alone_is_an_error(tree):
    with pytest.raises(ValueError, match="set train_batch_size or train_micro_batch_size_per_gpu"):
        load(tree).resolve(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value} must be at least 1"):
        load({"train_batch_size": 8, name: value}).resolve(1)


def test_the_note_says_how_a_size_came_about():
    config = load({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}).resolve(2)
    assert config.note("gradient_accumulation_steps") == "32 = 4 × 4 × world 2"
    assert config.note("train_batch_size") == ""


def test_resolving_twice_changes_nothing():
    config = load({"train_batch_size": "auto", "zero_optimization": {"stage": 3}}).resolve(2)
    assert config.resolve(2) == config


def test_data_parallel_size_must_be_the_world_size():
    tree = {"train_batch_size": 8, "data_parallel_size": 4}
    assert load(tree).resolve(4).train_micro_batch_size_per_gpu == 2
    with pytest.raises(ValueError, match="data_parallel_size 4 ≠ world size 2"):
        load(tree).resolve(2)
