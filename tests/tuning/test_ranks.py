"""One rank tunes for all: nobody deadlocks, everybody launches the same, and where not it is said who differs."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Worlds
from toys import BEST_BLOCK, CARD, CPU, QUICK, TOY, Clock, ToyLaunch, toy_case

from tritonspeed import comm, tuning
from tritonspeed.kernels import tuned
from tritonspeed.kernels._triton import card_of
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.store import FolderStore
from tritonspeed.tuning import Outcome
from tritonspeed.tuning.ranks import check_agreement

BEST = ToyLaunch(BEST_BLOCK, 4)


class SlowClock(Clock):
    """Longer than nothing: the others have to wait."""

    def __call__(self, variants, sets, device, rounds):
        time.sleep(0.05)
        return super().__call__(variants, sets, device, rounds)


def tune(folder: str):
    tuned.use_stores([])
    seen, clock = [], SlowClock()
    mesh = comm.mesh_of(device=CPU)
    outcomes = tuning.tune(
        [toy_case(100), toy_case(1000)], folder, search=QUICK, mesh=mesh, timer=clock,
        on_progress=lambda *said: seen.append(said),
    )  # fmt: skip
    mine = TOY.resolve(card_of(torch.empty(0)), n=128)
    tuned.use_stores([])
    return outcomes, seen, len(clock.asked), mine


def test_rank_zero_tunes_and_all_use_it(ranks: Worlds, tmp_path: Path) -> None:
    (first, seen_0, asked_0, mine_0), (second, seen_1, asked_1, mine_1) = ranks(2, tune, str(tmp_path))
    assert first == second and [outcome.verdict for outcome in first] == ["tuned", "tuned"]
    assert asked_0 > 0 and asked_1 == 0
    assert seen_0 == seen_1 and seen_1[0] == ("decisions", 0, 2) and seen_1[-1] == ("decisions", 2, 2)
    assert mine_0 == mine_1 == BEST
    assert list(FolderStore(tmp_path).summary().values()) == [{"toy": 2}]


def tune_where_rank_zero_fails(folder: str) -> str:
    Path(folder).touch()  # a file stands where the folder should
    try:
        tune(folder)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failure_of_rank_zero_is_everybodys(ranks: Worlds, tmp_path: Path) -> None:
    first, second = ranks(2, tune_where_rank_zero_fails, str(tmp_path / "file"))
    assert first.startswith("Unwritable: tuned configurations cannot be written")
    assert second.startswith("RuntimeError: rank 1: rank 0 could not tune: Unwritable: tuned configurations cannot be")


def outcome(**features: int) -> Outcome:
    return Outcome("toy", features, TOY.source, "a case", "tuned", {"block": 1, "num_warps": 1})


def agree(what: str) -> str:
    tuned.use_stores([])
    mesh, card = comm.mesh_of(device=CPU), CARD
    if what == "another card" and mesh.rank == 1:
        card = CARDS["sm_80"]
    if what == "another store" and mesh.rank == 1:
        tuned.use_stores([Stubborn()])
    if what == "another version" and mesh.rank == 1:
        tuned.TUNABLES.pop("toy")
    try:
        check_agreement(mesh, card, [outcome(n=128), outcome(n=256)])
    except RuntimeError as error:
        return str(error)
    finally:
        tuned.TUNABLES["toy"] = TOY
        tuned.use_stores([])
    return "agreed"


class Stubborn:
    """A store with an opinion of its own about one decision."""

    def lookup(self, card, name, source, features):
        return {"block": 7, "num_warps": 7} if features == "n=256" else None


def test_ranks_that_would_launch_differently_are_named(ranks: Worlds) -> None:
    for said in ranks(2, agree, "another store"):
        assert said.startswith(f"ranks 0 and 1, both on {CARD.key}, would launch toy (n=256) differently:")
        assert "'block': 1024" in said and "'block': 7" in said and "deterministic=True" in said


def test_a_rank_without_the_kernel_is_named(ranks: Worlds) -> None:
    for said in ranks(2, agree, "another version"):
        assert "would launch toy (n=128) differently: {'block': 1024, 'num_warps': 4} and None" in said


@pytest.mark.parametrize("what", ["nothing", "another card"])
def test_ranks_that_agree_or_need_not_go_on(ranks: Worlds, what: str) -> None:
    assert ranks(2, agree, what) == ["agreed", "agreed"]


def send_texts() -> tuple[str, str, list[str]]:
    mesh = comm.mesh_of(device=CPU)
    text = "größer, 日本語\n" * 1000
    sent = comm.broadcast_text(mesh, text if mesh.rank == 1 else None, 1, "test")
    empty = comm.broadcast_text(mesh, "" if mesh.rank == 0 else None, 0, "test")
    return sent, empty, comm.gather_texts(mesh, f"I am {mesh.rank}" + "!" * mesh.rank, "test")


def test_texts_travel(ranks: Worlds) -> None:
    for sent, empty, gathered in ranks(2, send_texts):
        assert sent == "größer, 日本語\n" * 1000 and empty == ""
        assert gathered == ["I am 0", "I am 1!"]


def test_one_rank_has_nobody_to_tell() -> None:
    mesh = comm.mesh_of(device=CPU)
    assert comm.broadcast_text(mesh, "alone", 0, "test") == "alone"
    assert comm.gather_texts(mesh, "alone", "test") == ["alone"]
    with pytest.raises(ValueError, match="rank 0 is the source of 'test' and has passed no text"):
        comm.broadcast_text(mesh, None, 0, "test")


def test_what_rank_zero_found_is_for_its_card_and_its_kernels_alone() -> None:
    from tritonspeed.tuning.ranks import GivenStore

    store = GivenStore(CARD.key, [outcome(n=128), replace(outcome(n=256), launch=None)])
    assert store.lookup(CARD, "toy", TOY.source, "n=128") == {"block": 1, "num_warps": 1}
    assert store.lookup(CARD, "toy", TOY.source, "n=256") is None
    assert store.lookup(CARD, "toy", "changed", "n=128") is None
    assert store.lookup(CARDS["sm_80"], "toy", TOY.source, "n=128") is None
