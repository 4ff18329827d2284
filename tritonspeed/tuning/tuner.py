"""The search: candidates are timed in turns against the heuristic's choice, halved, verified, and tried once more.

    compile all, drop what spills      planning.py
    rung 0   every candidate, few rounds;  the better third goes on, of those whose outputs agree with the reference
    rung 1   more rounds;                  the best three go on
    final    these and the heuristic, many rounds; taken if more than 2 % faster

A time is kept as its ratio to the heuristic's, which is timed in every group beside the candidates: so ratios of two
groups, and of two runs, can be compared. Each group goes into the store's journal before the next one starts; a run
that was killed goes on there.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.store import Entry, FolderStore, Unwritable
from tritonspeed.kernels.tuned import Feature, fields_of
from tritonspeed.tuning.case import Case, Inputs, tensors_of
from tritonspeed.tuning.gpu import header
from tritonspeed.tuning.planning import Candidate, Job, OnProgress, first_line, name_of, prune
from tritonspeed.tuning.timing import PEAKS, device_name, interleaved_ms, num_rotations, warm_up
from tritonspeed.tuning.verify import Distance, disagreement, distances, gross_error

DECISIONS = "decisions"  # what a progress report calls the jobs themselves; other words are for the work on one
SEED = 1234
COMPILING_SHARE = 0.5  # of the time limit at most: jobs that were not compiled by then wait for the next run
SETS_BESIDE = 4  # of a case's size, for outputs, the reference and what it is compared in


class Timer(Protocol):
    """Milliseconds by variant, as ``timing.interleaved_ms`` takes them. Tests put a made-up one in its place."""

    def __call__(
        self,
        variants: Mapping[str, Callable[[Inputs], object]],
        sets: Sequence[Inputs],
        device: torch.device,
        rounds: int,
    ) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class Search:
    """How long and how thoroughly.

    Attributes:
        rounds: each candidate's, per rung.
        final_rounds: of the finalists and the heuristic.
        num_finalists: how many reach the final.
        group: candidates timed together; the journal is written after each group.
        min_gain: how much faster than the heuristic a configuration must be to be taken.
        time_limit_s: when to stop with what there is; None is when done.
        again: search also where the store has an entry for the kernel as it is.
        num_workers: processes that compile; None is one per core.
    """

    rounds: tuple[int, ...] = (5, 15)
    final_rounds: int = 50
    num_finalists: int = 3
    group: int = 8
    min_gain: float = 0.02
    time_limit_s: float | None = None
    again: bool = False
    num_workers: int | None = None


Verdict = Literal["tuned", "heuristic", "known", "rejected", "skipped", "out of time"]


@dataclass(frozen=True)
class Outcome:
    """What became of one decision.

    Attributes:
        tunable, features: which decision.
        source: hash of the kernels that it was taken for.
        case: the label of what was timed.
        verdict: "tuned" (a candidate won), "heuristic" (nothing beat it by enough), "known" (was in the store),
            "rejected" (every candidate that was faster computes something else), "skipped" (see why), "out of time".
        launch: the configuration's fields, where there is a decision.
        gain: how much faster than the heuristic, 0.25 is 25 %.
        num_candidates, num_timed: before and after compiling.
        why: for people: reasons, and candidates that were rejected for their numbers.
    """

    tunable: str
    features: dict[str, Feature]
    source: str
    case: str
    verdict: Verdict
    launch: dict[str, int] | None = None
    gain: float = 0.0
    num_candidates: int = 0
    num_timed: int = 0
    why: tuple[str, ...] = ()


class GpuBroken(RuntimeError):
    """A candidate left the GPU in a state in which nothing runs any more. What was timed before is in the journal."""


class _OutOfTime(Exception):
    """The limit was reached between two groups."""


def _blank(job: Job) -> Outcome:
    num_candidates = len(job.candidates)
    return Outcome(job.key[0], job.features, job.tunable.source, job.case.label, "skipped", None, 0.0, num_candidates)


@dataclass
class Tuner:
    """One card, one store, one search.

    Attributes:
        card: whose configurations these are.
        device: where cases run.
        store: where journal and results go.
        timer: who takes the times.
        on_progress: hears (what, done, of how many).
    """

    card: Card
    device: torch.device
    store: FolderStore
    search: Search = field(default_factory=Search)
    timer: Timer = interleaved_ms
    on_progress: OnProgress | None = None
    _deadline: float | None = None

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Take every decision, as far as time allows. An outcome for each, in the order of the jobs."""
        limit_s = self.search.time_limit_s
        self._deadline = None if limit_s is None else time.monotonic() + limit_s
        wanted = [job for job in jobs if self.search.again or self._known(job) is None]
        if wanted:
            self.store.check_writable(self.card, wanted[0].tunable.name)
            until = None if limit_s is None else time.monotonic() + COMPILING_SHARE * limit_s
            prune(wanted, self.card, self.search.num_workers, until, self.on_progress)
            warm_up(self.device)
        outcomes = []
        for i, job in enumerate(jobs):
            self.tell(DECISIONS, i, len(jobs))
            outcomes.append(self._outcome(job) if job in wanted else self._already(job))
        self.tell(DECISIONS, len(jobs), len(jobs))
        return outcomes

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.on_progress is not None:
            self.on_progress(what, done, total)

    def _known(self, job: Job) -> Entry | None:
        name, features = job.key
        entry = self.store.entries(self.card.key, name).get(features, {}).get(job.tunable.source)
        return entry if entry is not None and entry.launch.keys() == job.tunable.fields else None

    def _already(self, job: Job) -> Outcome:
        entry = self._known(job)
        assert entry is not None, f"{job.key} is not in the store"
        return replace(_blank(job), verdict="known", launch=entry.launch)

    def _outcome(self, job: Job) -> Outcome:
        blank = _blank(job)
        if not job.is_complete:
            return replace(blank, verdict="out of time")
        try:
            decided = _Decision(self, job).take(blank)
        except _OutOfTime:
            decided = replace(blank, verdict="out of time")
        except (GpuBroken, Unwritable):
            raise  # every other job would say the same
        except Exception as error:  # of one case: out of memory, a type that this card lacks; the others go on
            decided = replace(blank, why=(f"failed: {first_line(error)}",))
        dropped = [f"{count} {reason}" for reason, count in job.refusals.items()]
        return replace(decided, num_timed=len(job.allowed), why=(*dropped, *decided.why))

    def check_time(self) -> None:
        """Between groups.

        Raises:
            _OutOfTime: the limit is reached.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise _OutOfTime


class _Decision:
    """One job's way through the rungs."""

    def __init__(self, tuner: Tuner, job: Job) -> None:
        self.tuner, self.job, self.search = tuner, job, tuner.search
        self.heuristic = job.candidates[0]
        self.sets: list[Inputs] = []
        self.verified: list[Candidate] = []
        self.rejected: list[str] = []

    def take(self, blank: Outcome) -> Outcome:
        """Search, and put what was found into the store."""
        self.tuner.check_time()
        refused = self._prepare()
        if refused:
            return replace(blank, why=(refused,))
        reference, known, wrong = self._yardstick()
        if wrong:
            return replace(blank, why=(f"the kernel is wrong as the heuristic launches it: {wrong}",))
        alive = [c for c in self.job.allowed if c is not self.heuristic and not self._broke_the_gpu(c)]
        finalists = self._narrow(alive, reference, known)
        times = self._final(finalists)
        winner, gain = self._judge(times)
        is_heuristic = winner is self.heuristic
        verdict: Verdict = (
            "tuned" if not is_heuristic else "rejected" if self.rejected and not finalists else "heuristic"
        )
        self._accept(winner, is_heuristic, gain, times)
        return replace(
            blank, verdict=verdict, launch=fields_of(winner.launch), gain=gain, why=tuple(self.rejected)
        )  # fmt: skip

    def _prepare(self) -> str:
        """Make the buffers, or say why not."""
        device = self.tuner.device
        first = self.job.case.make(device, SEED)
        set_bytes = sum(x.nbytes for x in tree_leaves(first) if isinstance(x, Tensor))
        self.num_sets = num_rotations(max(set_bytes, 1), device)
        self.sets = [first]
        if device.type == "cuda":
            needed, free = set_bytes * (self.num_sets + SETS_BESIDE), torch.cuda.mem_get_info(device)[0]
            if needed > free:
                return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of the GPU are free"
        self.sets = self._make_sets()
        return ""

    def _make_sets(self) -> list[Inputs]:
        return [self.job.case.make(self.tuner.device, SEED + i) for i in range(self.num_sets)]

    def _run(self, candidate: Candidate, inputs: Inputs) -> Sequence[Tensor]:
        with self.job.tunable.pinned(candidate.launch, self.job.features):
            return tensors_of(self.job.case.run(inputs))

    def _yardstick(self) -> tuple[tuple[Tensor, ...], list[Distance], str]:
        case, device = self.job.case, self.tuner.device
        reference = tensors_of(case.reference(case.make(device, SEED)))
        outputs = self._run(self.heuristic, case.make(device, SEED))
        known = distances(outputs, reference)
        wrong = gross_error(outputs, known)
        return reference, [] if isinstance(known, str) else known, wrong

    def _narrow(self, alive: list[Candidate], reference: tuple[Tensor, ...], known: list[Distance]) -> list[Candidate]:
        """The rungs: the finalists, the best first."""
        timed, last = self._timed_before(), len(self.search.rounds) - 1
        for rung, rounds in enumerate(self.search.rounds):
            missing = [c for c in alive if (rung, name_of(c.launch)) not in timed]
            for start in range(0, len(missing), self.search.group):
                self.tuner.check_time()
                group = missing[start : start + self.search.group]
                timed |= self._time_group(rung, rounds, group)
                self.tuner.tell(f"timing {self.job.tunable.name}", start + len(group), len(missing))
            alive = [c for c in alive if (rung, name_of(c.launch)) in timed]
            alive.sort(key=lambda c, rung=rung: timed[rung, name_of(c.launch)])
            third = -(-len(alive) // 3) if rung < last else 0
            alive = self._verified(alive, max(self.search.num_finalists, third), reference, known)
        return alive

    def _timed_before(self) -> dict[tuple[int, str], float]:
        return {
            (line["rung"], line["launch"]): line["ratio"]
            for line in self._lines()
            if isinstance(line.get("ratio"), float)
        }

    def _time_group(self, rung: int, rounds: int, group: list[Candidate]) -> dict[tuple[int, str], float]:
        """Time these and the heuristic, and write it down. One that cannot be launched is left out, with its reason."""
        runs = [candidate for candidate in group if self._can_run(candidate)]
        times = self._time(runs, rounds)
        base = statistics.median(times[name_of(self.heuristic.launch)])
        lines, found = [], {}
        for candidate in runs:
            launch = name_of(candidate.launch)
            median = statistics.median(times[launch])
            found[rung, launch] = median / base
            lines.append(
                {"rung": rung, "launch": launch, "ratio": median / base, "median_us": 1e3 * median, "rounds": rounds}
            )  # fmt: skip
        self._record(lines)
        return found

    def _can_run(self, candidate: Candidate) -> bool:
        try:
            self._run(candidate, self.sets[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # out of resources, of many kinds; whether the GPU survived is found out below
            candidate.refused = f"does not run: {first_line(error)}"
        try:
            if self.tuner.device.type == "cuda":
                torch.cuda.synchronize(self.tuner.device)
        except RuntimeError as error:
            launch = name_of(candidate.launch)
            self._record([{"launch": launch, "broke": str(error)}])
            raise GpuBroken(
                f"{self.job.tunable.name} {launch} on {self.job.case.label} broke the GPU: {error}: start again, it is"
                " left out then"
            ) from error
        return not candidate.refused

    def _broke_the_gpu(self, candidate: Candidate) -> bool:
        if any("broke" in line and line.get("launch") == name_of(candidate.launch) for line in self._lines()):
            candidate.refused = "broke the GPU in an earlier run"
        return bool(candidate.refused)

    def _lines(self) -> list[dict[str, Any]]:
        name, features = self.job.key
        lines = self.tuner.store.timed(self.tuner.card, name, self.job.tunable.source, features)
        return [line for line in lines if line.get("case") == self.job.case.label]

    def _record(self, lines: list[dict[str, Any]]) -> None:
        name, features = self.job.key
        which = {"features": features, "source": self.job.tunable.source, "case": self.job.case.label}
        self.tuner.store.record(self.tuner.card, name, [which | line for line in lines])

    def _time(self, candidates: list[Candidate], rounds: int) -> dict[str, list[float]]:
        def variant(candidate: Candidate) -> Callable[[Inputs], object]:
            return lambda inputs: self._run(candidate, inputs)

        variants = {name_of(c.launch): variant(c) for c in (self.heuristic, *candidates)}
        return self.tuner.timer(variants, self.sets, self.tuner.device, rounds)

    def _verified(
        self, ranked: list[Candidate], num_wanted: int, reference: tuple[Tensor, ...], known: list[Distance]
    ) -> list[Candidate]:
        """The first that compute what they should: one that is fast because it is wrong takes nobody's place."""
        found = []
        for candidate in ranked:
            if len(found) == num_wanted:
                break
            if candidate not in self.verified:
                self.tuner.check_time()
                wrong = self._what_is_wrong(candidate, reference, known)
                if wrong:
                    self.rejected.append(f"{name_of(candidate.launch)} is wrong: {wrong}")
                    continue
                self.verified.append(candidate)
            found.append(candidate)
        return found

    def _what_is_wrong(self, candidate: Candidate, reference: tuple[Tensor, ...], known: list[Distance]) -> str:
        for _ in range(2):  # a race need not show at once
            outputs = self._run(candidate, self.job.case.make(self.tuner.device, SEED))
            wrong = disagreement(outputs, distances(outputs, reference), known, self.job.case.num_summed)
            if wrong:
                return wrong
        return ""

    def _final(self, finalists: list[Candidate]) -> dict[str, list[float]]:
        self.tuner.check_time()
        return self._time(finalists, self.search.final_rounds)

    def _judge(self, times: dict[str, list[float]]) -> tuple[Candidate, float]:
        medians = {launch: statistics.median(values) for launch, values in times.items()}
        best = min(medians, key=lambda launch: medians[launch])
        gain = medians[name_of(self.heuristic.launch)] / medians[best] - 1
        if gain <= self.search.min_gain:
            return self.heuristic, 0.0
        return next(c for c in self.job.candidates if name_of(c.launch) == best), gain

    def _accept(self, winner: Candidate, is_heuristic: bool, gain: float, times: dict[str, list[float]]) -> None:
        tuner, (name, features) = self.tuner, self.job.key
        figures = figures_of(self.job.case, times[name_of(winner.launch)], tuner.device)
        heuristic_us = 1e3 * statistics.median(times[name_of(self.heuristic.launch)])
        counts = {"num_candidates": len(self.job.candidates), "num_timed": len(self.job.allowed)}
        measured = {
            **header(tuner.device), "case": self.job.case.label, **figures, "heuristic_median_us": heuristic_us,
            "gain": gain, **counts,
        }  # fmt: skip
        entry = Entry(fields_of(winner.launch), is_heuristic, measured)
        tuner.store.put(tuner.card, name, self.job.tunable.source, features, entry)


def figures_of(case: Case, times_ms: list[float], device: torch.device) -> dict[str, Any]:
    """Median and quantiles in µs, GB/s, TFLOP/s, and the share of the data sheet's roof in percent."""
    median = statistics.median(times_ms)
    p20, *_, p80 = statistics.quantiles(times_ms, n=5) if len(times_ms) > 1 else (median, median)
    figures = {
        "median_us": 1e3 * median, "p20_us": 1e3 * p20, "p80_us": 1e3 * p80,
        "gb_per_s": case.num_bytes / median / 1e6, "tflop_per_s": case.num_flops / median / 1e9,
    }  # fmt: skip
    peak = PEAKS.get(device_name(device))
    if peak is not None:
        roof_ms = max(case.num_bytes / peak.memory_gb_per_s / 1e6, case.num_flops / peak.bf16_tflop_per_s / 1e9)
        figures["percent_of_peak"] = 100 * roof_ms / median
    return figures
