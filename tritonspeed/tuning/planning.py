"""What there is to tune: which decisions a case depends on, their candidates, and which of these compile well.

All of it without a GPU: launches are recorded for a card, then compiled for it in a pool of processes. A candidate
that spills registers, asks for more shared memory than the card has, or is refused by the compiler is never timed.
"""

import importlib
import os
import pkgutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from tritonspeed import kernels
from tritonspeed.kernels._triton import HAS_TRITON, INTERPRETED, recording
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.machine_code import Recipe, compile_recipe, recipe_of
from tritonspeed.kernels.tuned import Feature, Tunable, features_key, fields_of, listening
from tritonspeed.tuning.case import Case, unfilled
from tritonspeed.tuning.shapes_only import ShapesOnly

NOT_IN_TIME = "not compiled in time"
MAX_WORKERS = 16  # a compiler takes one core and about 400 MiB
OnProgress = Callable[[str, int, int], None]  # (what, done, of how many)


def name_of(launch: Any) -> str:
    """A configuration as a word: "block=1024,num_warps=8"."""
    return features_key(fields_of(launch))  # type: ignore[arg-type]


@dataclass
class Candidate:
    """A configuration, and what the compiler is given for it.

    Attributes:
        launch: the configuration.
        recipes: of the tunable's kernels, as the case launches them.
        refused: why it is not to be timed; empty if it may be.
    """

    launch: Any
    recipes: tuple[Recipe, ...] = ()
    refused: str = ""


@dataclass
class Job:
    """One decision to take: a tunable and its features on a card, and the case that shows how well it was taken.

    Attributes:
        candidates: the heuristic's configuration first; no two alike.
    """

    tunable: Tunable[Any]
    features: dict[str, Feature]
    case: Case
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """(name of the tunable, features as text): what a store keeps it under."""
        return self.tunable.name, features_key(self.features)

    @property
    def allowed(self) -> list[Candidate]:
        """Those to be timed. The heuristic's is always among them: it is what a call takes now."""
        return [c for i, c in enumerate(self.candidates) if i == 0 or not c.refused]

    @property
    def is_complete(self) -> bool:
        """Whether every candidate was compiled: a search among some of them would pass for one among all."""
        return all(candidate.refused != NOT_IN_TIME for candidate in self.candidates)

    @property
    def refusals(self) -> Counter[str]:
        """How many were dropped, by reason."""
        return Counter(c.refused for c in self.candidates if c.refused)


@dataclass(frozen=True)
class Compiled:
    """What matters of a compiled recipe; ``error`` is the last line of what the compiler said against it."""

    spilled_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""


def import_all_tunables() -> None:
    """Import every kernel file, so that ``TUNABLES`` is complete."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")


def decisions_of(case: Case, card: Card) -> list[tuple[Tunable[Any], dict[str, Feature]]]:
    """Which tunables a case asks on a card, with which features, in the order of the first call."""
    found: dict[tuple[str, str], tuple[Tunable[Any], dict[str, Feature]]] = {}

    def listener(tunable: Tunable[Any], _: Card, features: dict[str, Feature]) -> None:
        found.setdefault((tunable.name, features_key(features)), (tunable, dict(features)))

    with unfilled(), recording(card), ShapesOnly():
        inputs = case.make(torch.device("cpu"), 0)
        with listening(listener):
            case.run(inputs)
    return list(found.values())


def plan(cases: Iterable[Case], card: Card, names: Iterable[str] | None = None) -> list[Job]:
    """The decisions that these cases depend on, each once: its largest case stands for all that share it.

    Args:
        names: tunables or operations to keep to; None is all.
    """
    wanted = None if names is None else set(names)
    jobs: dict[tuple[str, str], Job] = {}
    for case in cases:
        for tunable, features in decisions_of(case, card):
            if wanted is not None and not {tunable.name, case.name} & wanted:
                continue
            job = Job(tunable, features, case)
            known = jobs.setdefault(job.key, job)
            if case.num_bytes > known.case.num_bytes:
                known.case = case
    for job in jobs.values():
        _fill(job, card)
    return list(jobs.values())


def _fill(job: Job, card: Card) -> None:
    """The candidates, and what the compiler is given for each."""
    tunable = job.tunable
    launches = [tunable.heuristic(card, **job.features), *tunable.candidates(card, **job.features)]
    job.candidates = [Candidate(launch) for launch in {name_of(launch): launch for launch in launches}.values()]
    if not HAS_TRITON or INTERPRETED:
        return  # there is no machine code to look at
    with unfilled(), recording(card), ShapesOnly():
        inputs = job.case.make(torch.device("cpu"), 0)
        for candidate in job.candidates:
            try:
                with tunable.pinned(candidate.launch, job.features), recording(card) as launched:
                    job.case.run(inputs)
                recipes = [recipe_of(one) for one in launched if one.kernel in tunable.kernels]
                candidate.recipes = tuple(dict.fromkeys(recipes))
            except Exception as error:  # whatever a launch function says against a candidate, the others go on
                candidate.refused = f"cannot be launched: {first_line(error)}"


def compile_all(
    recipes: Sequence[Recipe],
    card: Card,
    num_workers: int | None = None,
    deadline: float | None = None,
    on_progress: OnProgress | None = None,
) -> dict[Recipe, Compiled]:
    """Compile for a card, in processes that need no GPU. Triton keeps the code, so that a launch here finds it.

    Args:
        num_workers: processes; 0 compiles in this one, None takes the cores there are.
        deadline: ``time.monotonic()`` at which to stop; what is not compiled then is missing in the answer.
    """
    if num_workers is None:
        num_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    num_workers = min(num_workers, len(recipes))
    found: dict[Recipe, Compiled] = {}

    def done(recipe: Recipe, compiled: Compiled) -> None:
        found[recipe] = compiled
        if on_progress is not None:
            on_progress("compiling", len(found), len(recipes))

    if num_workers == 0:
        for recipe in recipes:
            if deadline is None or time.monotonic() < deadline:
                done(recipe, compile_one(recipe, card))
        return found
    try:
        _compile_in_pool(recipes, card, num_workers, deadline, done)
    except BrokenProcessPool:  # a compiler that aborts takes its process along: the rest one by one, to find which
        for recipe in recipes:
            if recipe not in found and (deadline is None or time.monotonic() < deadline):
                try:
                    _compile_in_pool([recipe], card, 1, deadline, done)
                except BrokenProcessPool:
                    done(recipe, Compiled(error="the compiler crashed"))
    return found


def _compile_in_pool(
    recipes: Sequence[Recipe],
    card: Card,
    num_workers: int,
    deadline: float | None,
    done: Callable[[Recipe, Compiled], None],
) -> None:
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(compile_one, recipe, card): recipe for recipe in recipes}
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        for future in as_completed(futures, timeout=left_s):
            done(futures[future], future.result())
    except OutOfTime:
        pass
    finally:
        pool.shutdown(cancel_futures=True)


def compile_one(recipe: Recipe, card: Card) -> Compiled:
    """Compile one recipe: in a worker."""
    try:
        code = compile_recipe(recipe, card)
    except Exception as error:  # the compiler's exceptions have no common base; each is a reason not to time this one
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Compiled(
            error=f"{type(error).__name__}: {said[-1] if said else ''}"
        )  # the source it is about comes first
    return Compiled(code.spilled_bytes, code.shared_bytes)


def prune(
    jobs: Sequence[Job],
    card: Card,
    num_workers: int | None = None,
    deadline: float | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Compile every candidate of every job, and refuse those that do not compile well."""
    recipes = dict.fromkeys(recipe for job in jobs for candidate in job.candidates for recipe in candidate.recipes)
    compiled = compile_all(list(recipes), card, num_workers, deadline, on_progress)
    for job in jobs:
        for candidate in job.candidates:
            reasons = [_against(compiled.get(recipe), card) for recipe in candidate.recipes]
            candidate.refused = candidate.refused or next(filter(None, reasons), "")


def _against(compiled: Compiled | None, card: Card) -> str:
    if compiled is None:
        return NOT_IN_TIME
    if compiled.error:
        return f"does not compile: {compiled.error}"
    if compiled.spilled_bytes:
        return "spills registers"
    return "too much shared memory" if compiled.shared_bytes > card.max_shared_bytes else ""


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said.strip()}"
