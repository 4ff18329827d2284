"""The batch triad: train_batch_size = micro batch × accumulation × world. Two of the three give the third."""

from dataclasses import dataclass

NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Triad:
    """Samples per step over all ranks, samples per forward on one rank, forwards per step."""

    train: int
    micro: int
    accumulation: int


def solve(train: int | None, micro: int | None, accumulation: int | None, world_size: int, *, default: bool) -> Triad:
    """The triad from what is known of it (None is unknown).

    As in DeepSpeed a single size is enough, with an accumulation of 1; accumulation alone is not. `default` says
    that a missing size was "auto", and makes it a micro batch of 1. ValueError: too little is known, or the
    numbers do not multiply out; it names all of them and what to set instead.
    """
    for name, value in zip(NAMES, (train, micro, accumulation), strict=True):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if train is None and micro is None:
        if not default:
            known = (
                "" if accumulation is None else f" (gradient_accumulation_steps = {accumulation} alone says nothing)"
            )
            raise ValueError(f"set train_batch_size or train_micro_batch_size_per_gpu{known}")
        micro = 1
    if train is None:
        assert micro is not None, "one of the two sizes is known by now"
        accumulation = 1 if accumulation is None else accumulation
        return Triad(micro * accumulation * world_size, micro, accumulation)
    if micro is None:
        accumulation = 1 if accumulation is None else accumulation
        micro = _divide(train, accumulation, world_size, "gradient_accumulation_steps")
        return Triad(train, micro, accumulation)
    if accumulation is None:
        return Triad(train, micro, _divide(train, micro, world_size, "train_micro_batch_size_per_gpu"))
    product = micro * accumulation * world_size
    if train != product:
        raise ValueError(
            f"train_batch_size {train} ≠ micro batch {micro} × accumulation {accumulation} × world {world_size} = "
            f"{product}: drop one of the three, or set train_batch_size to {product}"
        )
    return Triad(train, micro, accumulation)


def _divide(train: int, factor: int, world_size: int, name: str) -> int:
    step = factor * world_size
    if train % step:
        near = sorted({max(1, train // step) * step, (train // step + 1) * step})
        raise ValueError(
            f"train_batch_size {train} is not a multiple of {name} {factor} × world {world_size} = {step}: "
            f"set it to {' or '.join(map(str, near))}"
        )
    return train // step


def implied_world_size(train: object, micro: object, accumulation: object) -> int | None:
    """The world size that three given numbers imply; None if one of them is open or they do not divide."""
    if not (isinstance(train, int) and isinstance(micro, int) and isinstance(accumulation, int)):
        return None
    step = micro * accumulation
    return train // step if step > 0 and train > 0 and train % step == 0 else None
