"""What each ZeRO stage shards, as data. Nobody else asks for a stage's number.

Bytes per trainable parameter and rank, 16-bit compute, fp32 masters and AdamW, N ranks, when gradients are there:

    stage   parameters   gradients   masters + moments
      0         2            4             12              everything everywhere
      1         2           4/N           12/N
      2         2           4/N           12/N             and no full gradient between micro-steps
      3         0           4/N           12/N             parameters live for the time of their use

Source   Rajbhandari et al. 2020, arXiv:1910.02054
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: which of the three kinds of training state are split over the ranks."""

    number: int
    shards_optimizer: bool
    shards_gradients: bool
    shards_parameters: bool


STAGES = {
    0: Stage(0, shards_optimizer=False, shards_gradients=False, shards_parameters=False),
    1: Stage(1, shards_optimizer=True, shards_gradients=False, shards_parameters=False),
    2: Stage(2, shards_optimizer=True, shards_gradients=True, shards_parameters=False),
    3: Stage(3, shards_optimizer=True, shards_gradients=True, shards_parameters=True),
}


def stage_of(number: int) -> Stage:
    """The row of stage ``number``; ValueError names the ones there are."""
    if number not in STAGES:
        raise ValueError(f"zero_optimization.stage is {number!r}: ZeRO has the stages {sorted(STAGES)}")
    return STAGES[number]
