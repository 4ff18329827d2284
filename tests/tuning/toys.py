"""A toy decision, whose best configuration is known, and a clock that says so: searches run without a GPU."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tritonspeed.kernels._triton import card_of, launch, tl, triton
from tritonspeed.kernels.cards import CARDS, Card
from tritonspeed.kernels.store import FolderStore
from tritonspeed.kernels.tuned import Feature, Tunable, next_power_of_2
from tritonspeed.tuning import Case, Job, Outcome, Search, Tuner, plan
from tritonspeed.tuning.case import Draw, Inputs

CARD = CARDS["sm_90"]
CPU = torch.device("cpu")
WRONG_BLOCK = 4096  # the toy computes something else with it
BEST_BLOCK = 512
QUICK = Search(rounds=(1, 2), final_rounds=5, group=4, num_workers=0)


@dataclass(frozen=True, slots=True)
class ToyLaunch:
    """A configuration of the toy."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card, **features: Feature) -> "ToyLaunch":
        return cls(1024, 4)

    @classmethod
    def candidates(cls, card: Card, **features: Feature) -> list["ToyLaunch"]:
        return [cls(block, warps) for block in (256, BEST_BLOCK, 1024, 2048, WRONG_BLOCK) for warps in (4, 8)]


TOY = Tunable("toy", (), ToyLaunch, ToyLaunch.heuristic, ToyLaunch.candidates)


def double(x: Tensor) -> Tensor:
    how = TOY.resolve(card_of(x), n=next_power_of_2(x.numel()))
    return x * (2.5 if how.block == WRONG_BLOCK else 2.0)


def toy_case(n: int = 100) -> Case:
    return Case(
        "double", "forward", {"n": n}, torch.float32, 8 * n, n,
        make=lambda device, seed: {"x": Draw(device, seed).normal((n,), torch.float32)},
        run=lambda inputs: double(inputs["x"]),
        reference=lambda inputs: inputs["x"] * 2,
    )  # fmt: skip


def true_ms(name: str) -> float:
    """What the toy's clock says: the best block is a third faster than the heuristic, the wrong one faster still."""
    block, warps = (int(part.split("=")[1]) for part in name.split(","))
    speeds = {256: 1.1, BEST_BLOCK: 0.75, 1024: 1.0, 2048: 1.3, WRONG_BLOCK: 0.1}
    return speeds[block] * (1.0 if warps == 4 else 1.05)


@dataclass
class Clock:
    """A timer with known answers that remembers what it was asked; ``kill_after`` groups the process is killed."""

    ms: Callable[[str], float] = true_ms
    kill_after: int | None = None
    asked: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def __call__(
        self,
        variants: Mapping[str, Callable[[Inputs], object]],
        sets: Sequence[Inputs],
        device: torch.device,
        rounds: int,
    ) -> dict[str, list[float]]:
        if self.kill_after is not None and len(self.asked) == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append((tuple(variants), rounds))
        for variant in variants.values():
            variant(sets[0])
        jitter = [1.0, 1.001, 0.999]
        return {name: [self.ms(name) * jitter[i % 3] for i in range(rounds)] for name in variants}


def search_in(folder: Path, clock: Clock, search: Search = QUICK, cases: Sequence[Case] | None = None) -> list[Outcome]:
    return Tuner(CARD, CPU, FolderStore(folder), search, clock).run(plan(cases or [toy_case()], CARD))


@triton.jit
def _hungry_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows)
    tl.store(y_ptr + rows, x * tl.sum(x, axis=0))


@dataclass(frozen=True, slots=True)
class HungryLaunch:
    """A configuration of a kernel that holds its whole row in registers."""

    block: int
    num_warps: int

    @classmethod
    def heuristic(cls, card: Card) -> "HungryLaunch":
        return cls(1024, 4)

    @classmethod
    def candidates(cls, card: Card) -> list["HungryLaunch"]:
        return [cls(16384, 1), cls(3000, 4), cls(2048, 4)]  # 512 elements a thread; no power of two; fine


HUNGRY = Tunable("hungry", (_hungry_kernel,), HungryLaunch, HungryLaunch.heuristic, HungryLaunch.candidates)


def hungry(x: Tensor) -> Tensor:
    how = HUNGRY.resolve(card_of(x))
    y = torch.empty_like(x)
    launch(_hungry_kernel, (1,), x, y, BLOCK=how.block, num_warps=how.num_warps)
    return y


def hungry_case() -> Case:
    return Case(
        "hungry", "forward", {"n": 16384}, torch.float32, 8 * 16384, 16384,
        make=lambda device, seed: {"x": Draw(device, seed).normal((16384,), torch.float32)},
        run=lambda inputs: hungry(inputs["x"]), reference=lambda inputs: inputs["x"],
    )  # fmt: skip


def jobs_of(case: Case, card: Card = CARD) -> list[Job]:
    return plan([case], card)
