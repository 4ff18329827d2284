"""Loss scaling: keep fp16 gradients between underflow and overflow by a power-of-two factor on the loss.

    loss · S  →  backward  →  gradients · S  →  unscale by 1/S in the optimizer's own pass

The dynamic scale is DeepSpeed's automaton, number for number. Counting updates n = 0, 1, 2, ..., with n_last the last
one that overflowed (-1 before any), and h the patience left, at first `hysteresis`:

    overflow      h = 1:  S ← max(S / 2, min_scale)        h > 1:  h ← h - 1
    no overflow   quiet = n - n_last - 1 is a positive multiple of `window`:  S ← 2·S,  h ← hysteresis
                  consecutive_hysteresis:  h ← hysteresis after every update without overflow

Two things follow that are easy to get wrong: the first doubling comes at update `window` + 1, not `window`, and once h
has run down to 1 every further overflow halves S until h is refilled.

It differs from DeepSpeed in one place. An overflow at `min_scale` raises there and ends the run without a word on where
the bad number came from; here it is an event like any other, S stays, the step is skipped, and whoever owns the step
says which parameter was the first.

Source   Micikevicius et al. 2018, arXiv:1710.03740; behaviour recorded from deepspeed.runtime.fp16.loss_scaler.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonspeed.config import Config
    from tritonspeed.precision.policy import Policy

_FACTOR = 2.0  # a power of two: scaling and unscaling change no mantissa bit


class ScaleChange(enum.Enum):
    """What one update did to the scale."""

    NONE = "none"
    """No overflow, the scale stays."""
    RAISED = "raised"
    """A whole window without overflow: doubled."""
    TOLERATED = "tolerated"
    """Overflow, but patience (hysteresis) was left: the scale stays, the step is skipped."""
    LOWERED = "lowered"
    """Overflow: halved, or set to the floor if that is nearer. The step is skipped."""
    AT_FLOOR = "at_floor"
    """Overflow at the smallest allowed scale: nothing left to lower. The step is skipped."""
    FIXED = "fixed"
    """Overflow where the scale is fixed, or 1 because the dtype needs none. The step is skipped."""


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """The outcome of one `LossScaler.update`.

    Attributes:
        change: what happened to the scale.
        overflow: whether the gradients were not finite, so that the step must be skipped.
        scale_before: the scale that this step's loss was multiplied with.
        scale_after: the scale of the next step.
        hysteresis_left: how many overflows from here, without a refill, lower the scale: 1 if the very next one does.
        num_overflows_in_a_row: consecutive updates with overflow, this one included; 0 without overflow.
    """

    change: ScaleChange
    overflow: bool
    scale_before: float
    scale_after: float
    hysteresis_left: int
    num_overflows_in_a_row: int

    def describe(self, first_parameter: str | None = None) -> str:
        """One line for a log.

        Args:
            first_parameter: name of the first parameter whose gradient is not finite, if it was looked for.
        """
        if not self.overflow:
            return f"loss scale {self.scale_before:g} → {self.scale_after:g}"
        where = f"first in {first_parameter!r}" if first_parameter else "in an unnamed parameter"
        unscaled = f"step skipped: gradient not finite, {where}"
        skipped = f"{unscaled}; loss scale {self.scale_before:g}"
        if self.change is ScaleChange.LOWERED:
            return f"{skipped} → {self.scale_after:g}"
        if self.change is ScaleChange.TOLERATED:
            return f"{skipped} kept, lowered at overflow number {self.hysteresis_left} from here"
        in_a_row = f"{self.num_overflows_in_a_row} step(s) in a row"
        if self.change is ScaleChange.AT_FLOOR:
            return (
                f"{skipped} is already fp16.min_loss_scale, {in_a_row}. A smaller scale cannot mend this gradient: use "
                "bf16, lower the learning rate, or look for a division or logarithm near that parameter"
            )
        if self.scale_before != 1.0:
            return f"{skipped} is fixed, {in_a_row}: lower fp16.loss_scale, or set it to 0 for a dynamic one"
        return f"{unscaled}, {in_a_row}: lower the learning rate, or look for a NaN near that parameter"


@dataclass(slots=True)
class LossScaler:
    """The loss scale of a run, and what the next one will be.

    Args:
        initial_scale: the first scale, or the only one when not `dynamic`.
        dynamic: whether the scale adapts.
        window: updates without overflow before the scale doubles.
        hysteresis: overflows until the scale is halved.
        consecutive_hysteresis: whether one update without overflow restores the patience; otherwise a doubling does.
        min_scale: the floor.

    Raises:
        ValueError: a setting is out of range.
    """

    initial_scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0
    scale: float = field(init=False)
    _num_updates: int = field(init=False, default=0)
    _last_overflow: int = field(init=False, default=-1)
    _hysteresis_left: int = field(init=False)
    _num_overflows_in_a_row: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.initial_scale = self.scale = float(self.initial_scale)
        self.min_scale = float(self.min_scale)
        self._hysteresis_left = self.hysteresis
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"the loss scale is {self.scale}, but must be positive and finite")
        if not self.dynamic:
            return
        if self.window < 1:
            raise ValueError(f"fp16.loss_scale_window is {self.window}, but must be at least 1 (DeepSpeed's is 1000)")
        if self.hysteresis < 1:
            raise ValueError(
                f"fp16.hysteresis is {self.hysteresis}, but must be at least 1: 1 lowers the scale at every overflow, "
                "2 (the default) at the second"
            )
        if not 0.0 < self.min_scale <= self.scale:
            raise ValueError(
                f"fp16.min_loss_scale is {self.min_scale:g}, but must be positive and at most the initial scale "
                f"{self.scale:g} = 2^fp16.initial_scale_power: lower the one or raise the other"
            )

    @classmethod
    def from_config(cls, config: Config, policy: Policy) -> LossScaler:
        """The scaler that a resolved config asks for; fixed at 1 unless gradients pass through fp16.

        The numbers are those of the `fp16` block, under fp16 autocast too, where `fp16.enabled` is false.
        `fp16.loss_scale` 0 means dynamic, anything above is the fixed scale.
        """
        if not policy.needs_loss_scale:
            return cls()
        fp16 = config.fp16
        if fp16.loss_scale < 0:
            raise ValueError(f"fp16.loss_scale is {fp16.loss_scale}, but must be 0 (dynamic) or a positive fixed scale")
        if fp16.loss_scale > 0:
            return cls(initial_scale=fp16.loss_scale)
        return cls(
            initial_scale=2.0**fp16.initial_scale_power,
            dynamic=True,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            min_scale=fp16.min_loss_scale,
        )

    def update(self, overflow: bool) -> ScaleEvent:
        """Advance by one optimizer step.

        Args:
            overflow: whether any rank met a gradient that is not finite. All ranks must pass the same value.
        """
        before = self.scale
        self._num_overflows_in_a_row = self._num_overflows_in_a_row + 1 if overflow else 0
        if not self.dynamic:
            change = ScaleChange.FIXED if overflow else ScaleChange.NONE
        elif overflow:
            change = self._lower()
        else:
            change = self._raise_after_window()
        self._num_updates += 1
        return ScaleEvent(change, overflow, before, self.scale, self._hysteresis_left, self._num_overflows_in_a_row)

    def _lower(self) -> ScaleChange:
        self._last_overflow = self._num_updates
        if self._hysteresis_left > 1:
            self._hysteresis_left -= 1
            return ScaleChange.TOLERATED
        if self.scale == self.min_scale:
            return ScaleChange.AT_FLOOR
        self.scale = max(self.scale / _FACTOR, self.min_scale)
        return ScaleChange.LOWERED

    def _raise_after_window(self) -> ScaleChange:
        quiet = self._num_updates - self._last_overflow - 1
        ends_window = quiet > 0 and quiet % self.window == 0
        if self.consecutive_hysteresis or ends_window:
            self._hysteresis_left = self.hysteresis
        if not ends_window:
            return ScaleChange.NONE
        self.scale *= _FACTOR
        return ScaleChange.RAISED

    def state_dict(self) -> dict[str, float | int | bool]:
        """Everything that `update` depends on and the constructor does not set."""
        return {
            "dynamic": self.dynamic,
            "scale": self.scale,
            "num_updates": self._num_updates,
            "last_overflow": self._last_overflow,
            "hysteresis_left": self._hysteresis_left,
            "num_overflows_in_a_row": self._num_overflows_in_a_row,
        }

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
        """Continue where `state` was taken. A scale that is fixed now, or was fixed then, stays as configured.

        Raises:
            ValueError: `state` is not what `state_dict` returns.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"not a loss scaler's state: it has {sorted(state)}, expected {sorted(self.state_dict())}")
        if not (self.dynamic and state["dynamic"]):
            return
        self.scale = float(state["scale"])
        self._num_updates = int(state["num_updates"])
        self._last_overflow = int(state["last_overflow"])
        self._hysteresis_left = min(int(state["hysteresis_left"]), self.hysteresis)
        self._num_overflows_in_a_row = int(state["num_overflows_in_a_row"])
