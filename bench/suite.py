"""The kernel suite: every case (op × shape × type × direction), ours and its peers in turns, under measured ceilings.

A case comes from `tritonspeed/tuning/cases/` (what the tuner times too), its peers from `bench/variants.py`. Of each
variant:

    kernel µs        events around one call, the host far ahead, buffers that have left the cache
    with Python µs   calls one after the other without waiting, per call: what a training loop pays at least
    % of peak        of the data sheet; the roof is max(bytes / bandwidth, flops / rate)
    % of ceiling     of a copy's bandwidth and a matmul's rate, measured in the same run
    error            relative to fp64 on the same inputs, ‖x − exact‖ / ‖exact‖
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from bench.harness import PEAKS, device_name, interleaved_ms, num_rotations, stream_gb_per_s, time_call_ms
from bench.variants import variants_of
from tritonspeed import comm, tuning
from tritonspeed.tuning.case import Case

OURS = "ours"
CALLS_IN_A_ROW = 20
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
MAX_EXACT_BYTES = 2**35
MAX_REASON_CHARS = 160


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run, to be read as the practical roof."""

    gb_per_s: float
    tflop_per_s: float

    @classmethod
    def measured(cls, device: torch.device) -> "Ceilings":
        """A buffer updated in place, and a square bf16 matmul (fp32 on a CPU)."""
        n = MATMUL_SIZE[device.type]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        best_ms = min(time_call_ms(lambda: a @ b, device) for _ in range(10))
        return cls(stream_gb_per_s(device), 2 * n**3 / best_ms / 1e9)

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on the matmul's rate is the bound."""
        return 1e3 * self.tflop_per_s / self.gb_per_s

    def bound_us(self, num_bytes: int, num_flops: int) -> float:
        """Microseconds that moving the bytes and doing the flops take at least."""
        return max(num_bytes / self.gb_per_s / 1e3, num_flops / self.tflop_per_s / 1e6)


@dataclass(frozen=True)
class Row:
    """One variant of one case. Times in microseconds; ``with_python_us`` includes the host's share."""

    op: str
    direction: str
    model: str
    shape: str
    dtype: str
    variant: str
    is_ours: bool
    num_bytes: int
    num_flops: int
    median_us: float
    p20_us: float
    p80_us: float
    with_python_us: float
    gb_per_s: float
    tflop_per_s: float
    percent_of_peak: float | None
    percent_of_ceiling: float
    error: float | None

    @property
    def case(self) -> tuple[str, ...]:
        """What the row is a variant of."""
        return self.op, self.direction, self.shape, self.dtype


@dataclass(frozen=True)
class Absent:
    """A variant that could not run, and why: it is listed, not dropped."""

    case: str
    variant: str
    reason: str


@dataclass
class Suite:
    """A run in progress: what was measured, what could not be, and whether the time was up before the end.

    Attributes:
        skipped: peers whose name contains one of these are left out.
        num_left: cases that the time was too short for.
    """

    device: torch.device
    ceilings: Ceilings
    rows: list[Row]
    absent: list[Absent]
    skipped: tuple[str, ...] = ()
    num_left: int = 0

    @classmethod
    def on(cls, device: torch.device) -> "Suite":
        """Measure the ceilings, and be ready. Ours are launched as TRITONSPEED_CONFIG_DIR has it, if it is set."""
        tuning.use_unless_chosen(comm.tuned_folder())
        return cls(device, Ceilings.measured(device), [], [])

    def run(self, cases: Sequence[tuple[str, Case]], rounds: int, until: float, max_bytes: int) -> Iterator[Case]:
        """Measure (model, case) after case, yielding each when it is done, until ``time.monotonic()`` is ``until``."""
        waiting = [(model, case) for model, case in cases if case.num_bytes <= max_bytes]
        for i, (model, case) in enumerate(waiting):
            if time.monotonic() > until:
                self.num_left = len(waiting) - i
                return
            self.measure(model, case, rounds)
            yield case

    def measure(self, model: str, case: Case, rounds: int) -> list[Row]:
        """All variants of one case, in turns; a variant that raises is entered as absent."""
        sets = [case.make(self.device, seed) for seed in range(num_rotations(case.num_bytes, self.device))]
        calls, errors = self._prepare(case, sets)
        if OURS not in calls:
            return []
        timed: dict[str, Callable[[int], Any]] = {n: lambda i, c=c: c[i]() for n, c in calls.items()}
        times = interleaved_ms(timed, range(len(sets)), self.device, rounds)
        found = [
            self._row(model, case, name, values, self._with_python_us(calls[name]), errors.get(name))
            for name, values in times.items()
        ]
        self.rows += found
        return found

    def _prepare(
        self, case: Case, sets: list[Any]
    ) -> tuple[dict[str, list[Callable[[], Any]]], dict[str, float | None]]:
        """Name → one call per set of buffers, each tried once; and each variant's error."""
        exact = self._exact(case)
        calls: dict[str, list[Callable[[], Any]]] = {}
        errors: dict[str, float | None] = {}
        for name, prepare in {OURS: _ours(case), **variants_of(case, self.device)}.items():
            if name != OURS and any(skipped in name for skipped in self.skipped):
                continue
            try:
                if exact is not None:  # on inputs of its own: some work in place
                    got = _first_tensor(prepare(case.make(self.device, 0))())
                    errors[name] = _relative_error(got, exact)
                calls[name] = [prepare(inputs) for inputs in sets]
                calls[name][0]()
            except Exception as error:  # a peer's any failure is a fact about the peer
                first = next(iter(str(error).splitlines()), "")[:MAX_REASON_CHARS]
                self.absent.append(Absent(case.label, name, f"{type(error).__name__}: {first}"))
        return calls, errors

    def _exact(self, case: Case) -> Tensor | None:
        """The reference in fp64 on the inputs of seed 0; None where that would not fit, or is not defined."""
        if 8 * case.num_bytes > MAX_EXACT_BYTES:
            return None
        inputs = {name: _double(value) for name, value in case.make(self.device, 0).items()}
        try:
            return _first_tensor(case.reference(inputs))
        except (RuntimeError, TypeError, ValueError):
            return None

    def _with_python_us(self, calls: list[Callable[[], Any]]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(CALLS_IN_A_ROW):
            calls[i % len(calls)]()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / CALLS_IN_A_ROW

    def _row(
        self, model: str, case: Case, name: str, times_ms: list[float], with_python_us: float, error: float | None
    ) -> Row:
        median = 1e3 * statistics.median(times_ms)
        p20, *_, p80 = statistics.quantiles(times_ms, n=5)
        peak = PEAKS.get(device_name(self.device))
        sheet = Ceilings(peak.memory_gb_per_s, peak.bf16_tflop_per_s) if peak else None
        return Row(
            op=case.name,
            direction=case.direction,
            model=model,
            shape=" ".join([*(f"{key}={size}" for key, size in case.shape.items()), case.variant]).strip(),
            dtype=str(case.dtype).removeprefix("torch."),
            variant=name,
            is_ours=name == OURS,
            num_bytes=case.num_bytes,
            num_flops=case.num_flops,
            median_us=median,
            p20_us=1e3 * p20,
            p80_us=1e3 * p80,
            with_python_us=with_python_us,
            gb_per_s=case.num_bytes / median / 1e3,
            tflop_per_s=case.num_flops / median / 1e6,
            percent_of_peak=100 * sheet.bound_us(case.num_bytes, case.num_flops) / median if sheet else None,
            percent_of_ceiling=100 * self.ceilings.bound_us(case.num_bytes, case.num_flops) / median,
            error=error,
        )


def _ours(case: Case) -> Callable[[Any], Callable[[], Any]]:
    return lambda inputs: lambda: case.run(inputs)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first_tensor(result: Any) -> Tensor | None:
    """What a variant is judged by: its first tensor; None for a variant that works in place and returns nothing."""
    while isinstance(result, tuple | list):
        result = result[0] if result else None
    return result


def _relative_error(got: Tensor | None, exact: Tensor | None) -> float | None:
    if got is None or exact is None or got.shape != exact.shape:
        return None
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def in_turns(families: Iterable[Sequence[Case]]) -> list[Case]:
    """The largest case of every family, then the second largest, ...: what a time limit cuts off is small."""
    queues = [sorted(family, key=lambda case: -case.num_bytes) for family in families]
    return [case for turn in zip_longest(*queues) for case in turn if case is not None]


def lost(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(ours, the peer that is faster) for every case where one is, the worst loss first."""
    by_case: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    pairs = []
    for here in by_case.values():
        ours = next((row for row in here if row.is_ours), None)
        best = min(here, key=lambda row: row.median_us)
        if ours is not None and not best.is_ours:
            pairs.append((ours, best))
    return sorted(pairs, key=lambda pair: pair[1].median_us / pair[0].median_us)
