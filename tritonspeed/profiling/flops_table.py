"""What was counted and timed, as values and as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tritonspeed.estimation import Machine
from tritonspeed.estimation.machine import FP32_SHARE
from tritonspeed.profiling.flops_count import Counts
from tritonspeed.tuning.timing import PEAKS, device_name

MAX_KINDS = 20  # characters of a class's name in the table


@dataclass(frozen=True)
class ModuleRow:
    """One module, its children included. A module that stands at two places is told at the first.

    Attributes:
        name: "" is the model.
        kind: its class.
        params: elements of its parameters, whole.
        forward, backward, recompute: floating-point operations.
        seconds: of its forwards, with what they waited for.
    """

    name: str
    kind: str
    params: int
    forward: int
    backward: int
    recompute: int
    seconds: float

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward."""
        return self.forward // 2


@dataclass(frozen=True)
class Shape:
    """What does not change from step to step.

    Attributes:
        kinds: module name → class, the model's own under "".
        params: module name → elements of the parameters that it holds itself, whole.
        num_held: elements of parameters that are on this rank between steps.
        world: ranks.
        dtype: what is computed in.
        device: where.
    """

    kinds: Mapping[str, str]
    params: Mapping[str, int]
    num_held: int
    world: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class FlopsProfile:
    """One step of one rank, or one forward.

    Attributes:
        shape: the model and the rank.
        counts: floating-point operations of every module by itself.
        module_s: seconds of every module's forwards.
        phase_s: seconds of "forward", "backward" and "step"; what was not seen is not there.
        step: number of the step; 0 outside an engine.
        num_micro: forwards in it.
        num_samples: of this rank; 0 where unknown.
        num_tokens: likewise.
        backward_factor: backward by this many forwards, where it was not seen.
        was_counted_live: the times are those of a run that was being counted: too long.
        was_uncompiled: there are compiled modules, which ran uncompiled while they were counted.
    """

    shape: Shape
    counts: Counts
    module_s: Mapping[str, float]
    phase_s: Mapping[str, float]
    step: int = 0
    num_micro: int = 1
    num_samples: int = 0
    num_tokens: int = 0
    backward_factor: float = 2.0
    was_counted_live: bool = False
    was_uncompiled: bool = False
    rows: list[ModuleRow] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", list(_rows(self.shape, self.counts, self.module_s)))

    @property
    def num_params(self) -> int:
        return self.rows[0].params

    @property
    def num_forward(self) -> int:
        return self.counts.num_forward

    @property
    def num_backward(self) -> int:
        """Of the backward, recomputation not included; from the forward's, where no backward was seen."""
        seen = self.counts.num_backward
        return seen if seen or "backward" in self.phase_s else int(self.backward_factor * self.num_forward)

    @property
    def total_s(self) -> float:
        return sum(self.phase_s.values())

    @property
    def num_flops(self) -> int:
        """All that was carried out, recomputation included."""
        return self.num_forward + self.num_backward + self.counts.num_recompute

    @property
    def flops_per_s(self) -> float:
        """Achieved: all that was carried out over forward, backward and step."""
        return self.num_flops / self.total_s if self.total_s else 0.0

    def bound(self, machine: Machine | None = None) -> tuple[float, str] | None:
        """(operations per second that this device's products can reach, whose figure that is); None: unknown.

        Args:
            machine: a measured or tabled one, by ``ts.estimation.calibrate``; None asks the table of data sheets.
        """
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.shape.dtype, "fp32")
        if machine is not None:
            return machine.flops_per_s.get(kind, machine.flops_per_s["fp32"]), f"{machine.name}, {kind}"
        name = device_name(self.shape.device)
        if name not in PEAKS:
            return None
        share = 1.0
        if kind == "fp32":
            kind, share = ("tf32", 0.5) if torch.backends.cuda.matmul.allow_tf32 else ("fp32", FP32_SHARE)
        return PEAKS[name].bf16_tflop_per_s * 1e12 * share, f"{name}, data sheet, {kind}"

    def table(self, depth: int = -1, top: int = 1, detailed: bool = True, machine: Machine | None = None) -> str:
        """For people.

        Args:
            depth: levels of modules; -1 is all.
            top: classes of modules named for each level; 0 is none.
            detailed: a row for each module.
            machine: see ``bound``.
        """
        depth = max(row.depth for row in self.rows) if depth < 0 else depth
        parts = [*self._summary(machine)]
        if top:
            parts += ["", *self._top(depth, top)]
        if detailed:
            parts += ["", *self._modules(depth)]
        return "\n".join(parts)

    def _summary(self, machine: Machine | None) -> Iterator[str]:
        shape, forward_s, backward_s = self.shape, self.phase_s.get("forward", 0.0), self.phase_s.get("backward", 0.0)
        where = f"step {self.step}, rank 0 of {shape.world}" if self.step else "one forward"
        yield f"flops profile of {where}: products, convolutions and attention; a multiplication and its addition are 2"
        if self.counts.opaque:
            yield f"not counted, there is no formula: {', '.join(sorted(self.counts.opaque))}"
        if self.was_counted_live:
            yield "times are of a step that was being counted, whose shapes had not been met before: they are too long"
        if self.was_uncompiled:
            yield "compiled modules ran uncompiled while they were counted; what is inside them is not timed"
        yield _line("parameters", f"{_si(self.num_params)}, on this rank {_si(shape.num_held)}")
        batch = [f"{self.num_micro} micro-step{'s' * (self.num_micro != 1)}"]
        batch += [f"{self.num_samples} samples"] if self.num_samples else []
        batch += [f"{self.num_tokens} tokens"] if self.num_tokens else []
        yield _line("of this rank", ", ".join(batch))
        yield _line("forward", _work(self.num_forward, forward_s) + f", {_si(self.num_forward / 2)}MAC")
        again = self.counts.num_recompute
        if self.step:
            seen = "" if self.counts.num_backward else f" ({self.backward_factor:g} × forward: it was not seen)"
            more = f", {_si(again)}FLOP of them recomputed" if again else ""
            yield _line("backward", _work(self.num_backward + again, backward_s) + more + seen)
            yield _line("step", _time(self.phase_s.get("step", 0.0)))
            yield _line("together", _work(self.num_flops, self.total_s))
            if again and self.total_s:
                useful = (self.num_flops - again) / self.total_s
                yield _line("  without recomputing", f"{_si(useful)}FLOP/s")
        yield _line("share of the bound", self._share(machine))
        yield from self._rates()

    def _share(self, machine: Machine | None) -> str:
        found = self.bound(machine)
        if found is None:
            name = device_name(self.shape.device)
            return (
                f"unknown: no data sheet of {name}; ts.estimation.calibrate() measures it: profile.table(machine=...)"
            )
        bound, whose = found
        return f"{self.flops_per_s / bound:.1%} of {_si(bound)}FLOP/s ({whose})"

    def _rates(self) -> Iterator[str]:
        if self.total_s and self.step:
            if self.num_samples:
                yield _line("samples/s", f"{self.num_samples * self.shape.world / self.total_s:,.2f} over all ranks")
            if self.num_tokens:
                yield _line("tokens/s", f"{self.num_tokens / self.total_s:,.0f} of this rank")

    def _top(self, depth: int, top: int) -> Iterator[str]:
        yield "largest classes of modules by level: parameters · forward operations · forward time"
        for level in range(depth + 1):
            by_kind: dict[str, Counter[str]] = {what: Counter() for what in ("params", "forward", "seconds")}
            for row in self.rows:
                if row.depth == level:
                    for what, counter in by_kind.items():
                        counter[row.kind] += getattr(row, what)
            shown = [
                ", ".join(f"{kind} {say(value)}" for kind, value in counter.most_common(top))
                for counter, say in zip(by_kind.values(), (_si, _flop, _time), strict=True)
            ]
            yield f"  {level}: {' · '.join(shown)}"

    def _modules(self, depth: int) -> Iterator[str]:
        whole = self.rows[0]
        shown = [row for row in self.rows if row.depth <= depth]
        names = [
            "  " * row.depth + (row.name.rpartition(".")[2] or "model") + f" ({row.kind[:MAX_KINDS]})" for row in shown
        ]
        width = max(len(name) for name in names)
        head = ("params", "%", "forward", "%", "fwd time", "%", "fwd speed", "backward", "recomputed")
        yield f"{'module':{width}}" + "".join(f"{title:>14}" if title != "%" else f"{title:>7}" for title in head)
        for name, row in zip(names, shown, strict=True):
            speed = f"{_si(row.forward / row.seconds)}FLOP/s" if row.seconds and row.forward else "-"
            cells = [
                *(f"{_si(row.params):>14}", _percent(row.params, whole.params)),
                *(f"{_flop(row.forward):>14}", _percent(row.forward, whole.forward)),
                *(f"{_time(row.seconds):>14}", _percent(row.seconds, whole.seconds)),
                *(f"{speed:>14}", f"{_flop(row.backward):>14}", f"{_flop(row.recompute):>14}"),
            ]
            yield f"{name:{width}}" + "".join(cells)


def _rows(shape: Shape, counts: Counts, seconds: Mapping[str, float]) -> Iterator[ModuleRow]:
    for name, kind in shape.kinds.items():
        prefix = f"{name}." if name else ""

        def whole(own: Mapping[str, int], name: str = name, prefix: str = prefix) -> int:
            return sum(value for key, value in own.items() if key == name or key.startswith(prefix))

        forwards = [whole(each) for each in (counts.forward, counts.backward, counts.recompute)]
        yield ModuleRow(name, kind, whole(shape.params), *forwards, seconds=_seconds(name, shape, seconds))


def _seconds(name: str, shape: Shape, seconds: Mapping[str, float]) -> float:
    """A module's own, or its children's where it has no forward, as a ModuleList."""
    if name in seconds:
        return seconds[name]
    prefix = f"{name}." if name else ""
    children = [each for each in shape.kinds if each.startswith(prefix) and each and "." not in each[len(prefix) :]]
    return sum(_seconds(child, shape, seconds) for child in children if child != name)


def _line(what: str, says: str) -> str:
    return f"  {what:22}{says}"


def _work(num_flops: float, seconds: float) -> str:
    return f"{_flop(num_flops)} in {_time(seconds)}, {_si(num_flops / seconds)}FLOP/s" if seconds else _flop(num_flops)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:6.1f}%" if whole else f"{'-':>7}"


def _flop(value: float) -> str:
    return f"{_si(value)}FLOP" if value else "-"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _si(value: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "
