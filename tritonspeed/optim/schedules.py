"""DeepSpeed's five learning-rate schedules, as functions of the iteration.

    t counts `step()` calls from 0; t = -1 is a schedule that has not stepped: the first training step.
    W = max(2, warmup_num_steps), T = total_num_steps.

    warm-up, t < W       w(t) = log(t + 1) / log(W)   "log", the default        or t / W   "linear"
    WarmupLR             lr = min + (max - min) · w(t),  then max.      max None: the group's own lr at construction
    WarmupDecayLR        ... then  min + (max - min) · (T - t) / (T - W), not below min
    WarmupCosineLR       lr = own lr · (r + (1 - r) · w(t)),  r = warmup_min_ratio,
                         then  own lr · (c + (1 - c) · (1 + cos(π · (t - W + 1) / (T - W))) / 2),  c = cos_min_ratio
    LRRangeTest          lr = min · (1 + rate · (t + 1) / step_size);  staircase: the quotient's floor
    OneCycle             min → max over the first step size, max → min over the second, then  min / (1 + rate · decayed
                         steps / decay_step_size). beta₁ runs the other way: max → min → max, then grows

At t = -1 a warm-up stands at its minimum (WarmupCosineLR at 0, whatever its ratio), the other two at theirs. The engine
steps the schedule after each optimizer step that was not skipped.

They act on `optimizer.param_groups` alone, so any optimizer will do. Two habits of DeepSpeed's are kept because runs
depend on them: OneCycle replaces beta₂ by 0.99, and starts beta₁ at its minimum for the one step before t = 0. One is
not: `load_state_dict` here writes the learning rate of the loaded iteration into the groups at once, where DeepSpeed
trains one step at the rate of a fresh start if the optimizer's own state was not restored as well.

Source   deepspeed.runtime.lr_schedules 0.19, whose values over 200 steps are recorded in the tests; OneCycle and the
         range test: Smith 2018, arXiv:1803.09820.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

PerGroup = float | Sequence[float]
"""One number for all parameter groups, or a list with one for each."""

_ONE_CYCLE_BETA2 = 0.99  # DeepSpeed's, whatever the optimizer was built with


def _per_group(name: str, value: PerGroup, num_groups: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value] * num_groups
    if len(values) != num_groups:
        raise ValueError(
            f"{name} has {len(values)} values, but the optimizer has {num_groups} parameter groups: give one number "
            "for all of them, or one for each"
        )
    return [float(v) for v in values]


def _count(name: str, value: float, at_least: int) -> int:
    """An integer that JSON may have written as 1e3."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < at_least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {at_least}")
    return int(value)


class Schedule(ABC):
    """What the five have in common: the iteration, and writing its rates into the optimizer's parameter groups.

    Args:
        optimizer: anything with `param_groups`, each a dict with "lr" (a number or a one-element tensor).
        last_batch_iteration: the last t that has been trained; -1 starts from the beginning, and only then is the
            optimizer's rate set at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int = -1) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(f"a schedule needs an optimizer with param_groups, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abstractmethod
    def lrs_at(self, iteration: int) -> list[float]:
        """The learning rate of each parameter group at `iteration` (t above). Changes nothing."""

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the current iteration, from the formula."""
        return self.lrs_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """The learning rates that this schedule last wrote into the optimizer.

        Raises:
            ValueError: it was built with a `last_batch_iteration` and has not stepped since.
        """
        if self._last_lr is None:
            raise ValueError(
                f"built with last_batch_iteration={self.last_batch_iteration}, this schedule has set no learning rate "
                "yet: call step() or load_state_dict() first"
            )
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next iteration, or to the one given, and set the optimizer's rates."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._write()

    def state_dict(self) -> dict[str, int]:
        """The iteration; everything else comes from the config."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the iteration of `state` and set the optimizer's rates to it."""
        if "last_batch_iteration" not in state:
            raise ValueError(f"not a schedule's state: it has {sorted(state)}, expected last_batch_iteration")
        self.step(state["last_batch_iteration"])

    def _write(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # in place: a compiled or captured step holds this very tensor
            else:
                group["lr"] = lr

    def _start(self) -> None:
        """End of construction: a schedule from the beginning sets the rate of the first training step."""
        if self.last_batch_iteration == -1:
            self._write()


class LRRangeTest(Schedule):
    """Raise the rate without end, to see where training diverges.

    Args:
        lr_range_test_min_lr: the first rate, one number or one for each group.
        lr_range_test_step_size: iterations in which the rate grows by `lr_range_test_step_rate` times the first.
        lr_range_test_step_rate: growth for each step size, relative to the first rate.
        lr_range_test_staircase: grow at the end of each step size only.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = _per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(self.optimizer.param_groups))
        self.step_size = _count("lr_range_test_step_size", lr_range_test_step_size, at_least=1)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._start()

    def lrs_at(self, iteration: int) -> list[float]:
        num_intervals = (iteration + 1) / self.step_size
        if self.staircase:
            num_intervals = math.floor(num_intervals)
        return [lr * (1 + self.step_rate * num_intervals) for lr in self.min_lrs]


class _Cycle:
    """The shape of one cycle: 0 → 1 over `first` iterations and back over `second`, in stairs if asked."""

    def __init__(self, first: float, second: float | None, first_stairs: int, second_stairs: int | None) -> None:
        self.first = float(first)
        self.second = self.first if second is None else float(second)
        if self.first <= 0 or self.second < 0:
            raise ValueError(
                f"cycle_first_step_size {self.first:g} must be positive and cycle_second_step_size {self.second:g} "
                "not negative"
            )
        self.total = self.first + self.second
        self.first_stairs = first_stairs
        self.second_stairs = first_stairs if second_stairs is None else second_stairs

    def height_at(self, iteration: int) -> float:
        """Between 0 (minimum rate) and 1 (maximum rate)."""
        position = iteration + 1
        turn = self.first / self.total
        x = 1.0 + position / self.total - math.floor(1 + position / self.total)  # fraction of the cycle in [0, 1)
        rising = x <= turn
        stairs = self.first_stairs if rising else self.second_stairs
        if stairs <= 0:
            return x / turn if rising else (x - 1) / (turn - 1)
        # From whole iterations, not from x: x may fall 1e-16 short of a stair and lose all of it.
        position %= self.total
        if position <= self.first:
            return math.floor(position * stairs / self.first) / stairs
        return math.floor((self.total - position) * stairs / self.second) / stairs


class OneCycle(Schedule):
    """One cycle of the rate, and of beta₁ against it, then decay.

    Args:
        cycle_min_lr, cycle_max_lr: bounds of the rate, one number or one for each group.
        decay_lr_rate: decay of the rate for each `decay_step_size` after the cycle.
        cycle_first_step_size, cycle_second_step_size: iterations up and down; the second None: as the first.
        cycle_first_stair_count, cycle_second_stair_count: in that many stairs; 0: continuous, None: as the first.
        decay_step_size: unit of the decay in iterations; 0: no decay.
        cycle_momentum: cycle beta₁ too; ignored with a warning where the optimizer has no "betas".
        cycle_min_mom, cycle_max_mom: bounds of beta₁, one number or one for each group.
        decay_mom_rate: growth of beta₁ for each `decay_step_size` after the cycle.
    """

    def __init__(  # DeepSpeed's signature: its config keys are these names
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        num_groups = len(self.optimizer.param_groups)
        self.cycle = _Cycle(
            cycle_first_step_size, cycle_second_step_size, cycle_first_stair_count, cycle_second_stair_count
        )
        self.min_lrs = _per_group("cycle_min_lr", cycle_min_lr, num_groups)
        self.max_lrs = _per_group("cycle_max_lr", cycle_max_lr, num_groups)
        self.min_moms = _per_group("cycle_min_mom", cycle_min_mom, num_groups)
        self.max_moms = _per_group("cycle_max_mom", cycle_max_mom, num_groups)
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and not all("betas" in group for group in self.optimizer.param_groups):
            warnings.warn(
                f"OneCycle cycles the rate alone: {type(optimizer).__name__} has no betas to cycle", stacklevel=2
            )
            self.cycle_momentum = False
        self._start()

    def lrs_at(self, iteration: int) -> list[float]:
        if iteration < self.cycle.total:
            height = self.cycle.height_at(iteration)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / self._decay_at(iteration, self.decay_lr_rate) for low in self.min_lrs]

    def moms_at(self, iteration: int) -> list[tuple[float, float]] | None:
        """`betas` of each parameter group at `iteration`; None where momentum is not cycled."""
        if not self.cycle_momentum:
            return None
        if iteration < 0:
            beta1s = self.min_moms
        elif iteration < self.cycle.total:
            height = self.cycle.height_at(iteration)
            beta1s = [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            beta1s = [high * self._decay_at(iteration, self.decay_mom_rate) for high in self.max_moms]
        return [(beta1, _ONE_CYCLE_BETA2) for beta1 in beta1s]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """`betas` of each parameter group at the current iteration; None where momentum is not cycled."""
        return self.moms_at(self.last_batch_iteration)

    def _decay_at(self, iteration: int, rate: float) -> float:
        if not self.decay_step_size or not rate:
            return 1.0
        return 1 + rate * ((iteration - self.cycle.total + 1) / self.decay_step_size)

    def _write(self) -> None:
        super()._write()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas


class _Warmup:
    """w(t), from 0 at t = 0 towards 1 at t = W."""

    def __init__(self, num_steps: int, kind: str) -> None:
        if kind not in ("log", "linear"):
            raise ValueError(f'warmup_type is {kind!r}, but must be "log" (the default) or "linear"')
        # 0 is what Hugging Face fills in for "auto" without warm-up. W is at least 2, so that log(W) divides.
        self.num_steps = max(2, _count("warmup_num_steps", num_steps, at_least=0))
        self.kind = kind
        self._inverse_log = 1.0 / math.log(self.num_steps)

    def at(self, iteration: int) -> float:
        if self.kind == "log":
            return self._inverse_log * math.log(iteration + 1)
        return iteration / self.num_steps


def _check_total(total_num_steps: float, warmup: _Warmup) -> None:
    if total_num_steps < warmup.num_steps:
        warnings.warn(
            f"total_num_steps {total_num_steps} is less than warmup_num_steps {warmup.num_steps}: no decay",
            stacklevel=3,
        )


class WarmupLR(Schedule):
    """Warm up, then keep the rate.

    Args:
        warmup_min_lr: the rate at the start, one number or one for each group.
        warmup_max_lr: the rate after the warm-up, one number or one for each group; None: each group's own.
        warmup_num_steps: iterations of warm-up; 0 and 1 count as 2.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        groups = self.optimizer.param_groups
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        self.min_lrs = _per_group("warmup_min_lr", warmup_min_lr, len(groups))
        self.max_lrs = (
            [float(group["lr"]) for group in groups]
            if warmup_max_lr is None
            else _per_group("warmup_max_lr", warmup_max_lr, len(groups))
        )
        self._start()

    def lrs_at(self, iteration: int) -> list[float]:
        if iteration < 0:
            return list(self.min_lrs)
        share = self.warmup.at(iteration) if iteration < self.warmup.num_steps else self._share_after(iteration)
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _share_after(self, iteration: int) -> float:
        """Where between min (0) and max (1) the rate stands once the warm-up is over."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Warm up, then decay linearly to the minimum at `total_num_steps`.

    Args:
        total_num_steps: the iteration at which the minimum is reached.
        warmup_max_lr: as in `WarmupLR`, but 0.001 by default whatever the optimizer's own rate: DeepSpeed's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _check_total(total_num_steps, self.warmup)

    def _share_after(self, iteration: int) -> float:
        decay_steps = max(1.0, self.total_num_steps - self.warmup.num_steps)
        return max(0.0, (self.total_num_steps - iteration) / decay_steps)


class WarmupCosineLR(Schedule):
    """Warm up, then follow half a cosine down, as a ratio of each group's own rate.

    Args:
        total_num_steps: the iteration at which the floor is reached.
        warmup_min_ratio: ratio at t = 0.
        warmup_num_steps: iterations of warm-up; 0 and 1 count as 2.
        cos_min_ratio: ratio at the end and after.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Literal["log", "linear"] = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup = _Warmup(warmup_num_steps, warmup_type)
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.own_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        _check_total(total_num_steps, self.warmup)
        self._start()

    def lrs_at(self, iteration: int) -> list[float]:
        ratio = self.ratio_at(iteration)
        return [lr * ratio for lr in self.own_lrs]

    def ratio_at(self, iteration: int) -> float:
        """The factor on each group's own rate at `iteration`."""
        if iteration < 0:
            return 0.0
        if iteration < self.warmup.num_steps:
            return self.warmup_min_ratio + self.warmup.at(iteration) * (1.0 - self.warmup_min_ratio)
        decay_steps = max(1, self.total_num_steps - self.warmup.num_steps)
        progress = min(1.0, (iteration - self.warmup.num_steps + 1) / decay_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.__name__: schedule for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES: list[str] = list(SCHEDULES)
"""The names that the config's `scheduler.type` knows besides those of `torch.optim.lr_scheduler`."""
