"""Operations, parameters and time of any model's forward, under DeepSpeed's names for it.

    profiler = FlopsProfiler(model)
    profiler.start_profile()
    loss = model(batch)
    profiler.stop_profile()
    profiler.get_total_macs(as_string=True), profiler.get_total_params()
    profiler.print_model_profile()
    profiler.end_profile()

Products, convolutions and attention are counted (multiply-accumulates are DeepSpeed's; elementwise work is not in the
operations). What is between start and stop is slower for being counted: ``get_model_profile`` counts in the last
warm-up and times after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tritonspeed.log import speak
from tritonspeed.profiling.flops_count import Counts, ModuleWatch
from tritonspeed.profiling.flops_step import model_shape, show
from tritonspeed.profiling.flops_table import FlopsProfile


class FlopsProfiler:
    """Counts and times what a model does between ``start_profile`` and ``stop_profile``.

    Args:
        model: the model, or an engine's.
        ds_engine: the engine, whose ``flops_profiler`` block profiles by itself: nothing here needs it.
        recompute_fwd_factor: as the config's.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model, self.ds_engine, self.recompute_fwd_factor = model, ds_engine, recompute_fwd_factor
        self.started = False
        self._counts, self._seconds = Counts(), {}
        self._watch: ModuleWatch | None = None
        self._stack = ExitStack()

    def start_profile(self, ignore_list: Sequence[type] | None = None) -> None:
        """Count and time from here on.

        Args:
            ignore_list: classes whose modules count as part of those around them.
        """
        self.end_profile()
        self._begin(ignore_list or ()).enter_context(self._watched.count())

    def _begin(self, ignored: Sequence[type]) -> ExitStack:
        self._watch = ModuleWatch(self.model, ignored)
        self._stack.callback(self._watch.remove)
        self.started = True
        return self._stack

    @property
    def _watched(self) -> ModuleWatch:
        assert self._watch is not None, "start_profile() comes first"
        return self._watch

    def stop_profile(self) -> None:
        """Count and time no longer; what was found stays."""
        self._stack.close()
        if self._watch is not None:
            self._counts.add(self._watch.counts)
            self._seconds, self._watch = self._watch.seconds(), None

    def reset_profile(self) -> None:
        """Forget what was found."""
        self._counts, self._seconds = Counts(), {}
        if self._watch is not None:
            self._watch.counts = Counts()
            self._watch.forget_times()

    def end_profile(self) -> None:
        """Stop, and forget what was found."""
        self.stop_profile()
        self.reset_profile()
        self.started = False

    @property
    def profile(self) -> FlopsProfile:
        """What was found so far."""
        first = next(self.model.parameters(), torch.empty(0))
        counts, seconds = Counts(), self._seconds
        counts.add(self._counts)
        if self._watch is not None:
            counts.add(self._watch.counts)
            seconds = self._watch.seconds()
        shape = model_shape(self.model, first.device, first.dtype)
        return FlopsProfile(shape, counts, seconds, {"forward": seconds.get("", 0.0)})

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of the forward."""
        return number_to_string(self.profile.num_forward) if as_string else self.profile.num_forward

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulates of the forward."""
        macs = self.profile.rows[0].macs
        return macs_to_string(macs) if as_string else macs

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Elements of the model's parameters, whole."""
        params = self.profile.num_params
        return params_to_string(params) if as_string else params

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds of the model's forwards."""
        seconds = self.profile.rows[0].seconds
        return duration_to_string(seconds) if as_string else seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """The table, to the log or to a file; nothing before ``start_profile``.

        Args:
            profile_step: accepted; the table is of what was found.
            module_depth: levels of modules; -1 is all.
            top_modules: classes of modules named for each level.
            detailed: a row for each module.
            output_file: the file; None is the log.
        """
        if self.started:
            speak()
            show(self.profile.table(module_depth, top_modules, detailed), output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """The table without its modules."""
        self.print_model_profile(module_depth=module_depth, top_modules=top_modules, detailed=False)


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Run a model, which is put into eval mode, and say what a forward costs.

    Args:
        model: the model.
        input_shape: of the one tensor it takes; None calls it with ``args`` and ``kwargs``.
        args, kwargs: what it is called with.
        print_profile, detailed, module_depth, top_modules, output_file: see ``FlopsProfiler.print_model_profile``.
        warm_up: calls before the one that is timed; the last of them is counted (0: that one is counted too).
        as_string: return text.
        ignore_modules: classes whose modules count as part of those around them.
        mode: "forward", or "generate" to call ``model.generate``.

    Returns:
        Operations, multiply-accumulates, parameters.

    Raises:
        ValueError: there is nothing to call it with, or ``mode`` is another one.
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f'get_model_profile(mode={mode!r}): must be "forward" or "generate"')
    first = next(model.parameters(), torch.empty(0))
    if input_shape is not None:
        args, kwargs = [torch.ones(tuple(input_shape), dtype=first.dtype, device=first.device)], {}
    if not args and not kwargs:
        raise ValueError("get_model_profile() needs input_shape=, args= or kwargs=: what to call the model with")
    call: Any = model if mode == "forward" else model.generate
    model.eval()
    profiler = FlopsProfiler(model)
    for _ in range(warm_up - 1):
        call(*args, **(kwargs or {}))
    with profiler._begin(ignore_modules or ()):
        watch = profiler._watched
        with watch.count():
            call(*args, **(kwargs or {}))
        if warm_up:
            watch.forget_times()
            call(*args, **(kwargs or {}))
    found = profiler.profile
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    profiler.end_profile()
    flops, macs, params = found.num_forward, found.rows[0].macs, found.num_params
    return (
        (number_to_string(flops), macs_to_string(macs), params_to_string(params))
        if as_string
        else (flops, macs, params)
    )


_UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 G": the number in ``units``, or in the largest that leave it at 1 or more."""
    if units is None:
        units = next((name for name, size in _UNITS.items() if num >= size), "u") if num else ""
    return f"{round(num / _UNITS.get(units, 1.0), precision):g} {units}"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 GMACs"."""
    return f"{number_to_string(macs, units, precision)}MACs"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 GFLOPS": operations per second."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def bytes_to_string(b: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 GB"."""
    return f"{number_to_string(b, units, precision)}B"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 B", "4.5 M", "81": billions are B."""
    units = units.replace("B", "G") if units else units
    return number_to_string(params_num, units, precision).replace("G", "B").strip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 ms"."""
    return f"{number_to_string(duration, units, precision)}s"
